"""The SparseMM paper's own numbers, for the cells of a sweep that repeat its experiments (`paper/README.md`)."""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.reports.statistics import Block

METHODS = {"SparseMM": "sparsemm", "SnapKV": "snapkv", "PyramidKV": "pyramidkv", "AdaKV": "adakv", "Random": "random"}
PARTS = {("no", "no"): "local_window", ("yes", "no"): "snapkv", ("yes", "yes"): "sparsemm"}


@dataclass(frozen=True)
class Benchmark:
    """The host's metric of one of the paper's benchmarks; `factor` takes the paper's number to the host's scale."""

    name: str
    metric: str
    factor: float = 1.0


TASKS = {
    "docvqa_val": Benchmark("DocVQA", "anls"),
    "ocrbench": Benchmark("OCRBench", "ocrbench_accuracy"),
    "textvqa_val": Benchmark("TextVQA", "exact_match"),
    "chartqa": Benchmark("ChartQA", "relaxed_overall"),
    "textcaps_val": Benchmark("TextCaps", "textcaps_CIDEr"),
    "mmbench_en_dev_static": Benchmark("MMBench", "gpt_eval_score"),
    "mmbench_en_dev": Benchmark("MMBench", "gpt_eval_score"),
    "gqa": Benchmark("GQA", "exact_match", 0.01),
    "vqav2_val": Benchmark("VQAv2", "exact_match", 0.01),
}
"""The host's tasks on the paper's documents. Lite tasks have others."""


@dataclass(frozen=True)
class Published:
    """One number of the paper, on the host's scale. `ratio` is None for the paper's default."""

    method: str
    budget: int
    value: float
    ratio: float | None = None


def published(block: Block) -> list[Published]:
    """What the paper says about a block's model, task and metric; nothing where it has no such experiment.

    >>> from sparsemm_lmms.reports.statistics import Block
    >>> block = Block("Qwen2-VL-7B-Instruct", "qwen2_vl", "gqa", "exact_match", 0, (), None)
    >>> published(block)[0]
    Published(method='sparsemm', budget=512, value=0.6451, ratio=None)
    """
    names = {checkpoint: name for family in FAMILIES.values() for checkpoint, name in family.in_papers.items()}
    model = names.get(block.model.lower().removesuffix("-hf"))
    benchmark = TASKS.get(block.task)
    if model is None or benchmark is None or benchmark.metric != block.metric:
        return []
    unique: dict[tuple[str, int, float | None], Published] = {}
    for of_model, of_benchmark, number in _numbers():
        if (of_model, of_benchmark) == (model, benchmark.name):
            number = replace(number, value=round(number.value * benchmark.factor, 6))
            unique.setdefault((number.method, number.budget, number.ratio), number)  # Table 2 rounds some of Table 4
    return list(unique.values())


@functools.cache
def _numbers() -> tuple[tuple[str, str, Published], ...]:
    return tuple(_read())


def _read() -> Iterator[tuple[str, str, Published]]:
    for name in ("tables_3_4", "table_2", "table_1"):
        text = (files(__package__) / "paper" / f"{name}.csv").read_text(encoding="utf-8")
        for line in csv.DictReader(text.splitlines()):
            if not line["value"]:
                continue
            if name == "table_2":
                method = PARTS[line["uniform"], line["score_preferred"]]
            else:
                method = METHODS[line.get("method") or "SparseMM"]
            ratio = float(line["ratio"]) if "ratio" in line else None
            number = Published(method, int(line["budget"]), float(line["value"]), ratio)
            yield line["model"], line["benchmark"], number
