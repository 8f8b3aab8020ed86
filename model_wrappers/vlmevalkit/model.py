"""VLMEvalKit's models on compressed caches: `register()` puts them into `vlmeval.config.supported_VLM`.

A class is made for each family when the host is there: `CompressedVLM` in front, the host's stock class behind it,
whose prompts for each dataset, image handling and post-processing are used and whose constructor is not run. Importing
this module needs neither VLMEvalKit nor lmms-eval.
"""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from loguru import logger
from PIL import Image

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.families import FAMILIES, VLMEvalKit
from sparsemm_lmms.methods import find_method
from sparsemm_lmms.model_wrappers.arguments import DEMO, RunOptions, split_arguments
from sparsemm_lmms.model_wrappers.compressed import CompressedModel
from sparsemm_lmms.model_wrappers.engine import Batch, Engine, Prompt
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.loading import resolve_device
from sparsemm_lmms.model_wrappers.vlmevalkit.names import BASES, listed_names, name_suffix, parse_name, telling_settings
from sparsemm_lmms.model_wrappers.vlmevalkit.stock import bare, extracted, written_prompt
from sparsemm_lmms.session import compress
from sparsemm_lmms.settings import parse_value, unknown_name

GENERATIONS = ("greedy", "stock")
TOLD = (
    *("dtype", "attn_implementation", "quantization", "peft"),
    *("compress_before_question", "system_prompt", "head_scores"),
)
"""Options of a run that a name must tell."""
ENGINES = ("use_vllm", "use_lmdeploy", "version", "presence_penalty", "use_audio_in_video")
"""Arguments in the host's entries of checkpoints that choose between engines of its own, or are for those only."""
SAMPLING = {*GenerationSettings.__dataclass_fields__, "do_sample"} - {"max_new_tokens"}
"""Arguments there that are for `generate`."""
NOT_TOLD = ("pretrained", "revision", "device", "device_map", "trust_remote_code", "cuda_graph", "foreign_head_scores")
"""Those that it need not: the checkpoint is the name's first word, the others do not change answers. All further
options of `RunOptions` mean nothing here: the host asks one question at a time and its datasets choose the frames."""


@dataclass(frozen=True)
class HostOptions:
    """Settings that the host's stock classes have beside ours.

    Attributes:
        max_new_tokens: length of an answer at most.
        generation: `greedy`, or `stock` for what the stock class passes to `generate`.
        use_custom_prompt: the family's own prompts where the stock class has them; else the dataset's.
        min_pixels, max_pixels: limits to which the host resizes images, or None for those of its tools.
    """

    max_new_tokens: int
    generation: str = "greedy"
    use_custom_prompt: bool = True
    min_pixels: int | None = None
    max_pixels: int | None = None

    @classmethod
    def split(cls, given: dict[str, Any], max_new_tokens: int, pixels: bool) -> tuple[HostOptions, dict[str, Any]]:
        """(these options, the rest of `given`); pixel limits only where `pixels`, `max_new_tokens` unless given."""
        kinds = {field.name: str(field.type).split(" ")[0] for field in dataclasses.fields(cls)}
        if not pixels:
            del kinds["min_pixels"], kinds["max_pixels"]
        own = {
            name: parse_value(name, given[name], kind) for name, kind in kinds.items() if given.get(name) is not None
        }
        return cls(**{"max_new_tokens": max_new_tokens, **own}), {
            name: value for name, value in given.items() if name not in kinds
        }

    def __post_init__(self) -> None:
        if self.generation not in GENERATIONS:
            raise ValueError(unknown_name("generation", self.generation, GENERATIONS))
        for name in ("max_new_tokens", "min_pixels", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} must not exceed max_pixels={self.max_pixels}.")


class Record(dict):
    """An answer for the host: `prediction` and, in `extra_records`, what the KV cache held.

    The host's image datasets write both; its video datasets, and image datasets of which some answers failed, write
    `str(answer)`: that is the prediction, too.
    """

    def __str__(self) -> str:
        return self["prediction"]


