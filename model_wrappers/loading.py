"""From `pretrained=...` to a model and its processor, with every failure as one sentence."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from transformers import AutoProcessor, PreTrainedConfig, PreTrainedModel, ProcessorMixin
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    MODEL_MAPPING,
)
from transformers.utils import is_flash_attn_2_available

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.families import ANY, FAMILIES, GENERIC, Family, family_for
from sparsemm_lmms.model_wrappers.adapters import check_adapter, with_adapter
from sparsemm_lmms.model_wrappers.arguments import DEMO, RunOptions
from sparsemm_lmms.model_wrappers.quantization import quantization_config, quantization_of
from sparsemm_lmms.session import check_architecture
from sparsemm_lmms.visual_heads.token_grid import kind_of

DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
"""The device maps that accelerate finds by itself; others are a device, or a JSON object from modules to devices."""

AUDIO_CONFIGS = {"audio_config", "audio_encoder", "audio_encoder_config"}
"""Names that transformers' configs have for parts of theirs that hear."""


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model with its processor (left padding) and where they came from."""

    model: PreTrainedModel
    processor: ProcessorMixin
    path: str


def resolve_device(options: RunOptions, accelerator: Accelerator | None = None) -> torch.device:
    """The device of this process: accelerate's with several processes, else the asked one, else CUDA before CPU."""
    if accelerator is not None and accelerator.num_processes > 1:
        if options.device_map is not None:
            raise ValueError(
                "device_map spreads one model over the GPUs; it cannot be combined with several processes."
            )
        if options.device != "auto" and _device("device", options.device).type != accelerator.device.type:
            raise ValueError(f"device={options.device} differs from accelerate's {accelerator.device}; set only one.")
        return accelerator.device
    read_device_map(options)
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _present("device", options.device)


def read_device_map(options: RunOptions) -> str | dict[str, str | int] | None:
    """`device_map` as `from_pretrained` takes it, with devices that exist here.

    Raises:
        ValueError: one sentence.
    """
    given = options.device_map
    if given is None or given in DEVICE_MAPS:
        return given
    if not given.startswith("{"):
        return str(_present("device_map", f"cuda:{given}" if given.isdecimal() else given))
    try:
        found = json.loads(given)
    except ValueError:
        raise ValueError(f'device_map={given} is no JSON object, as {{"": 0}} is one.') from None
    for place in found.values():
        if isinstance(place, bool) or not isinstance(place, (str, int)):
            raise ValueError(f"device_map={given} names {place!r}, which is no device; use 0, cuda:0 or cpu.")
        _present("device_map", f"cuda:{place}" if isinstance(place, int) else place)
    return found


def check_possible(options: RunOptions, compression: CompressionConfig, device: torch.device) -> None:
    """Refuse what cannot run, on this machine or on any, before any weight is read.

    Raises:
        ValueError: one sentence.
    """
    if compression.method == "mask_random" and compression.mask_ratio > 0.5:
        raise ValueError(
            f"mask_ratio={compression.mask_ratio} leaves too few heads for mask_random, which silences as many as mask "
            "but others; use at most 0.5."
        )
    if options.attn_implementation == "flash_attention_2":
        if not is_flash_attn_2_available():
            raise ValueError(
                "attn_implementation=flash_attention_2 needs the flash-attn package and a GPU, and this machine lacks "
                "one of them; use attn_implementation=sdpa."
            )
        if device.type != "cuda":
            raise ValueError(
                f"attn_implementation=flash_attention_2 runs on CUDA only, not on {device}; use "
                "attn_implementation=sdpa or device=cuda."
            )
    if compression.kernel_backend == "triton":
        if importlib.util.find_spec("triton") is None:
            raise ValueError("kernel_backend=triton needs the triton package; install it or use kernel_backend=auto.")
        if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(
                f"kernel_backend=triton runs on CUDA only, not on {device}; use kernel_backend=auto, or set "
                "TRITON_INTERPRET=1 for Triton's slow interpreter."
            )


