"""Runs the cells of a sweep with lmms-eval's own evaluator, on weights and tasks that are loaded once for each model.

A cell's record appears whole when the cell is done, so a sweep goes on wherever it was stopped. Several processes may
work on one sweep, each on a GPU of its own: a cell is run by the process that holds its lock, which a kill releases.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from filelock import FileLock, Timeout
from lmms_eval import __main__ as host
from lmms_eval.api.task import Task
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger

from sparsemm_lmms.cli import tasks_folder
from sparsemm_lmms.model_wrappers.lmms_eval.commands import metrics
from sparsemm_lmms.model_wrappers.lmms_eval.patches import patched, replaced
from sparsemm_lmms.model_wrappers.sweeps.cells import Cell, SweptModel
from sparsemm_lmms.model_wrappers.sweeps.plan import Plan
from sparsemm_lmms.reports.results import KEY
from sparsemm_lmms.reports.store import CellRecord, Sample, forget_cell, read_cell, write_cell

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
NO_METRICS = frozenset(
    "doc_id doc target arguments resps filtered_resps token_counts doc_hash input_media submission".split() + [KEY]
)
"""What lmms-eval's line of a sample holds besides the metrics of its task."""
POLL_SECONDS = 2.0


class Watcher(Protocol):
    """Is told how a sweep goes."""

    def loading(self, model: SweptModel) -> None: ...

    def starting(self, cell: Cell) -> None: ...

    def finished(self, record: CellRecord) -> None: ...


def complete(sweep: Path, cell: Cell) -> CellRecord | None:
    """The record of a cell that need not run: a failed one runs again."""
    folder = sweep / "cells" / cell.name
    record = read_cell(folder) if (folder / "cell.json").exists() else None
    return record if record is not None and record.error is None else None


@patched()
def run(plan: Plan, sweep: Path, watcher: Watcher) -> None:
    """Run all cells that are not complete. A cell that fails is recorded with its error, and the next one runs.

    Raises:
        OSError: when a record cannot be written, or the disk is full; what is complete stays.
    """
    for model in plan.models:
        left = [cell for cell in plan.cells if cell.model == model and not complete(sweep, cell)]
        if not left:
            continue
        watcher.loading(model)
        try:
            loaded = LoadedModel(model, plan)
        except Exception as error:
            _raise_disk_full(error)
            logger.exception(f"{model.label} cannot be loaded.")
            for cell in left:
                _keep(sweep, failed(cell, error), watcher)
            continue
        while left:
            left = [cell for cell in left if not _run_unless_taken(loaded, cell, sweep, watcher)]
            if left:  # another process works on these
                time.sleep(POLL_SECONDS)
        del loaded
        gc.unfreeze()


def _run_unless_taken(loaded: LoadedModel, cell: Cell, sweep: Path, watcher: Watcher) -> bool:
    """Run a cell, or return False where another process holds its lock."""
    locks = sweep / ".locks"
    locks.mkdir(exist_ok=True)
    try:
        with FileLock(locks / f"{cell.name}.lock", timeout=0):
            record = complete(sweep, cell)
            if record is not None:  # another process was faster
                watcher.finished(record)
            else:
                forget_cell(sweep, cell.name)
                watcher.starting(cell)
                _keep(sweep, _attempt(loaded, cell, sweep / "cells" / cell.name), watcher)
            return True
    except Timeout:
        return False


def _attempt(loaded: LoadedModel, cell: Cell, folder: Path) -> CellRecord:
    started = time.perf_counter()
    try:
        return loaded.evaluate(cell, folder)
    except Exception as error:
        _raise_disk_full(error)
        logger.exception(f"{cell.name} failed.")
        return failed(cell, error, time.perf_counter() - started)


def _keep(sweep: Path, record: CellRecord, watcher: Watcher) -> None:
    write_cell(sweep, record)
    watcher.finished(record)


def failed(cell: Cell, error: Exception, seconds: float = 0.0) -> CellRecord:
    """The record of a cell that stopped with an error."""
    reason = f"{type(error).__name__}: {error}".strip()
    return _record(cell, {}, {}, {}, {}, seconds, (), error=reason)


def _raise_disk_full(error: BaseException) -> None:
    """Stop the sweep where an error comes from a full disk: the next cells would fail alike."""
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError) and link.errno in DISK_FULL:
            raise link
        link = link.__cause__ or link.__context__


