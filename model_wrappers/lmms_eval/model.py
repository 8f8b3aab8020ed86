"""lmms-eval's chat model on a compressed cache.

The classes that the manifest names (one for each family and method) are made when the host asks this module for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from accelerate import Accelerator, DistributedType
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm
from transformers import BatchFeature

from sparsemm_lmms.families import ANY, FAMILIES
from sparsemm_lmms.model_wrappers.arguments import parse_arguments, unused_settings
from sparsemm_lmms.model_wrappers.compressed import CompressedModel
from sparsemm_lmms.model_wrappers.engine import Engine, Prompt
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.likelihood import Document, read_document, score
from sparsemm_lmms.model_wrappers.lmms_eval import requests as host_requests
from sparsemm_lmms.model_wrappers.lmms_eval.endings import ends_the_command
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import CLASSES, FOUND
from sparsemm_lmms.model_wrappers.lmms_eval.patches import install
from sparsemm_lmms.model_wrappers.lmms_eval.statistics import CacheTokenCounts, RunStatistics
from sparsemm_lmms.model_wrappers.loading import Checkpoint, resolve_device
from sparsemm_lmms.model_wrappers.media import sampling_of
from sparsemm_lmms.model_wrappers.memory import MemoryGuard
from sparsemm_lmms.model_wrappers.rounds import converse
from sparsemm_lmms.session import CompressionSession, compress

T = TypeVar("T", bound="CompressedChatModel")


class CompressedChatModel(CompressedModel, lmms):
    """A vision-language model whose KV cache is compressed by `method`.

    Subclasses add `method` and `family`, or find that of their checkpoint. All arguments are checked before anything is
    loaded; see `RunOptions` and `CompressionConfig` for what they mean. `checkpoint` is one that another model of this
    family has loaded: many settings can share it.
    """

    is_simple = False

    def __init__(self, /, max_batch_size: Any = None, checkpoint: Checkpoint | None = None, **model_args: Any) -> None:
        super().__init__()
        install(CompressedChatModel)
        self.statistics: list[RunStatistics] = []
        self._ignored: set[str] = set()
        del max_batch_size  # the host's, for automatic batch sizes, which `batch_size` refuses
        self.configure(model_args)
        if self.any_checkpoint:
            FOUND[self.registered_name] = self.family.lmms_eval.prompts_of  # tasks are built behind the model
        self.accelerator = _accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = resolve_device(self.options, self.accelerator)
        checkpoint = self.load(device, progress=self.rank == 0, checkpoint=checkpoint)
        self.config = checkpoint.model.config  # the host asks for it after `clean` too
        prompt = self.options.system_prompt
        self.system_prompt = self._resolve_system_prompt(prompt.replace("\\n", "\n")) if prompt else None
        options = self.options
        self.engine: Engine | None = Engine(
            checkpoint,
            self.system_prompt,
            self.family.lmms_eval.strip_answers,
            options.compress_before_question,
            sampling_of(self.family, options, checkpoint.processor),
            options.cuda_graph,
            options.enable_thinking,
        )
        self._announce(model_args)

    @classmethod
    @ends_the_command()
    def create_from_arg_string(cls: type[T], arg_string: str, additional_config: dict | None = None) -> T:
        """As the host's, but values stay the strings that were given; `parse_arguments` says how they are read.

        `batch_size` may be given there too; the host passes its own `--batch_size` (default 1) beside it.
        """
        args = parse_arguments(arg_string)
        host = {name: value for name, value in (additional_config or {}).items() if value is not None}
        for name in set(args) & set(host):
            if str(args[name]) != str(host[name]) and (name, str(host[name])) != ("batch_size", "1"):
                raise ValueError(f"{name}={args[name]} in --model_args contradicts --{name} {host[name]}; give one.")
        return cls(**{**host, **args})

    # -- what the host reads -------------------------------------------------------------------------------------------

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
        engine = self._working_engine()
        results: dict[int, GenerationResult] = {}
        with self._running(requests, self.options.skip_oom) as (session, statistics, guard, bar):

            def answer(picked: Sequence[tuple[int, Prompt]]) -> None:
                asked, prompts = [requests[i] for i, _ in picked], [prompt for _, prompt in picked]
                with host_requests.naming(asked, "cannot be answered"):
                    inputs = self._inputs(engine, asked, prompts)
                    batch = engine.answer(session, prompts, self._generation(asked[0]), inputs)
                statistics.add(batch, [not host_requests.is_padding(request) for request in asked])
                for (i, prompt), reply in zip(picked, batch.answers, strict=True):
                    results[i] = GenerationResult(reply.text, CacheTokenCounts.of(reply, batch))
                    self.cache_hook.add_partial("generate_until", (prompt.text, requests[i].args[2]), reply.text)

            def load(i: int) -> Prompt:
                with host_requests.naming([requests[i]]):
                    return engine.prompt(host_requests.conversation(requests[i], self.task_dict))

            def size(i: int, prompt: Prompt) -> int:
                with host_requests.naming([requests[i]]):
                    return engine.size(prompt)

            rows = engine.at_once(session, self.batch_size)
            for group in host_requests.by_settings(requests):
                for picked in host_requests.by_size(group, load, size, rows):
                    guard(picked, answer)
                    bar.update(len(picked))
            results |= {i: GenerationResult("") for i in guard.skipped}
        return [results[i] for i in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(loss, is_greedy) of each request, in their order; `likelihood` says what is scored.

        The host asks once for each answer of a document; those with the same context share its prefill.
        """
        engine = self._working_engine()
        results: dict[int, tuple[float, bool]] = {}
        groups = host_requests.by_context(requests)
        with self._running(requests) as (session, statistics, guard, bar):

            def answer(picked: Sequence[tuple[int, Document]]) -> None:
                asked, documents = [requests[i] for i, _ in picked], [document for _, document in picked]
                with host_requests.naming(asked, "cannot be scored"):
                    inputs = self._inputs(engine, asked, [document.prompt for document in documents])
                    found, batch = score(engine, session, documents, inputs)
                statistics.add(batch, [not host_requests.is_padding(requests[i]) for i, _ in picked])
                for (first, _), scores in zip(picked, found, strict=True):
                    for i, likelihood in zip(members[first], scores, strict=True):
                        results[i] = (likelihood.loss, likelihood.is_greedy)

            def load(first: int) -> Document:
                pairs = [host_requests.choice(requests[i], self.task_dict) for i in members[first]]
                with host_requests.naming([requests[first]]):
                    return read_document(engine, pairs[0][0], [text for _, text in pairs])

            def size(first: int, document: Document) -> int:
                with host_requests.naming([requests[first]]):
                    return engine.size(document.prompt)

            members = {group[0]: group for group in groups}
            rows = engine.at_once(session, self.batch_size, likelihood=True)
            for picked in host_requests.by_size(list(members), load, size, rows):
                guard(picked, answer)
                bar.update(sum(len(members[first]) for first, _ in picked))
        return [results[i] for i in range(len(requests))]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of every round of each request, one conversation at a time; see `RunOptions.rounds`."""
        engine, mode = self._working_engine(), self.options.rounds
        results: dict[int, list[str]] = {}
        if mode != "independent":
            self._say(
                f"Rounds are one conversation (rounds={mode}); lmms-eval's stock models answer each round without the "
                "others: rounds=independent.",
                "WARNING",
            )
        with self._running(requests) as (session, statistics, guard, bar):

            def answer(picked: Sequence[tuple[int, Instance]]) -> None:
                for i, request in picked:
                    talk = host_requests.rounds(request, self.task_dict)
                    with host_requests.naming([request], "cannot be answered"):
                        batches = list(converse(engine, session, talk, self._generation(request), mode))
                    for batch in batches:
                        statistics.add(batch, [not host_requests.is_padding(request)])
                    results[i] = [batch.answers[0].text for batch in batches]

            for i, request in enumerate(requests):
                guard([(i, request)], answer)
                bar.update()
        return [results[i] for i in range(len(requests))]

    @contextmanager
    def _running(
        self, requests: Sequence[Instance], skip_oom: bool = False
    ) -> Iterator[tuple[CompressionSession, RunStatistics, MemoryGuard, tqdm]]:
        """Compression, statistics, guard and progress bar of one call of the host."""
        statistics = RunStatistics.start(self.device)
        with (
            compress(self.model, self.compression, self.head_scores) as session,
            tqdm(total=len(requests), disable=self.rank != 0, desc="Model Responding") as bar,
        ):
            guard = MemoryGuard(session, lambda i: host_requests.describe(requests[i]), skip_oom)
            yield session, statistics, guard, bar
        statistics.skipped_oom = sum(not host_requests.is_padding(requests[i]) for i in guard.skipped)
        if guard.skipped:
            names = ", ".join(host_requests.describe(requests[i]) for i in guard.skipped)
            share = f"{len(guard.skipped)} of {len(requests)} requests"
            logger.warning(f"{share} did not fit into memory and count as empty answers: {names}.")
        self._log(statistics)

    @staticmethod
    def _inputs(engine: Engine, requests: Sequence[Instance], prompts: Sequence[Prompt]) -> BatchFeature:
        """What the processor makes of a batch; where it refuses, the document that it refuses is named."""
        try:
            return engine.batch_inputs(prompts)
        except Exception:
            for request, prompt in zip(requests, prompts, strict=True):
                with host_requests.naming([request], "cannot be processed"):
                    engine.batch_inputs([prompt])
            raise

    def _generation(self, request: Instance) -> GenerationSettings:
        """The generation settings of a request; what has no effect here is named once."""
        gen_kwargs = request.args[2] or {}
        if ignored := set(GenerationSettings.ignored(gen_kwargs)) - self._ignored:
            self._ignored |= ignored
            self._say(f"Generation arguments without effect on this model: {', '.join(sorted(ignored))}.", "WARNING")
        return GenerationSettings.from_host(gen_kwargs, self.family.lmms_eval.max_new_tokens)

    # -- records -------------------------------------------------------------------------------------------------------

    def _log(self, statistics: RunStatistics) -> None:
        """Keep what one call measured; at the end of a run the numbers of all calls and processes replace its log."""
        self.statistics.append(statistics)
        statistics.log()

    def _announce(self, model_args: dict[str, Any]) -> None:
        self._say(f"Settings: {json.dumps(self.settings(), default=str)}")
        if unused := [name for name in unused_settings(self.compression.method) if name in model_args]:
            self._say(f"{', '.join(unused)} without effect: {self.method} does not use it.", "WARNING")

    def _say(self, message: str, level: str = "INFO") -> None:
        if self.rank == 0:
            logger.opt(depth=1).log(level, message)

    def _working_engine(self) -> Engine:
        self._ready()
        assert self.engine is not None  # set and cleared together with the checkpoint
        return self.engine


def __getattr__(name: str) -> type[CompressedChatModel]:
    """The class of one family and method, by the name that the manifest states."""
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    family, method = CLASSES[name]
    members = {
        **({"any_checkpoint": True} if family == ANY else {"family": FAMILIES[family]}),
        "method": method,
        "__module__": __name__,
        "__doc__": f"{family}, {method}.",
    }
    globals()[name] = made = type(name, (CompressedChatModel,), members)
    return made


def _accelerator() -> Accelerator:
    accelerator = Accelerator()
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ValueError(
            f"{accelerator.distributed_type.value} splits the model; launch plain data parallel processes "
            "(`accelerate launch --num_processes N`) or use device_map=auto."
        )
    return accelerator