class CompressedVLM(CompressedModel):
    """Our half of the classes for the host; `model_class` puts it in front of a stock class of the host.

    Args:
        method: one of `sparsemm_lmms.presets.METHODS`, or `SCORER+ALLOCATOR`.
        given: settings of the compression, of the run and of the host (`CompressionConfig`, `RunOptions`,
            `HostOptions`).
        sampling: what the host's entry of the checkpoint passes to `generate`, for `generation=stock`.

    Attributes:
        stock: the host's class.
        adapter: what the family says of it.
    """

    stock: ClassVar[type]
    adapter: ClassVar[VLMEvalKit]

    def __init__(self, method: str = "sparsemm", sampling: Mapping[str, Any] | None = None, **given: Any) -> None:
        self.dump_image_func: Any = None  # what the stock class's base sets; its own constructor loads the model
        self.method = method
        self.sampling = sampling or {}
        self.host, self.options, self.compression = self.check(method, given)
        checkpoint = self.load(resolve_device(self.options))
        self.processor = checkpoint.processor
        self.engine = Engine(
            checkpoint,
            compress_before_question=self.options.compress_before_question,
            cuda_graph=self.options.cuda_graph,
        )
        self.use_stock_attributes()
        self.writer = bare(self.stock, self.stock_attributes) if self.adapter.writes_prompts else None
        entered = ExitStack()
        self.session = entered.enter_context(compress(self.model, self.compression, self.head_scores))
        weakref.finalize(self, entered.close)  # model and session refer to each other: let go of the weights at once
        self.told = self.settings()
        logger.info(f"Settings: {self.told}")
        if self.adapter.stock is None:
            logger.info(f"VLMEvalKit has no class for {self.family.model_type} models: prompts are the datasets' own.")

    @classmethod
    def check(cls, method: str, given: dict[str, Any]) -> tuple[HostOptions, RunOptions, CompressionConfig]:
        """The settings, checked without loading anything.

        Raises:
            ValueError: one sentence.
        """
        find_method(method)
        pixels = cls.family.lmms_eval.pixel_limits is not None
        host, rest = HostOptions.split(given, cls.adapter.max_new_tokens, pixels)
        for name in {field.name for field in dataclasses.fields(RunOptions)} - {*TOLD, *NOT_TOLD}:
            if rest.get(name) is not None:
                model = f"{cls.family.model_type}_{method}"
                raise ValueError(f"{model} has no argument {name!r} in VLMEvalKit; leave it out.")
        options, compression = split_arguments(cls.family, method, rest, lmms_eval=False)
        if cls.adapter.writes_turns and options.system_prompt is not None:
            raise ValueError(f"system_prompt has no place in the prompts of {cls.adapter.stock}; leave it out.")
        return host, options, compression

    @classmethod
    def name_suffix(cls, method: str, given: dict[str, Any]) -> str:
        """`<method>_b<budget>...`: how a name must end that states these settings."""
        host, options, compression = cls.check(method, given)
        usual = HostOptions(cls.adapter.max_new_tokens)
        others = [(f.name, getattr(host, f.name), getattr(usual, f.name)) for f in dataclasses.fields(host)]
        others += [(f.name, getattr(options, f.name), f.default) for f in dataclasses.fields(options) if f.name in TOLD]
        return name_suffix(method, telling_settings(method, compression, others))

    def settings(self) -> dict[str, Any]:
        meaningless = {field.name for field in dataclasses.fields(RunOptions)} - {*TOLD, *NOT_TOLD}
        ours = {name: value for name, value in super().settings().items() if name not in meaningless}
        return {**ours, **dataclasses.asdict(self.host)}

    @property
    def stock_attributes(self) -> dict[str, Any]:
        """What methods of the stock class read from the object."""
        limits = {}
        if self.family.lmms_eval.pixel_limits is not None:
            limits = {"min_pixels": self.host.min_pixels, "max_pixels": self.host.max_pixels}
        return {"_use_custom_prompt": self.host.use_custom_prompt, "kwargs": {}, **limits, **self.adapter.attributes}

    def use_stock_attributes(self) -> None:
        for name, value in self.stock_attributes.items():
            setattr(self, name, value)

    def use_custom_prompt(self, dataset: str) -> bool:
        return self.host.use_custom_prompt and super().use_custom_prompt(dataset)  # type: ignore[misc]

    # -- answers -------------------------------------------------------------------------------------------------------

    def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> Record:
        """One question, as the host's datasets or `build_prompt` made it.

        Without an image it needs no marks, on which some stock classes insist: the chat template writes it.
        """
        has_image = any(part["type"] == "image" for part in message)
        if self.writer is None or not (has_image or self.adapter.writes_turns):
            prompt = self._conversation([{"role": "user", "content": message}], dataset)
        else:
            self._check_media(message)
            prompt = written_prompt(self.writer, self.processor, message, dataset, self.options.system_prompt)
        batch = self._answer(prompt, dataset)
        return Record(prediction=batch.answers[0].text, extra_records=kv_record(batch, self.told))

    def chat_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
        """The next answer of a conversation, which is read and compressed anew."""
        return self._answer(self._conversation(message, dataset), dataset).answers[0].text

    def chat(self, messages: list[dict[str, Any]], dataset: str | None = None) -> str:
        """As the host's, which after any error would ask again without the first turns, whatever the error was."""
        turns = [{**turn, "content": self.preproc_content(turn["content"])} for turn in messages]  # type: ignore[attr-defined]
        return self.chat_inner(turns, dataset)

    def _conversation(self, turns: list[dict[str, Any]], dataset: str | None) -> Prompt:
        """The turns in the checkpoint's chat template."""
        messages = [{"role": turn["role"], "content": self.content(turn["content"], dataset)} for turn in turns]
        if system_prompt := self.options.system_prompt or self.adapter.attributes.get("system_prompt"):
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return Prompt(text, *self.media(messages))

    def _answer(self, prompt: Prompt, dataset: str | None) -> Batch:
        if self.adapter.image_settings is not None and prompt.images:
            for name, value in self.adapter.image_settings(self.writer, dataset, len(prompt.images)).items():
                setattr(self.processor.image_processor, name, value)
        batch = self.engine.answer(self.session, [prompt], self._generation_settings())
        answer = batch.answers[0]
        answer = dataclasses.replace(answer, text=self.post_process(prompt.text, answer.text, dataset))
        return dataclasses.replace(batch, answers=[answer])

    def _generation_settings(self) -> GenerationSettings:
        """Greedy, or what the stock class passes to `generate` for this checkpoint unless told otherwise."""
        stock = {}
        if self.host.generation == "stock":
            parameters = inspect.signature(self.stock).parameters
            stock = {name: parameters[name].default for name in SAMPLING & set(parameters)} | dict(self.sampling)
        return GenerationSettings.from_host(stock | {"max_new_tokens": self.host.max_new_tokens}, 1)

    # -- what differs between families ---------------------------------------------------------------------------------

    def content(self, message: list[dict[str, Any]], dataset: str | None) -> list[dict[str, Any]]:
        """The host's parts (`type`, `value`) as parts of the chat template."""
        self._check_media(message)
        if self.adapter.prepares_content:
            return self._prepare_content(message, dataset=dataset)  # type: ignore[attr-defined]
        return [{"type": part["type"], part["type"]: part["value"]} for part in message]

    def _check_media(self, message: list[dict[str, Any]]) -> None:
        video = self.family.reads_video and self.adapter.reads_video
        known = {"text", "image", *(("video",) if video else ())}
        if others := {part["type"] for part in message} - known:
            reads = "text, images and video" if video else "text and images"
            told = f"{self.family.model_type} models read {reads} only in VLMEvalKit; this dataset sends {min(others)}."
            raise NotImplementedError(told)

    def media(self, messages: list[dict[str, Any]]) -> tuple[list[Any], Sequence[Any]]:
        """The images and videos of the messages, as the processor takes them."""
        if self.adapter.prepares_content:
            from qwen_vl_utils import process_vision_info  # a requirement of both hosts

            patch = self.processor.image_processor.patch_size
            images, videos = process_vision_info(messages, image_patch_size=patch)
            return images or [], videos or []
        parts = [part for message in messages for part in message["content"] if part["type"] == "image"]
        return [Image.open(part["image"]).convert("RGB") for part in parts], ()

    def post_process(self, prompt: str, answer: str, dataset: str | None = None) -> str:
        """The answer as the stock class leaves it.

        Where it looks for the answer in the whole text, what stands behind its template's mark.
        """
        if self.adapter.cuts_answers:
            finds_answer = not self.output_process(prompt)  # type: ignore[attr-defined]
            return self.output_process(prompt + answer) if finds_answer else answer.strip()  # type: ignore[attr-defined]
        if self.adapter.extracts_answers is not None:
            return extracted(getattr(self, self.adapter.extracts_answers), answer, dataset)
        return answer.strip() if self.adapter.strips_answers else answer


