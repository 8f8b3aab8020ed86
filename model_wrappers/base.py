"""lmms-eval's chat model on a compressed cache: what all families and methods share."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TypeVar

from accelerate import Accelerator, DistributedType
from lmms_eval import utils
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from ..methods import METHODS
from ..session import compress
from .arguments import unused_settings
from .compressed import CompressedModel
from .engine import Conversation, Engine
from .generation import GenerationSettings
from .host import install
from .loading import resolve_device
from .names import class_name
from .statistics import CacheTokenCounts, RunStatistics

T = TypeVar("T", bound="CompressedChatModel")


class CompressedChatModel(CompressedModel, lmms):
    """A vision-language model whose KV cache is compressed by `method`.

    Families subclass it with `family`; `method_variants` adds `method`. All arguments are checked before anything is
    loaded; see `RunOptions` and `CompressionConfig` for what they mean.
    """

    is_simple = False

    def __init__(self, max_batch_size: Any = None, **model_args: Any) -> None:
        super().__init__()
        install(CompressedChatModel)
        self.statistics: list[RunStatistics] = []
        del max_batch_size  # the host's, for automatic batch sizes, which `batch_size` refuses
        self.configure(model_args)
        self.accelerator = _accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        checkpoint = self.load(resolve_device(self.options, self.accelerator), progress=self.rank == 0)
        prompt = self.options.system_prompt
        self.system_prompt = self._resolve_system_prompt(prompt.replace("\\n", "\n")) if prompt else None
        self.engine: Engine | None = Engine(checkpoint, self.system_prompt, self.family.strip_answers)
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
    def config(self) -> Any:
        return self.model.config

    @property
    def batch_size(self) -> int:
        return self.options.batch_size

    def clean(self) -> None:
        """Give the weights and the caches back: the host calls this before scoring."""
        self.engine = self.checkpoint = None
        super().clean()

    # -- requests ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer the requests, in their order. Any exception aborts the run; no answer is made up."""
        engine, statistics = self._working_engine(), RunStatistics.start(self.device)
        results: list[GenerationResult | None] = [None] * len(requests)
        with (
            compress(self.model, self.compression, self.head_scores) as session,
            tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar,
        ):
            for picked, settings in self._batches(requests):
                batch = engine.generate(session, [self._conversation(requests[i]) for i in picked], settings)
                statistics.add(batch, [not _is_padding(requests[i]) for i in picked])
                for i, answer, prompt in zip(picked, batch.answers, batch.prompts, strict=True):
                    results[i] = GenerationResult(answer.text, CacheTokenCounts.of(answer, batch))
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
        """Keep what one call measured; at the end of a run the numbers of all calls and processes replace its log."""
        self.statistics.append(statistics)
        statistics.log()

    def _announce(self, model_args: dict[str, Any]) -> None:
        self._say(f"Settings: {json.dumps(self.settings(), default=str)}")
        if unused := [name for name in unused_settings(self.method) if name in model_args]:
            self._say(f"{', '.join(unused)} without effect: {self.method} does not use it.", "WARNING")

    def _say(self, message: str, level: str = "INFO") -> None:
        if self.rank == 0:
            logger.opt(depth=1).log(level, message)

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
