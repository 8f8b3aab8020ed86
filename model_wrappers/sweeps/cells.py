"""What a sweep runs: cells (a model, a method, a budget), their names, and the ablations of the SparseMM paper.

Methods are those of the package, pairs `SCORER+ALLOCATOR`, and controls, which are a method with other head scores:
`METHOD@permuted`, `@layer_mean`, `@uniform` and `@random`; those of SparseMM are called `permuted` and so on.
`random#3`, `permuted#3` and `mask_random#3` are further draws: the seed of the sweep plus 3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsemm_lmms.families import ANY, FAMILIES, Family
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import METHODS, find_method
from sparsemm_lmms.model_wrappers.adapters import adapter_sha256
from sparsemm_lmms.model_wrappers.arguments import (
    DEMO,
    RunOptions,
    known_run_options,
    known_settings,
    split_arguments,
)
from sparsemm_lmms.model_wrappers.compressed import check_head_scores
from sparsemm_lmms.model_wrappers.loading import find_family
from sparsemm_lmms.presets import FREE, FREE_PARTS
from sparsemm_lmms.reports.names import SHORT, WORDS, RowName, normal_name, split_name
from sparsemm_lmms.settings import unknown_name
from sparsemm_lmms.visual_heads.resolve import WORDS as SPECIFICATIONS

DEFAULT_METHODS = ("sparsemm", "snapkv", "pyramidkv", "adakv", "local_window", "random")
BUDGETS = (2048, 1024, 512, 256, 128, 64)
DEMO_BUDGETS = (768, 256, 160, 96, 64, 48)  # of prompts of about 600 tokens; 768 covers them all
DEMO_TASKS = ("sparsemm_demo_ocr", "sparsemm_demo_vqa")
RATIOS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.8, 1.0)  # Table 1
MASK_RATIOS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
DRAWS = {"scores": 10, "heads": 5}
OWN_OPTIONS = {"budget": "--budgets", "method": "--methods", "batch_size": "--batch_size", "seed": "--seed"}


@dataclass(frozen=True)
class SweptModel:
    """A checkpoint and what all its cells have in common.

    Attributes:
        family: its name, or `vlm` for that of the checkpoint, whichever it is.
        arguments: of `--model_args`; a cell gets those that its method knows.
    """

    family: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def host(self) -> Family:
        """The family; reads the checkpoint's config where only that tells."""
        return find_family(f"{ANY}_fullkv", self.arguments) if self.family == ANY else FAMILIES[self.family]

    @property
    def options(self) -> RunOptions:
        """Those that decide what is loaded."""
        return split_arguments(self.host, "fullkv", Cell(self, "fullkv").arguments(seed=0, batch_size=1))[0]

    @property
    def is_demo(self) -> bool:
        return self.arguments.get("pretrained") == DEMO

    @property
    def identity(self) -> dict[str, Any]:
        """What all cells of this model in one folder must have in common; of a score file or adapter, what is in it.

        Raises:
            FileNotFoundError, ValueError: for head scores or an adapter that cannot be read.
        """
        scores = str(self.arguments.get("head_scores", "auto"))
        word, _, rest = scores.partition(":")
        file = rest if word in SPECIFICATIONS else scores
        content = {"head_scores_sha256": HeadScores.load(file).content_hash} if file else {}
        if self.options.peft is not None:
            content["peft_sha256"] = adapter_sha256(self.options.peft)
        return {"family": self.family, "model_args": self.arguments, **content}

    @property
    def label(self) -> str:
        """How tables call it, for example `llava-v1.6-vicuna-7b-hf` or `qwen2_vl demo`."""
        pretrained = str(self.arguments.get("pretrained") or self.host.pretrained)
        return f"{self.family} {DEMO}" if self.is_demo else Path(pretrained).name