def register(names: Iterable[str] = (), score_files: Mapping[str, str] | None = None) -> list[str]:
    """Add our models to `vlmeval.config.supported_VLM`, and our classes to `vlmeval.vlm` for `--config` files.

    Args:
        names: any further names to resolve, for example `Qwen2VL-7B-Instruct_snapkv_b96_w16`.
        score_files: files of head scores that names refer to by `hs-<hash>`, as `hash_scores` returns them.

    Returns:
        The names that were added; checkpoints that this VLMEvalKit does not know are left out.

    Raises:
        ValueError: one sentence for a name that cannot be resolved.
    """
    from vlmeval.config import supported_VLM

    files = score_files or {}
    entries: dict[str, partial] = {}
    for name in listed_names():
        base = BASES[name.partition("_")[0]]
        if base.stock is None or base.stock in supported_VLM:
            entries[name] = _entry(name, files, supported_VLM)
    entries |= {name: _entry(name, files, supported_VLM) for name in names}
    added = {name: entry for name, entry in entries.items() if name not in supported_VLM}
    supported_VLM.update(added)
    return list(added)


def model_class(family: str, name: str | None = None) -> type[CompressedVLM]:
    """Our class of this family in the host, made and put into `vlmeval.vlm` the first time.

    Args:
        name: which of the family's classes; the first unless told.
    """
    from vlmeval import vlm

    adapters = {adapter.name: adapter for adapter in getattr(FAMILIES[family].vlmevalkit, "adapters", ())}
    if not adapters:
        raise ValueError(f"The family {family} has no model in VLMEvalKit.")
    name = name or next(iter(adapters))
    if not hasattr(vlm, name):
        stock = adapters[name].stock or "BaseModel"
        if not hasattr(vlm, stock):
            raise ValueError(f"This VLMEvalKit has no class {stock!r}, which {family} needs.")
        behind = getattr(vlm, stock)
        members = {
            "__module__": __name__,
            "__doc__": f"{stock} on a compressed cache.",
            "family": FAMILIES[family],
            "adapter": adapters[name],
            "stock": behind,
        }
        setattr(vlm, name, type(name, (CompressedVLM, behind), members))
    return getattr(vlm, name)