def _present(argument: str, name: str) -> torch.device:
    """The device called `name`, or one sentence if this machine has none of that name."""
    device = _device(argument, name)
    if device.type == "cpu":
        return device
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"{argument}={name} was asked for, but torch sees no GPU here; use {argument}=cpu.")
        count = torch.cuda.device_count()
    else:
        found = torch.accelerator.current_accelerator(check_available=True)
        if found is None or found.type != device.type:
            raise ValueError(f"{argument}={name} is no device that this machine can compute on; use cuda or cpu.")
        count = torch.accelerator.device_count()
    if device.index is not None and device.index >= count:
        last = f"{device.type}:{count - 1}"
        raise ValueError(f"{argument}={name} was asked for, but the last device here is {last}; use {device.type}:0.")
    return device


def _device(argument: str, name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"{argument}={name!r} is no torch device; use cuda, cuda:1 or cpu.") from None


def resolve_dtype(options: RunOptions, device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA and float32 elsewhere and for the demo models, unless asked otherwise."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if device.type != "cuda" or options.is_demo:
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def checkpoint_path(family: Family, options: RunOptions) -> str:
    """Folder or repository of the weights; `demo` is the packaged model."""
    if not options.is_demo:
        return options.pretrained
    from sparsemm_lmms.demo import model_path

    return str(model_path(family.model_type))


def find_family(name: str, given: Mapping[str, Any]) -> Family:
    """The family of a checkpoint by the `model_type` in its config.json; else one of transformers' class for that type.

    Args:
        name: registered name of the model, for example `vlm_snapkv`.
        given: arguments of the model, of which `pretrained` and `revision` are read.

    Raises:
        ValueError: for no checkpoint, and for one that transformers' own classes do not run as a model of images.
    """
    told = {key: str(given[key]).strip() for key in ("pretrained", "revision") if given.get(key) is not None}
    told = {key: value for key, value in told.items() if value.lower() not in ("", "none")}
    if "pretrained" not in told:
        raise ValueError(f"{name} needs pretrained=ORG/NAME, or a folder: it runs any checkpoint and has no default.")
    options = RunOptions(told["pretrained"], revision=told.get("revision", "main"))
    if options.is_demo:
        models = " or ".join(name.replace(ANY, family, 1) for family in DEMO_FAMILIES)
        raise ValueError(f"pretrained={DEMO} names no checkpoint to {name}; use --model {models} for a demo model.")
    facts = _config_json(options.pretrained, options)
    kind = str(facts.get("model_type", ""))
    if (family := family_for(kind)) is not None:
        return family
    architecture = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind)
    if architecture is None:
        raise ValueError(f"pretrained={options.pretrained} cannot be compressed: {_why_not_run(kind, facts)}.")
    config = _built(facts, options)
    names = [[f"{media}_token_{end}" for end in ("id", "index")] for media in ("image", "video")]
    known = [[field for field in fields if isinstance(getattr(config, field, None), int)] for fields in names]
    image, video = known
    return Family(
        model_type=kind,
        architecture=architecture,
        pretrained=options.pretrained,
        vision_tokens=(*(image[:1] or ["image_token_id"]), *video[:1]),
        grid=kind_of(config),
        lmms_eval=GENERIC,
        reads_video=bool(video),
    )


def _why_not_run(kind: str, facts: Mapping[str, Any]) -> str:
    """What a checkpoint is that transformers has no class of images and text for."""
    if "auto_map" in facts:
        return (
            f"it is a {kind!r} model, whose attention is code of its repository (remote code); use a checkpoint of it "
            "for transformers' own classes"
        )
    if kind not in CONFIG_MAPPING:
        return f"transformers {transformers.__version__} knows no model type {kind!r}"
    if kind in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES or set(CONFIG_MAPPING[kind].sub_configs) & AUDIO_CONFIGS:
        return f"transformers has no class that reads images and writes text for {kind!r}, a model with audio"
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and "vision_config" not in facts:
        return f"it is a text-only {kind!r} checkpoint, which reads no images"
    return f"transformers has no class that reads images and writes text for its model type {kind!r}"


