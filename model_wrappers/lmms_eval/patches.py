"""Every place where lmms-eval is changed, with the reason. It has no hooks for any of this.

Read in lmms-eval 0.7.2 and 0.7.3, the newest; runs of other models pass through. A model of ours installs `PATCHES`
when it is made, for the rest of the process, because lmms-eval's own command makes it in the middle of its work;
`sparsemm-lmms eval`, `rerun` and sweeps do so for the time of their run (`patched`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lmms_eval.evaluator
from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
from lmms_eval.loggers.evaluation_tracker import EvaluationTracker

from sparsemm_lmms.model_wrappers.lmms_eval.manifest import stock_id
from sparsemm_lmms.model_wrappers.lmms_eval.recording import recorded
from sparsemm_lmms.model_wrappers.lmms_eval.requests import LIKELIHOOD_TASKS
from sparsemm_lmms.model_wrappers.lmms_eval.saving import save_results, save_samples
from sparsemm_lmms.reports.results import KEY


@dataclass(frozen=True)
class Patch:
    """A function of the host that ours runs around.

    Attributes:
        owner, name: where it stands.
        around: called as `around(original, *args, **kwargs)`; with the class of our models before, if `told`.
        upstream: what the host does by itself.
        reason: why that will not do.
        told: whether `around` is given the class of our models.
    """

    owner: Any
    name: str
    around: Callable[..., Any]
    upstream: str
    reason: str
    told: bool = False

    def install(self, kind: type) -> None:
        """Put it in place; once."""
        original = getattr(self.owner, self.name)
        if hasattr(original, KEY):
            return
        around = functools.partial(self.around, *([kind] if self.told else []), original)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return around(*args, **kwargs)

        setattr(wrapped, KEY, True)
        setattr(self.owner, self.name, wrapped)

    def remove(self) -> None:
        """Put the host's own function back."""
        setattr(self.owner, self.name, getattr(self.owner, self.name).__wrapped__)


def with_stock_prompts(original: Callable[..., Any], task: Any) -> None:
    """Look prompts up under the stock id of our model's family."""
    if isinstance(task.model_name, str):
        task.model_name = stock_id(task.model_name)
    original(task)


def with_likelihood(original: Callable[..., Any], task: ConfigurableTask, *args: Any, **kwargs: Any) -> Any:
    """Build the requests of likelihood tasks as the host does for its other models."""
    if task.OUTPUT_TYPE in LIKELIHOOD_TASKS:
        return ConfigurableTask.construct_requests(task, *args, **kwargs)
    return original(task, *args, **kwargs)


def keep_pairs(original: Callable[..., Any], output: Any) -> tuple[Any, Any]:
    """Leave a likelihood, (loss, is greedy), as it is."""
    if isinstance(output, (tuple, list)) and len(output) == 2 and isinstance(output[1], bool):
        return tuple(output), None  # a list where it comes from the response cache
    return original(output)


PATCHES = (
    Patch(
        ConfigurableTask,
        "_prepare_model_specific_config",
        with_stock_prompts,
        upstream="a task's prompts are looked up by the literal model name",
        reason="ours must be asked what the stock model of the family is asked",
    ),
    Patch(
        ConfigurableMessagesTask,
        "construct_requests",
        with_likelihood,
        upstream="requests of likelihood tasks are refused for every chat model",
        reason="they can be answered on a compressed cache",
    ),
    Patch(
        lmms_eval.evaluator,
        "unwrap_generation_output",
        keep_pairs,
        upstream="a pair is taken for an answer with its token counts",
        reason="a likelihood is a pair, too",
    ),
    Patch(
        lmms_eval.evaluator,
        "evaluate",
        recorded,
        upstream="the response cache is keyed by the text of the arguments, and results say no more than that",
        reason="what `auto` became, the content of score files, checkpoint, tasks and versions decide answers as well",
        told=True,
    ),
    Patch(
        EvaluationTracker,
        "save_results_aggregated",
        save_results,
        upstream="results lie in a folder named after the checkpoint, and a failed write is a line in the log",
        reason="runs of other settings would be mixed, and results lost with status 0",
    ),
    Patch(
        EvaluationTracker,
        "save_results_samples",
        save_samples,
        upstream="a failed write is a line in the log",
        reason="answers would be lost with status 0",
    ),
)


def install(kind: type) -> None:
    """Put all patches in place, once a process. `kind` is the class of our models."""
    for patch in PATCHES:
        patch.install(kind)


@contextmanager
def patched() -> Iterator[None]:
    """Leave the host as it was found: what models of ours install inside the block is removed at its end."""
    before = [hasattr(getattr(patch.owner, patch.name), KEY) for patch in PATCHES]
    try:
        yield
    finally:
        for patch, was_there in zip(PATCHES, before, strict=True):
            if not was_there and hasattr(getattr(patch.owner, patch.name), KEY):
                patch.remove()


@contextmanager
def the_command(host: Any, single: Callable[..., Any], manager: Callable[..., Any]) -> Iterator[None]:
    """lmms-eval's command line as `sparsemm-lmms eval` runs it, in `lmms_eval.__main__`.

    Args:
        single: in place of `cli_evaluate_single`, after whose failure the host goes on to the end with status 0: it
            notes results and failures.
        manager: in place of `TaskManager`: the host has one `--include_path`, and our tasks must be known beside the
            user's.

    `traceback` is silenced: the host prints one for a wrong word as well; those of bugs are printed by us.
    """

    class Silent:
        print_exc = staticmethod(lambda: None)

    with replaced(host, cli_evaluate_single=single, TaskManager=manager, traceback=Silent), patched():
        yield


@contextmanager
def replaced(module: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module that have other values inside the block."""
    before = {name: getattr(module, name) for name in values}
    try:
        for name, value in values.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