def kv_record(batch: Batch, settings: dict[str, Any]) -> dict[str, Any]:
    """What the cache of one answer held; bytes, tokens per kv head, milliseconds."""
    answer = batch.answers[0]
    return {
        "prompt_tokens": answer.prompt_tokens,
        "output_tokens": answer.output_tokens,
        "kept_tokens": round(answer.kept_tokens, 4),
        "nominal_budget": batch.nominal_budget,
        "kv_bytes": batch.kv_bytes,
        "kv_bytes_used": batch.kv_bytes_used,
        "kv_bytes_full": batch.kv_bytes_full,
        "ttft_ms": round(1000 * batch.ttft, 3),
        "tpot_ms": None if batch.tpot is None else round(1000 * batch.tpot, 3),
        "dtype": settings["dtype"],
        "head_scores": (settings["head_scores"] or {}).get("sha256"),
    }


def _entry(name: str, files: Mapping[str, str], supported: dict) -> partial:
    """What `supported_VLM` holds for this name: our class with its arguments, those of the stock entry included."""
    base, method, settings = parse_name(name, files)
    arguments: dict[str, Any] = {}
    if base.stock is not None:
        if base.stock not in supported:
            raise ValueError(f"This VLMEvalKit has no model {base.stock!r}, from which {name!r} takes its checkpoint.")
        arguments = {name: value for name, value in supported[base.stock].keywords.items() if name not in ENGINES}
        arguments["pretrained"] = arguments.pop("model_path")
    if base.stock is None or base.repository is not None:
        arguments["pretrained"] = base.repository or DEMO
    if base.spread:
        arguments["device_map"] = "auto"
    sampling = {name: arguments.pop(name) for name in sorted(SAMPLING & set(arguments))}
    cls = model_class(base.family, base.adapter.name)
    cls.check(method, arguments | settings)
    return partial(cls, method=method, **({"sampling": sampling} if sampling else {}), **arguments | settings)