def _config_json(path: str, options: RunOptions) -> dict[str, Any]:
    try:
        config, _ = PreTrainedConfig.get_config_dict(path, revision=options.revision)
        if not config:
            raise FileNotFoundError("there is no config.json")
    except OSError as error:
        raise ValueError(_unreachable(options, error)) from error
    except TypeError:  # of transformers' look into a number
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"pretrained={options.pretrained} has a config.json that is no JSON object.")
    return config


def _built(facts: Mapping[str, Any], options: RunOptions) -> Any:
    """The configuration with the defaults that its file leaves out."""
    try:
        return CONFIG_MAPPING[facts["model_type"]].from_dict(dict(facts))
    except Exception as error:  # whatever a class makes of values that it does not know
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"pretrained={options.pretrained} has a config.json that transformers {transformers.__version__} cannot "
            f"read: {textwrap.shorten(reason, 200, placeholder=' ...').rstrip('.')}."
        ) from error


def read_config(family: Family, options: RunOptions, method: str | None = None) -> dict[str, Any]:
    """The checkpoint's config.json, checked to be of this family and compressible before any weight is read.

    Args:
        method: of the model, for a sentence that names another one.

    Raises:
        ValueError: if it cannot be found, belongs to another kind of model, or cannot be compressed.
    """
    config = _config_json(checkpoint_path(family, options), options)
    found = str(config.get("model_type", ""))
    architecture = family.architectures.get(found) or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(found)
    if architecture is not None:
        built = _built(config, options)
        check_architecture(built, f"pretrained={options.pretrained} ({architecture})")
    if found in family.architectures:
        _check_attention(built, options)
        return config
    if (other := family_for(found)) is not None:
        use = f": use {other.model_type}_{method}" if method else ""
        hint = f"it belongs to the {other.model_type}_* models{use}"
    elif architecture is not None:
        hint = f"try {ANY}_* models, which run any checkpoint" + (f": {ANY}_{method}" if method else "")
    else:
        hint = _why_not_run(found, config)
    raise ValueError(
        f"pretrained={options.pretrained} is a {found!r} checkpoint, but {family.model_type}_* models need "
        f"a {' or '.join(map(repr, family.architectures))} one, for example {family.pretrained}; {hint}."
    )


def _check_attention(config: Any, options: RunOptions) -> None:
    """Refuse an implementation that passes over what the text model's attention has."""
    text = config.get_text_config(decoder=True)
    model: Any = MODEL_MAPPING.get(type(text), None)
    if options.attn_implementation == "sdpa" and model is not None and not model._supports_sdpa:
        raise ValueError(
            f"pretrained={options.pretrained} has a {text.model_type!r} text model, whose attention is not that of "
            "attn_implementation=sdpa (soft-capped logits or sinks, say); use attn_implementation=eager."
        )


def load_checkpoint(family: Family, options: RunOptions, device: torch.device) -> Checkpoint:
    """Load weights and processor. Call `read_config` first."""
    path = checkpoint_path(family, options)
    kind = _config_json(path, options)["model_type"]
    architecture = getattr(transformers, family.architectures[kind], None)
    if architecture is None:
        raise ValueError(
            f"transformers {transformers.__version__} has no {family.architectures[kind]}, which {family.model_type}_* "
            f"models need for {kind!r} checkpoints; install a version that has it."
        )
    shared: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        processor = AutoProcessor.from_pretrained(path, **shared)
        _prepare_processor(processor, family, options)  # first: what is wrong is said before the weights are read
        config = CONFIG_MAPPING[kind].from_pretrained(path, revision=options.revision)
        _name_image_token(config, family, processor, options)
        dtype, told = resolve_dtype(options, device), options.pretrained
        quantization = quantization_config(options.quantization, config, architecture, told, device, dtype)
        if options.peft is not None:
            check_adapter(options.peft, config, architecture, told)
        quantised = quantization is not None or quantization_of(config) is not None
        device_map = read_device_map(options) or ({"": str(device)} if quantised else None)
        model = architecture.from_pretrained(
            path,
            config=config,
            **shared,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            device_map=device_map,
            **({} if quantization is None else {"quantization_config": quantization}),
        )
    except OSError as error:
        raise ValueError(_unreachable(options, error)) from error
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"pretrained={options.pretrained} needs a package that is not installed here: {reason}"
        ) from error
    if device_map is None:
        model.to(device)
    if options.peft is not None:
        model = with_adapter(model, options.peft, quantised)
    return Checkpoint(model.eval(), processor, path)


