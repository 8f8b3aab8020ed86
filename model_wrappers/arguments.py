"""`--model_args`: which exist, what they mean, and one clear sentence for each that is wrong."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from sparsemm_lmms.config import CUDA_GRAPHS, CompressionConfig
from sparsemm_lmms.families import FAMILIES, Family
from sparsemm_lmms.methods import METHODS, all_settings, find_method
from sparsemm_lmms.presets import FREE, FREE_PARTS
from sparsemm_lmms.settings import cut, parse_value, shown, unknown_name

DTYPES = ("auto", "float32", "bfloat16", "float16")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2")
ROUNDS = ("append", "recompress", "independent")
QUANTIZATIONS = {
    "bnb-4bit": "bitsandbytes",
    "bnb-8bit": "bitsandbytes",
    "torchao-int8wo": "torchao",
    "torchao-fp8wo": "torchao",
}
"""Word -> the package that it needs. NF4 and LLM.int8() of bitsandbytes; weight-only int8 and float8 of torchao."""
RESERVED = ("self", "checkpoint", "max_batch_size")
"""Parameters of our constructors that a command line cannot fill."""
DEMO = "demo"
"""`pretrained=demo` is the packaged demo model of the family."""


@dataclass(frozen=True)
class RunOptions:
    """Everything in `--model_args` that is not a setting of the compression.

    Attributes:
        pretrained: a Hugging Face repository, a local folder, or `demo`.
        revision: branch, tag or commit of the repository.
        dtype: of weights and cache; `auto` is bfloat16 on CUDA and float32 elsewhere.
        device: `auto` is CUDA when there is one, else the CPU.
        device_map: accelerate's device map (`auto` spreads one model over several GPUs), or None.
        attn_implementation: attention of the prefill and the vision tower.
        trust_remote_code: run code from the repository.
        quantization: how weights are quantised while they are read (`QUANTIZATIONS`), or None.
        peft: folder or Hugging Face repository of a LoRA adapter for the checkpoint, or None.
        system_prompt: text, or a file that holds it; None for none.
        batch_size: prompts generated together (left padded).
        head_scores: `auto`, a file, `uniform`, `random`, `layer_mean` or `permuted`: for methods that need scores.
        foreign_head_scores: use a score file although it says that it was made for another model.
        min_pixels, max_pixels: limits to which images are resized, in some families; None leaves the checkpoint's own.
        compress_before_question: compress what ends with the last image before the question is seen.
        rounds: in tasks of many rounds, `append` each prompt to the conversation's cache, `recompress` that cache after
            it, or answer each prompt `independent`ly of those before, as the host's stock models do.
        skip_oom: leave documents out that do not fit into memory, counted and named, instead of stopping.
        max_num_frames: frames of a video at most.
        fps: frames of a video a second; None for as many as `max_num_frames` allows.
        enable_thinking: in some families, whether the chat template asks for thoughts; an answer is then what follows
            `</think>`, and empty where its tokens end before.
        cuda_graph: decode steps as one CUDA graph: `auto` where possible, `on` insists, `off` is transformers' loop.
    """

    pretrained: str
    revision: str = "main"
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    quantization: str | None = None
    peft: str | None = None
    system_prompt: str | None = None
    batch_size: int = 1
    head_scores: str = "auto"
    foreign_head_scores: bool = False
    min_pixels: int | None = None
    max_pixels: int | None = None
    compress_before_question: bool = False
    rounds: str = "append"
    skip_oom: bool = False
    max_num_frames: int = 32
    fps: float | None = None
    enable_thinking: bool | None = None
    cuda_graph: str = "auto"

    def __post_init__(self) -> None:
        words = {"dtype": DTYPES, "attn_implementation": ATTENTIONS, "rounds": ROUNDS, "cuda_graph": CUDA_GRAPHS}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(unknown_name(name, getattr(self, name), known))
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(unknown_name("quantization", self.quantization, tuple(QUANTIZATIONS)))
        for name in ("batch_size", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.max_num_frames < 2:
            raise ValueError(f"max_num_frames={self.max_num_frames} must be at least 2: two frames make one patch.")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"fps={self.fps} must be larger than 0.")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must not exceed max_pixels={self.max_pixels}.")

    @property
    def is_demo(self) -> bool:
        return self.pretrained == DEMO


def parse_arguments(text: str) -> dict[str, str]:
    """The `name=value,name=value` of `--model_args`, every value as the string that was given.

    A comma starts the next argument if a name and `=` follow it; else it belongs to the value before it, as in
    `system_prompt=Look, then answer` or `device_map={"a": 0, "b": 1}`. Quotes and brackets are characters like others.

    >>> parse_arguments("revision=0123456,system_prompt=Don't guess, look,budget=64")
    {'revision': '0123456', 'system_prompt': "Don't guess, look", 'budget': '64'}

    Raises:
        ValueError: one sentence for a text that does not start with a name, an empty value, and a name that is given
            twice or is not for the command line.
    """
    found: dict[str, str] = {}
    for piece in filter(None, map(str.strip, re.split(r",(?=\s*[A-Za-z_][\w-]*\s*=)", text))):
        match = re.match(r"([A-Za-z_][\w-]*)\s*=", piece)
        if match is None:
            raise ValueError(f"--model_args {shown(text)} is not of the form name=value,name=value.")
        name, value = match[1], piece[match.end() :].strip().rstrip(",").rstrip()
        if name in RESERVED:
            raise ValueError(f"--model_args cannot set {name!r} ({name}={cut(value)}); leave it out.")
        if name in found:
            raise ValueError(
                f"--model_args gives {name} twice ({name}={cut(found[name])} and {name}={cut(value)}); give one."
            )
        if not value:
            raise ValueError(_empty(name))
        found[name] = value
    return found


def split_arguments(
    family: Family, method: str, given: dict[str, Any], lmms_eval: bool = True, name_of_model: str | None = None
) -> tuple[RunOptions, CompressionConfig]:
    """Check `given` and split it into the options of the run and the settings of the compression.

    Values may be strings as a command line has them; None and "None" mean "not given", an empty string is refused.

    Args:
        lmms_eval: whether what is not given is as in that host's stock model of the family.
        name_of_model: the registered name, for sentences; None for `<family>_<method>`.

    Raises:
        ValueError: one sentence with the known arguments and the nearest, before anything is loaded.
    """
    name_of_model = name_of_model or f"{family.model_type}_{method}"
    if method == FREE:
        parts = {name: str(given.get(name) or default) for name, default in FREE_PARTS.items()}
        given = {name: value for name, value in given.items() if name not in parts}
        method = "+".join(parts.values())
    find_method(method)
    known_run = known_run_options(family, method)
    known_config = known_settings(method)
    run: dict[str, Any] = {}
    config: dict[str, Any] = {"method": method}
    for name, value in given.items():
        absent = value is None or str(value).strip().lower() == "none"
        if isinstance(value, str) and not value.strip() and name in known_run | known_config:
            raise ValueError(_empty(name))
        if name in known_run:
            run |= {name: None} if absent and name == "system_prompt" else {} if absent else {name: value}
        elif name in known_config:
            config |= {} if absent else {name: value}
        else:
            raise ValueError(_refusal(name_of_model, name, sorted(known_run | known_config)))
    options, compression = _run_options(family, run, lmms_eval), CompressionConfig.from_dict(config)
    if compression.chunk and options.compress_before_question:
        raise ValueError(
            f"max_cache={compression.max_cache} compacts the cache of a prompt that is read at once, which "
            "compress_before_question=true does not; leave one of the two out."
        )
    return options, compression


def known_run_options(family: Family, method: str) -> set[str]:
    """Names of the options of a run that mean something for this family and method."""
    names = {field.name for field in dataclasses.fields(RunOptions)}
    if family.lmms_eval.pixel_limits is None:
        names -= {"min_pixels", "max_pixels"}
    if family.lmms_eval.enable_thinking is None:
        names -= {"enable_thinking"}
    if not family.reads_video:
        names -= {"max_num_frames", "fps"}
    if not find_method(method).needs_head_scores:
        names -= {"head_scores", "foreign_head_scores"}
    return names


def known_settings(method: str) -> set[str]:
    """Names of the settings of the compression that this method may be given.

    Settings that all methods share are accepted even where they have no effect (`budget` for fullkv), so that one
    line of arguments can run through all methods; `unused_settings` names them.
    """
    declarations = {**all_settings(), **CompressionConfig.settings_of(method)}
    own = find_method(method).settings
    return {name for name, known in declarations.items() if known.shared or name in own}


def unused_settings(method: str) -> tuple[str, ...]:
    """Settings and options that this method accepts but that have no effect on it."""
    parts = find_method(method)
    shared = {name for name, known in all_settings().items() if known.shared}
    unused = tuple(sorted(shared - set(parts.settings)))
    if not parts.compresses:
        unused += ("budget", "window_size", "redistribute", "max_cache", "compact_by", "compress_before_question")
    return unused if parts.uses_seed else (*unused, "seed")


def _run_options(family: Family, run: dict[str, Any], lmms_eval: bool) -> RunOptions:
    run.setdefault("pretrained", family.pretrained)
    if lmms_eval and run["pretrained"] != DEMO:  # a demo model brings its own prompt and image sizes
        run.setdefault("system_prompt", family.lmms_eval.system_prompt)
        if family.lmms_eval.pixel_limits is not None:
            run.setdefault("min_pixels", family.lmms_eval.pixel_limits[0])
            run.setdefault("max_pixels", family.lmms_eval.pixel_limits[1])
        run.setdefault("enable_thinking", family.lmms_eval.enable_thinking)
        if family.lmms_eval.frame_limits is not None:
            run.setdefault("max_num_frames", family.lmms_eval.frame_limits.max_num_frames)
            run.setdefault("fps", family.lmms_eval.frame_limits.fps)
    kinds = {field.name: str(field.type).split(" ")[0] for field in dataclasses.fields(RunOptions)}
    for name, value in run.items():
        if value is not None:
            run[name] = parse_value(name, str(value) if kinds[name] == "str" else value, kinds[name])
    return RunOptions(**run)


def _empty(name: str) -> str:
    return f"{name}= is empty: give a value, or leave {name} out for its default."


def _either(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _refusal(model: str, name: str, known: list[str]) -> str:
    """The sentence for an argument that this model does not know."""
    knowing = [other for other, parts in METHODS.items() if name in parts.settings]
    if name == "head_scores":
        knowing = [other for other, parts in METHODS.items() if parts.needs_head_scores]
    if name in FREE_PARTS:
        knowing = [FREE]
    if knowing:
        return f"{model} has no argument {name!r}: it belongs to {', '.join(knowing)}."
    if name in ("min_pixels", "max_pixels"):
        resizing = [other for other, family in FAMILIES.items() if family.lmms_eval.pixel_limits]
        return f"{model} has no argument {name!r}: only {_either(resizing)} models resize images by pixel limits."
    if name in ("max_num_frames", "fps"):
        reading = [other for other, family in FAMILIES.items() if family.reads_video]
        return f"{model} has no argument {name!r}: only {_either(reading)} models read video."
    return unknown_name(f"argument of {model}", name, known)
