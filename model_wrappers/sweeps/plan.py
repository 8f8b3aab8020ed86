"""From a command line to the cells of a sweep, and the file that says what a folder's sweep is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.json_files import one_line
from sparsemm_lmms.model_wrappers.arguments import parse_arguments
from sparsemm_lmms.model_wrappers.lmms_eval.records import command_line, versions
from sparsemm_lmms.model_wrappers.loading import read_config
from sparsemm_lmms.model_wrappers.sweeps.cells import (
    BUDGETS,
    DEFAULT_METHODS,
    DEMO_BUDGETS,
    DEMO_TASKS,
    Cell,
    SweptModel,
    ablation_cells,
    check,
    main_cells,
    parse_budgets,
    parse_families,
    parse_methods,
    words,
)
from sparsemm_lmms.reports.store import read_cells, read_plan, write_text


@dataclass(frozen=True)
class Plan:
    """All cells of a sweep, and the settings that they share.

    Attributes:
        cells: those of one model stand together.
        tasks: tasks or groups of lmms-eval.
        limit: documents of each task, or their share below 1; None for all.
        include_path: a folder with further tasks.
    """

    cells: Sequence[Cell]
    tasks: tuple[str, ...]
    limit: float | None = None
    batch_size: int = 1
    seed: int = 0
    include_path: str | None = None

    @property
    def models(self) -> list[SweptModel]:
        return list({cell.model.label: cell.model for cell in self.cells}.values())

    @property
    def settings(self) -> dict[str, Any]:
        """What all cells of a folder must have in common to be compared."""
        return {
            "tasks": sorted(self.tasks),
            "limit": self.limit,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "include_path": self.include_path and str(Path(self.include_path).resolve()),
        }


def make_plan(
    *,
    families: str = DEMO_FAMILIES[0],
    model_args: str = "",
    methods: str = "",
    budgets: str = "",
    ablations: str = "",
    draws: int | None = None,
    tasks: str = "",
    limit: float | None = None,
    batch_size: int = 1,
    seed: int = 0,
    include_path: str | None = None,
) -> Plan:
    """Check the texts of a command line and lay the cells out; nothing but configs is read.

    Raises:
        ValueError: one sentence for the first mistake.
    """
    arguments = parse_arguments(model_args)
    models = [SweptModel(family, arguments) for family in parse_families(families)]
    if not models:
        raise ValueError(f"--model names no family; give one or more of {', '.join(FAMILIES)}.")
    is_demo = all(model.is_demo for model in models)
    names = tuple(words(tasks)) or (DEMO_TASKS if is_demo else ())
    if not names:
        raise ValueError("--tasks is missing; give tasks or groups of lmms-eval, such as ocrbench or sparsemm_paper.")
    if limit is not None and not limit > 0:
        raise ValueError(f"--limit {limit:g} must be larger than 0; leave it out for all documents.")
    tokens = parse_budgets(budgets) or list(DEMO_BUDGETS if is_demo else BUDGETS)
    kinds = words(ablations)
    rows = parse_methods(methods) or ([] if kinds else list(DEFAULT_METHODS))
    cells: list[Cell] = []
    for model in models:
        cells += main_cells(model, rows, tokens)
        for kind in kinds:
            cells += ablation_cells(model, kind, tokens, draws)
    cells = list({cell.name: cell for cell in cells}.values())
    check(cells)
    for model in models:
        read_config(model.host, model.options)
    whole = int(limit) if limit is not None and limit >= 1 else limit
    return Plan(cells, names, whole, batch_size, seed, include_path)


def open_sweep(sweep: Path, plan: Plan) -> None:
    """Begin a sweep in an empty folder, or go on with one of the same settings; methods, budgets and models may be new.

    A sweep whose cells all failed (a task's name was misspelled, say) begins anew, whatever its settings were.

    Raises:
        ValueError: with the settings that differ, or for a `sweep.json` that no sweep wrote.
    """
    models = {model.label: model.identity for model in plan.models}
    names = [cell.name for cell in plan.cells]
    file = sweep / "sweep.json"
    sweep.mkdir(parents=True, exist_ok=True)
    with FileLock(sweep / ".lock"):
        old = read_plan(sweep)
        if not old and any(not entry.name.startswith(".") for entry in sweep.iterdir()):
            raise ValueError(f"--output {sweep} holds files that are no sweep; name a new or an empty folder.")
        if _only_failed(sweep):
            old = {}
            shutil.rmtree(sweep / "cells")
        _refuse_other(sweep, old.get("settings", plan.settings), plan.settings)
        for label, about in models.items():
            before = dict(old.get("models", {}).get(label, about))
            # sweeps of 0.2.0 have numbers where the command line's strings stand now
            before["model_args"] = {name: str(value) for name, value in before["model_args"].items()}
            _refuse_other(sweep, before, about)
        plans = {
            "settings": plan.settings,
            "models": {**old.get("models", {}), **models},
            "cells": list(dict.fromkeys([*old.get("cells", []), *names])),
            "versions": versions(),
            "commands": [*old.get("commands", []), command_line()],
        }
        write_text(file, json.dumps(plans, indent=1, ensure_ascii=False) + "\n")


def _only_failed(sweep: Path) -> bool:
    """Whether a sweep has cells, none of them complete, and nobody is at work on it."""
    records = list(read_cells(sweep))
    if not records or any(record.error is None for record in records):
        return False
    try:
        for lock in (sweep / ".locks").glob("*.lock"):
            with FileLock(lock, timeout=0):
                pass
    except Timeout:
        return False
    return True


def _refuse_other(sweep: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    differing = [f"{name} {old.get(name)} there, {new.get(name)} here" for name in new if old.get(name) != new[name]]
    if differing:
        told = one_line("; ".join(differing))
        raise ValueError(
            f"--output {sweep} holds a sweep with other settings ({told}); repeat its settings to "
            "go on with it, or name a new folder."
        )