def _prepare_processor(processor: ProcessorMixin, family: Family, options: RunOptions) -> None:
    example = f", for example {family.pretrained}" if family.model_type in FAMILIES else ""
    if not isinstance(processor, ProcessorMixin):
        raise ValueError(f"pretrained={options.pretrained} has no processor of images and text{example}.")
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"pretrained={options.pretrained} has no chat template in its processor, so prompts cannot be written; "
            f"use a chat checkpoint in the Hugging Face format{example}."
        )
    limits = {"shortest_edge": options.min_pixels, "longest_edge": options.max_pixels}
    if given := {edge: value for edge, value in limits.items() if value is not None}:
        for resizer in filter(None, (processor.image_processor, getattr(processor, "video_processor", None))):
            sizes = {edge: resizer.size[edge] for edge in limits} | given
            if resizer is processor.image_processor:
                _check_pixels(sizes["shortest_edge"], sizes["longest_edge"], options)
            resizer.size = type(resizer.size)(**sizes)
    if hasattr(getattr(processor, "video_processor", None), "cap_pixels_per_frame"):
        processor.video_processor.cap_pixels_per_frame = True  # as qwen-vl-utils, which the host's stock model uses
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token_id is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token


def _name_image_token(config: Any, family: Family, processor: Any, options: RunOptions) -> None:
    """Write the processor's image token into a config that names none."""
    if any(isinstance(getattr(config, name, None), int) for name in family.vision_tokens):
        return
    places = (processor, processor.tokenizer)
    token = next((place.image_token_id for place in places if hasattr(place, "image_token_id")), None)
    if token is None:
        raise ValueError(
            f"pretrained={options.pretrained} cannot be compressed: neither its config nor its processor names the "
            "token that stands for images (image_token_id)."
        )
    config.image_token_id = token


def _check_pixels(least: int, most: int, options: RunOptions) -> None:
    """Refuse a limit that contradicts the checkpoint's other one (two given ones were compared before)."""
    if least <= most:
        return
    name, other = ("max_pixels", "min_pixels") if options.max_pixels is not None else ("min_pixels", "max_pixels")
    value, own = (most, least) if name == "max_pixels" else (least, most)
    relation, mend = ("below", "raise") if name == "max_pixels" else ("above", "lower")
    raise ValueError(
        f"{name}={value} is {relation} the {other}={own} of pretrained={options.pretrained}; {mend} {name} or give "
        f"{other} too."
    )


def _unreachable(options: RunOptions, error: OSError) -> str:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if Path(options.pretrained).is_dir():
        return f"pretrained={options.pretrained} is no complete Hugging Face checkpoint: {reason}."
    told = f"pretrained={options.pretrained} is no local folder"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", options.pretrained):
        return f"{told}; give the folder of the checkpoint, or pretrained={DEMO}, the packaged demo model."
    folder = f"checkpoints/{options.pretrained.rpartition('/')[2]}"
    return (
        f"{told} and could not be loaded from Hugging Face ({reason}); without a network bring it from elsewhere "
        f"(`hf download {options.pretrained} --local-dir {folder}`, then pretrained={folder}), or use "
        f"pretrained={DEMO}, the packaged demo model."
    )