class LoadedModel:
    """A checkpoint and the task objects of a sweep, for all cells of one model.

    The host forgets a model after each evaluation, so every cell gets a model object of its own around the same
    weights. Tasks hold nothing of the model but the prompts of its family, so the objects serve all cells.
    """

    def __init__(self, model: SweptModel, plan: Plan) -> None:
        self.model, self.plan = model, plan
        if model.is_demo:
            torch.set_num_threads(1)  # matrices this small gain nothing from threads, and spin against any other load
        folders = [str(tasks_folder()), *([plan.include_path] if plan.include_path else [])]
        only_ours = all(name.startswith("sparsemm_demo") for name in plan.tasks)  # need none of the host's 2000 files
        self.manager = TaskManager(
            "ERROR",
            include_path=folders,
            include_defaults=not only_ours,
            model_name=model.host.lmms_eval.prompts_of,  # prompts of the stock model
        )
        self.tasks = load_tasks(plan.tasks, self.manager)
        self.checkpoint: Any = None
        self.checkpoint = self._host_model(Cell(model, "fullkv")).checkpoint
        gc.freeze()  # the host collects garbage after each evaluation: 0.7 s over all that is loaded, else next to none

    def evaluate(self, cell: Cell, folder: Path) -> CellRecord:
        """All tasks under the settings of a cell; submission files of the host go into its folder."""
        started = time.perf_counter()
        values: dict[str, dict[str, float]] = {}
        statistics: dict[str, dict[str, float]] = {}
        samples: list[Sample] = []
        about: dict[str, Any] = {}
        arguments = host_defaults()
        arguments.output_path = str(folder)
        for name, task in self.tasks.items():
            load = OtherLoad()
            results = simple_evaluate(
                self._host_model(cell),
                tasks=[task],
                batch_size=self.plan.batch_size,
                limit=self.plan.limit,
                bootstrap_iters=0,
                task_manager=self.manager,
                verbosity="ERROR",
                cli_args=arguments,
            )
            about = results[KEY]
            statistics[name] = {**about["measured"], "other_cores": load.cores()}
            found = {metric: value for (of, metric), value in metrics(results).items() if of == name}
            values[name] = {metric.removesuffix(",none"): value for metric, value in found.items()}
            samples += read_samples(name, results["samples"][name])
        seconds = time.perf_counter() - started
        return _record(cell, about["settings"], values, statistics, about["environment"], seconds, tuple(samples))

    def _host_model(self, cell: Cell) -> Any:
        arguments = cell.arguments(self.plan.seed, self.plan.batch_size)
        kind = get_model(f"{cell.model.family}_{cell.registered_name}")
        return kind(checkpoint=self.checkpoint, **arguments)


class OtherLoad:
    """How many cores other processes of this machine keep busy from now on: milliseconds of such a time tell little."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def cores(self) -> float:
        """Mean since the start, 0 for none."""
        wall, busy, own = (now - then for now, then in zip(self._seconds(), self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall else 0.0

    @staticmethod
    def _seconds() -> tuple[float, float, float]:
        """(wall, all cores busy, this process on a core)."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)  # are in user and nice as well
        return time.perf_counter(), sum(times) - guests - idle, own.user + own.system


def _record(
    cell: Cell,
    settings: dict[str, Any],
    values: dict[str, dict[str, float]],
    statistics: dict[str, dict[str, float]],
    environment: dict[str, Any],
    seconds: float,
    samples: tuple[Sample, ...],
    error: str | None = None,
) -> CellRecord:
    return CellRecord(
        name=cell.name,
        model=cell.model.label,
        family=cell.model.family,
        method=cell.method,
        budget=cell.budget,
        variant=cell.variant,
        settings=settings,
        metrics=values,
        statistics=statistics,
        seconds=seconds,
        error=error,
        environment=environment,
        samples=samples,
    )


def host_defaults() -> argparse.Namespace:
    """What lmms-eval's command line passes to its evaluator where nothing was typed."""
    with replaced(sys, argv=["lmms-eval"]):
        return host.parse_eval_args()[1]


def load_tasks(names: Sequence[str], manager: TaskManager) -> dict[str, Task]:
    """The tasks of these names, groups taken apart.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    for name in names:
        if name not in manager.all_tasks:
            nearest = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"Unknown task {name!r} in --tasks; `lmms-eval tasks list` prints all.{hint}")
    found = [output for name in names for output in get_task_list(get_task_dict([name], manager, "chat"))]
    return {output.task_name: output.task for output in found}


def read_samples(task: str, lines: Sequence[dict[str, Any]]) -> list[Sample]:
    """The documents of lmms-eval's sample log; where a task has several filters, under the first."""
    samples: dict[int, Sample] = {}
    for line in lines:
        answers = line["filtered_resps"]  # one for each choice of a multiple-choice task
        counts: dict[str, Any] = next((found for found in line["token_counts"] if found), {})
        sample = Sample(
            task=task,
            doc_id=int(line["doc_id"]),
            scores=dict(_scores(line)),
            answer=_text(answers[0] if len(answers) == 1 else answers),
            target=_text(line["target"]),
            prompt_tokens=counts.get("input_tokens"),
            output_tokens=counts.get("output_tokens"),
            kept_tokens=counts.get("kept_tokens"),
        )
        samples.setdefault(sample.doc_id, sample)
    return list(samples.values())


def _scores(line: dict[str, Any]) -> list[tuple[str, float]]:
    """Metrics of one document that are numbers; of a dict, which some tasks pass to their aggregation, its `score`."""
    pairs = [(k, v.get("score") if isinstance(v, dict) else v) for k, v in line.items() if k not in NO_METRICS]
    return [(k, float(v)) for k, v in pairs if isinstance(v, (int, float)) and math.isfinite(v)]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