@dataclass(frozen=True)
class Cell:
    """One model, method and budget.

    Attributes:
        method: as tables show it: a method (or `SCORER+ALLOCATOR`), a control of one, or a draw (`random#3`).
        budget: tokens per kv head, or None where nothing is evicted.
        variant: settings that an ablation changes.
    """

    model: SweptModel
    method: str
    budget: int | None = None
    variant: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder of its records."""
        parts = [self.model.label, self.method, *([f"b{self.budget}"] if self.budget else [])]
        parts += [f"{name}{value:g}" for name, value in self.variant.items()]
        return "__".join(re.sub(r"[^\w.-]+", "_", part) for part in parts)

    @property
    def row(self) -> RowName:
        """Its method taken apart."""
        return split_name(self.method)

    @property
    def registered_method(self) -> str:
        """The method of the package that runs it."""
        return self.row.method

    @property
    def registered_name(self) -> str:
        """The method in the name of its model in lmms-eval."""
        return FREE if "+" in self.registered_method else self.registered_method

    def arguments(self, seed: int, batch_size: int) -> dict[str, Any]:
        """All arguments of its model."""
        row = self.row
        known = known_run_options(self.model.host, row.method) | known_settings(row.method)
        given = {name: value for name, value in self.model.arguments.items() if name in known}
        given |= {"batch_size": batch_size, **self.variant}
        if self.budget is not None:
            given["budget"] = self.budget
        if row.is_drawn:
            given["seed"] = seed + int(row.draw or 0)
        if self.registered_name == FREE:
            given |= dict(zip(FREE_PARTS, row.method.split("+"), strict=True))
        if row.control:
            measured = given.get("head_scores", "auto")
            made = row.control in ("random", "uniform")  # of nothing measured
            given["head_scores"] = row.control if made or measured == "auto" else f"{row.control}:{measured}"
        return given


def main_cells(model: SweptModel, methods: Sequence[str], budgets: Sequence[int]) -> Iterator[Cell]:
    """FullKV, with which all others are compared, then every method at every budget; those that evict nothing once."""
    yield Cell(model, "fullkv")
    for method in methods:
        cell = Cell(model, method)
        if find_method(cell.registered_method).compresses:
            yield from (Cell(model, method, budget) for budget in budgets)
        elif method != "fullkv":
            yield cell


def ablation_cells(model: SweptModel, ablation: str, budgets: Sequence[int], draws: int | None = None) -> list[Cell]:
    """The cells of one of `ABLATIONS`, FullKV left out.

    `components` (Table 2) and `scores` compare methods, so they share their cells with the main sweep: local_window is
    the window alone, snapkv adds the same number of scored tokens for every head, sparsemm shares them by head scores.
    """
    several = range(draws or DRAWS.get(ablation, 1))
    if ablation == "ratio":
        return [Cell(model, "sparsemm", budget, {"ratio": ratio}) for budget in budgets for ratio in RATIOS]
    if ablation == "components":
        methods = ["local_window", "snapkv", "sparsemm"]
    elif ablation == "scores":
        drawn = [f"{name}#{draw}" for name in ("permuted", "random") for draw in several]
        methods = ["sparsemm", "layer_mean", "uniform", *drawn]
    elif ablation == "heads":
        methods = ["mask", *(f"mask_random#{draw}" for draw in several)]
        return [Cell(model, method, None, {"mask_ratio": ratio}) for ratio in MASK_RATIOS for method in methods]
    else:
        raise ValueError(unknown_name("--ablation", ablation, ABLATIONS))
    return [Cell(model, method, budget) for budget in budgets for method in methods]


ABLATIONS = ("ratio", "components", "heads", "scores")


def check(cells: Sequence[Cell]) -> None:
    """Refuse what no cell, or not every cell, could run with.

    Raises:
        ValueError: one sentence.
    """
    for model in {cell.model.label: cell.model for cell in cells}.values():
        for name, option in OWN_OPTIONS.items():
            if name in model.arguments:
                raise ValueError(f"{name} in --model_args belongs to {option}: cells differ in it or share it.")
        own = [cell for cell in cells if cell.model == model]
        known = set[str]()
        for cell in own:
            known |= known_run_options(model.host, cell.registered_method) | known_settings(cell.registered_method)
        for name in model.arguments:
            if name not in known:
                raise ValueError(unknown_name(f"argument in --model_args for {model.family}", name, sorted(known)))
        for cell in own:
            arguments = cell.arguments(seed=0, batch_size=1)
            check_head_scores(model.host, *split_arguments(model.host, cell.registered_name, arguments))


def parse_methods(text: str) -> list[str]:
    """Comma-separated methods, free combinations, controls and draws.

    >>> parse_methods("sparsemm, random#2")
    ['sparsemm', 'random#2']
    """
    names = list(dict.fromkeys(map(normal_name, words(text))))
    for name in names:
        row, mark = split_name(name), "#" in name
        if "+" not in row.method and row.method not in METHODS:
            raise ValueError(unknown_name("method", row.method, (*METHODS, *SHORT)))
        needs_scores = find_method(row.method).needs_head_scores
        if "@" in name and not (row.control in WORDS and needs_scores):
            able = [method for method, parts in METHODS.items() if parts.needs_head_scores]
            raise ValueError(
                f"--methods {name}: controls are METHOD@{', @'.join(WORDS)} of methods that read head scores, such as "
                f"{', '.join(able)}."
            )
        if mark and not (row.is_drawn and row.draw.isdecimal()):
            raise ValueError(
                f"--methods {name}: draws are whole numbers of random, permuted, mask_random, METHOD@random or "
                "METHOD@permuted, for example random#3."
            )
    return names


def parse_budgets(text: str) -> list[int]:
    """Comma-separated tokens per kv head, the largest first."""
    try:
        return sorted({int(word) for word in words(text)}, reverse=True)
    except ValueError:
        raise ValueError(f"--budgets {text!r} must be whole numbers with commas between, for example 48,96.") from None


def parse_families(text: str) -> list[str]:
    """Comma-separated families."""
    names = words(text)
    for name in names:
        if name not in (*FAMILIES, ANY):
            raise ValueError(unknown_name("--model", name, (*FAMILIES, ANY)))
    return names


def words(text: str) -> list[str]:
    """What stands between commas, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
