"""lmms-eval's chat model on a compressed cache: what all families and methods share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, ClassVar, TypeVar

import torch
from accelerate import Accelerator, DistributedType
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import AutoProcessor, PreTrainedModel

from ..head_scores import HeadScores
from ..methods import METHODS
from ..scoring import resolve_head_scores
from ..session import compress
from .arguments import Family, known_settings, split_arguments, unused_settings
from .engine import Conversation, Engine
from .generation import GenerationSettings
from .loading import Checkpoint, checkpoint_path, load_checkpoint, read_config, resolve_device
from .names import class_name
from .statistics import CacheTokenCounts, RunStatistics, numeric_settings

T = TypeVar("T", bound="CompressedChatModel")
FROM_THE_MODEL = ("auto", "layer_mean", "permuted")  # head scores that may have to be found with the loaded model


class CompressedChatModel(lmms):
    """A vision-language model whose KV cache is compressed by `method`.

    Families subclass it with `family`; `method_variants` adds `method`. All arguments are checked before anything is
    loaded; see `RunOptions` and `CompressionConfig` for what they mean.
    """

    is_simple = False
    family: ClassVar[Family]
    method: ClassVar[str]

    def __init__(self, max_batch_size: Any = None, **model_args: Any) -> None:
        super().__init__()
        del max_batch_size  # the host's, for automatic batch sizes, which `batch_size` refuses
        self.options, self.compression = split_arguments(self.family, self.method, model_args)
        self.accelerator = _accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self._device = resolve_device(self.options, self.accelerator)
        self.checkpoint: Checkpoint | None = None
        config = read_config(self.family, self.options)
        needs_model = self.options.head_scores.partition(":")[0] in FROM_THE_MODEL
        scores = None if needs_model else self._read_head_scores(config)
        self.checkpoint = load_checkpoint(self.family, self.options, self._device)
        self.head_scores = self._read_head_scores(config) if needs_model else scores
        prompt = self.options.system_prompt
        self.system_prompt = self._resolve_system_prompt(prompt.replace("\\n", "\n")) if prompt else None
        self.engine: Engine | None = Engine(self.checkpoint, self.system_prompt, self.family.strip_answers)
        self._announce(model_args)

    @classmethod
    def create_from_arg_string(cls: type[T], arg_string: str, additional_config: dict | None = None) -> T:
        """As the host's, but with a sentence for `--model_args` that is no list of key=value.

        `batch_size` may be given there too; the host passes its own `--batch_size` (default 1) beside it.
        """
        try:
            args = utils.simple_parse_args_string(arg_string)
        except ValueError:
            raise ValueError(f"--model_args {arg_string!r} is not of the form name=value,name=value.") from None
        host = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in set(args) & set(host):
            if str(args[name]) != str(host[name]) and (name, str(host[name])) != ("batch_size", "1"):
                raise ValueError(f"{name}={args[name]} in --model_args contradicts --{name} {host[name]}; give one.")
        return cls(**{**host, **args})

    # -- what the host reads -------------------------------------------------------------------------------------------

    @property
    def model(self) -> PreTrainedModel:
        return self._ready().model

    @property
    def tokenizer(self) -> Any:
        return self._ready().processor.tokenizer

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    @property
    def device(self) -> torch.device:
        return self._device

    def settings(self) -> dict[str, Any]:
        """Everything that decides the answers, resolved: arguments, defaults and the identity of the head scores."""
        run = {name: value for name, value in vars(self.options).items() if name != "head_scores"}
        run |= {"device": str(self.device), "dtype": str(self.model.dtype).removeprefix("torch.")}
        scores = None
        if self.head_scores is not None:
            scores = {"source": self.options.head_scores, "sha256": self.head_scores.content_hash}
        used = known_settings(self.method) - set(unused_settings(self.method))
        compression = {name: value for name, value in self.compression.to_dict().items() if name in used}
        return {"model": f"{self.family.name}_{self.method}", **run, **compression, "head_scores": scores}

    def clean(self) -> None:
        """Give the weights and the caches back: the host calls this before scoring."""
        self.engine = self.checkpoint = None
        super().clean()

    # -- requests ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer the requests, in their order. Any exception aborts the run; no answer is made up."""
        engine, statistics = self._working_engine(), RunStatistics(self.device)
        results: list[GenerationResult | None] = [None] * len(requests)
        with (
            compress(self.model, self.compression, self.head_scores) as session,
            tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar,
        ):
            for picked, settings in self._batches(requests):
                batch = engine.generate(session, [self._conversation(requests[i]) for i in picked], settings)
                statistics.add(batch, [not _is_padding(requests[i]) for i in picked])
                for i, answer, prompt in zip(picked, batch.answers, batch.prompts, strict=True):
                    results[i] = GenerationResult(answer.text, CacheTokenCounts.of(answer))
                    self.cache_hook.add_partial("generate_until", (prompt, requests[i].args[2]), answer.text)
                bar.update(len(picked))
        self._log(statistics)
        return [result for result in results if result is not None]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            f"{self.family.name}_{self.method} answers by generation only so far; choose a task with output_type "
            "generate_until (most multiple-choice tasks of lmms-eval have one)."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            f"{self.family.name}_{self.method} answers single questions only so far; multi-round tasks need a stock "
            "model of lmms-eval."
        )

    def _batches(self, requests: list[Instance]) -> Iterator[tuple[list[int], GenerationSettings]]:
        """Indices of requests with the same generation settings, `batch_size` at a time."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(i)
        for group in groups.values():
            gen_kwargs = requests[group[0]].args[2] or {}
            settings = GenerationSettings.from_host(gen_kwargs, self.family.max_new_tokens)
            if ignored := GenerationSettings.ignored(gen_kwargs):
                self._say(f"Generation arguments without effect on this model: {', '.join(ignored)}.", "WARNING")
            for start in range(0, len(group), self.batch_size):
                yield group[start : start + self.batch_size], settings

    def _conversation(self, request: Instance) -> Conversation:
        _, doc_to_messages, _, doc_id, task, split = request.args
        try:
            return doc_to_messages(self.task_dict[task][split][doc_id])
        except Exception:
            logger.error(f"Document {doc_id} of task {task} ({split}) cannot be read.")  # the cause follows
            raise

    # -- records -------------------------------------------------------------------------------------------------------

    def _log(self, statistics: RunStatistics) -> None:
        if not statistics.answers:
            return
        tokens, seconds = statistics.output_tokens, statistics.elapsed
        numbers = {**statistics.metrics(), **numeric_settings(self.settings())}
        if self.head_scores is not None:  # the results JSON takes numbers only: 48 bits fit a double exactly
            numbers["head_scores_sha256_48bit"] = int(self.head_scores.content_hash[:12], 16)
        log_metrics(seconds, tokens, tokens / seconds if seconds > 0 else 0.0, additional_metrics=numbers)

    def _announce(self, model_args: dict[str, Any]) -> None:
        self._say(f"Settings: {json.dumps(self.settings(), default=str)}")
        if unused := [name for name in unused_settings(self.method) if name in model_args]:
            self._say(f"{', '.join(unused)} without effect: {self.method} does not use it.", "WARNING")

    def _say(self, message: str, level: str = "INFO") -> None:
        if self.rank == 0:
            logger.opt(depth=1).log(level, message)

    # -- loading -------------------------------------------------------------------------------------------------------

    def _read_head_scores(self, config: dict[str, Any]) -> HeadScores | None:
        """The scores of this model, or None for a method without. Finding them (`auto`) needs the loaded model."""
        if not METHODS[self.method].needs_head_scores:
            return None
        path, revision = checkpoint_path(self.family, self.options), self.options.revision
        loaded: dict[str, Any] = {}
        if self.checkpoint is not None:  # a processor of its own: pixel limits of this run must not shape kept scores
            loaded = {
                "model": self.checkpoint.model,
                "processor": AutoProcessor.from_pretrained(path, revision=revision),
            }
        return resolve_head_scores(
            self.options.head_scores,
            config,
            path,
            revision,
            seed=self.compression.seed,
            progress=self.rank == 0,
            **loaded,
        )

    def _ready(self) -> Checkpoint:
        if self.checkpoint is None:
            raise RuntimeError("This model was cleaned away after its evaluation; create a new one.")
        return self.checkpoint

    def _working_engine(self) -> Engine:
        self._ready()
        assert self.engine is not None  # set and cleared together with the checkpoint
        return self.engine


def method_variants(family_class: type[CompressedChatModel]) -> dict[str, type[CompressedChatModel]]:
    """One subclass of the family for each method, by name: the classes that the manifests point at."""
    variants = {}
    for method in METHODS:
        name = class_name(family_class.__name__, method)
        members = {
            "method": method,
            "__module__": family_class.__module__,
            "__doc__": f"{family_class.__name__}, {method}.",
        }
        variants[name] = type(name, (family_class,), members)
    return variants


def _accelerator() -> Accelerator:
    accelerator = Accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{accelerator.distributed_type.value} splits the model; launch plain data parallel processes "
            "(`accelerate launch --num_processes N`) or use device_map=auto."
        )
    return accelerator


def _is_padding(request: Instance) -> bool:
    return bool((request.metadata or {}).get("__padding_only__"))
