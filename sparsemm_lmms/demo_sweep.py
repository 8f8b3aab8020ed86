"""`sparsemm-lmms demo`: methods x budgets on the packaged demo models, as a table, a plot and a JSON file.

The documents are those of the tasks `sparsemm_demo_ocr` and `sparsemm_demo_vqa`; prompts, batches and caches are made
by the code that lmms-eval runs, without its evaluator. Three controls stand beside the methods: `random` head scores,
SparseMM's own scores dealt to other heads (`permuted`), and each layer's mean score for its heads (`layer_mean`).
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .config import CompressionConfig, unknown_name
from .head_scores import HeadScores
from .model_wrappers.arguments import RunOptions
from .model_wrappers.engine import Conversation, Engine
from .model_wrappers.generation import GenerationSettings
from .model_wrappers.llava_next import LlavaNext
from .model_wrappers.loading import load_checkpoint, read_config
from .model_wrappers.qwen2_vl import Qwen2VL
from .session import compress
from .task_overrides.utils import character_accuracy

FAMILIES = {"llava_next": LlavaNext.family, "qwen2_vl": Qwen2VL.family}
TASKS = {"ocr": GenerationSettings(96, until=("\n\n",)), "vqa": GenerationSettings(24, until=("\n\n",))}
CONTROLS = ("random", "permuted", "layer_mean")
ROWS = ("fullkv", "sparsemm", "snapkv", "pyramidkv", "adakv", "local_window", *CONTROLS)
DRAWN = ("random", "permuted")  # new head scores for every few documents: their rows are means over draws
BUDGETS = (64, 96, 160, 768)  # about 10, 15 and 25 % of a prompt, and more than all of it
BATCH, DRAW = 12, 4  # documents generated together; documents that share one draw
LEGEND = f"""\
characters  1 - edit distance / length        exact     right to the letter
kept        tokens per kv head after prefill  KV        used by a document's cache at the end
ms/token    one decode step of a batch of up to {BATCH} documents, CPU
random, permuted (means over draws) and layer_mean are SparseMM with other head scores."""


@dataclass(frozen=True)
class Document:
    """One question of a demo task."""

    conversation: Conversation
    answer: str


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method at a budget on one task.

    Attributes:
        budget: tokens per head asked for; None for fullkv.
        characters, exact: mean character accuracy, share of answers that are right to the letter; 0 to 1.
        kept_tokens: mean per kv head after prefill.
        kv_bytes_used, kv_bytes: mean bytes that one document's cache held at the end, and that were allocated for it.
        ms_per_token: of one decode step, which writes a token for each of `batch` documents.
    """

    family: str
    task: str
    method: str
    budget: int | None
    documents: int
    characters: float
    exact: float
    prompt_tokens: float
    kept_tokens: float
    kv_bytes_used: float
    kv_bytes: float
    ms_per_token: float
    batch: int


def read_documents(task: str, limit: int) -> list[Document]:
    """The first `limit` documents of `sparsemm_demo_<task>`."""
    import pyarrow.parquet as parquet

    table = parquet.read_table(str(files("sparsemm_lmms.task_overrides") / f"sparsemm_demo_{task}.parquet"))
    documents = []
    for row in table.slice(0, limit).to_pylist():
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        parts = [{"type": "image", "url": image}, {"type": "text", "text": row["question"]}]
        documents.append(Document([{"role": "user", "content": parts}], row["answer"]))
    return documents


class Sweep:
    """One loaded demo model and its documents."""

    def __init__(self, family: str, limit: int, seed: int) -> None:
        options = RunOptions("demo", device="cpu")
        config = read_config(FAMILIES[family], options)
        checkpoint = load_checkpoint(FAMILIES[family], options, torch.device("cpu"))
        self.family, self.seed = family, seed
        self.engine = Engine(checkpoint, strip_answers=True)
        self.scores = self._packaged_scores(config, checkpoint.path)
        self.documents = {task: read_documents(task, limit) for task in TASKS}

    def cells(self, method: str, budget: int | None) -> Iterator[Cell]:
        """Run one method at one budget, one task after the other."""
        for task, documents in self.documents.items():
            yield self._cell(method, budget, task, documents)

    def _cell(self, method: str, budget: int | None, task: str, documents: list[Document]) -> Cell:
        size = DRAW if method in DRAWN else BATCH
        answers, targets, used, allocated, steps = [], [], 0, 0, []
        for start in range(0, len(documents), size):
            batch = documents[start : start + size]
            config, scores = self._compression(method, budget, draw=start // size)
            with compress(self.engine.model, config, scores) as session:
                done = self.engine.generate(session, [d.conversation for d in batch], TASKS[task])
            answers += done.answers
            targets += [document.answer for document in batch]
            used, allocated = used + done.kv_bytes_used, allocated + done.kv_bytes
            steps += [] if done.tpot is None else [1000 * done.tpot]
        texts = [answer.text for answer in answers]
        return Cell(
            self.family,
            task,
            method,
            budget,
            len(documents),
            fmean(character_accuracy([wanted], [got]) for wanted, got in zip(targets, texts, strict=True)),
            fmean(text == target for text, target in zip(texts, targets, strict=True)),
            fmean(answer.prompt_tokens for answer in answers),
            fmean(answer.kept_tokens for answer in answers),
            used / len(documents),
            allocated / len(documents),
            fmean(steps) if steps else float("nan"),
            size,
        )

    def _compression(self, method: str, budget: int | None, draw: int) -> tuple[CompressionConfig, HeadScores | None]:
        config = CompressionConfig(
            method="sparsemm", budget=budget or CompressionConfig().budget, seed=self.seed + draw
        )
        if method == "permuted":
            return config, self.scores.permuted(self.seed + draw)
        if method == "layer_mean":
            return config, self.scores.layer_mean()
        return replace(config, method=method), self.scores if method == "sparsemm" else None

    def _packaged_scores(self, config: dict[str, Any], path: str) -> HeadScores:
        from .scoring import resolve_head_scores

        return resolve_head_scores("auto", config, path, "main")


def main(family: str, methods: str, budgets: str, limit: int, seed: int, output: Path) -> None:
    """Run the sweep, print the table, write the plot and the numbers."""
    rows = _parse_methods(methods)
    tokens = _parse_budgets(budgets)
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output} must end in .png.")
    torch.set_num_threads(1)  # matrices this small gain nothing from threads, and spin against any other load
    console, started = Console(width=None if sys.stdout.isatty() else 110), time.perf_counter()
    cells: list[Cell] = []
    runs = [(row, budget) for row in rows for budget in ([None] if row == "fullkv" else tokens)]
    names = list(FAMILIES) if family == "all" else [family]
    columns = (TextColumn("{task.description:<34}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("loading", total=len(names) * len(runs))
        for name in names:
            sweep = Sweep(name, limit, seed)
            for row, budget in runs:
                progress.update(bar, description=f"{name} {row} {budget or ''}")
                cells += sweep.cells(row, budget)
                progress.advance(bar)
    for name in names:
        console.print(render_table(name, [cell for cell in cells if cell.family == name]))
    console.print(LEGEND)
    write_json(cells, seed, output.with_suffix(".json"))
    plot(cells, output)
    console.print(f"Plot: {output}   numbers: {output.with_suffix('.json')}   {time.perf_counter() - started:.0f} s")


def render_table(family: str, cells: list[Cell]) -> Table:
    """One line for each method and budget: scores of both tasks, what was held, and the speed."""
    prompt = fmean(cell.prompt_tokens for cell in cells)
    table = Table(
        title=f"{family} demo model, {cells[0].documents} documents a task, prompts of {prompt:.0f} tokens on average",
    )
    for header in ("method", "budget", "OCR characters", "OCR exact", "VQA exact", "kept", "KV KiB", "ms/token"):
        table.add_column(header, justify="left" if header == "method" else "right")
    pairs = list(dict.fromkeys((cell.method, cell.budget) for cell in cells))
    for i, (method, budget) in enumerate(pairs):
        group = {cell.task: cell for cell in cells if (cell.method, cell.budget) == (method, budget)}
        table.add_row(
            method,
            str(budget or "all"),
            f"{group['ocr'].characters:.1%}",
            f"{group['ocr'].exact:.0%}",
            f"{group['vqa'].exact:.0%}",
            f"{fmean(cell.kept_tokens for cell in group.values()):.0f}",
            f"{fmean(cell.kv_bytes_used for cell in group.values()) / 1024:.0f}",
            f"{fmean(cell.ms_per_token for cell in group.values()):.1f}" if group["ocr"].batch == BATCH else "",
            end_section=i + 1 == len(pairs) or pairs[i + 1][0] != method,
        )
    return table


def write_json(cells: list[Cell], seed: int, path: Path) -> None:
    """All numbers of the table and the plot, with the versions that made them."""
    import transformers

    from ._version import __version__

    versions = {"sparsemm_lmms": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"versions": versions, "seed": seed, "cells": [asdict(c) for c in cells]}, indent=1))


def plot(cells: list[Cell], path: Path) -> None:
    """Character accuracy over the budget, one panel a family and task, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(cell.family for cell in cells))
    figure, axes = pyplot.subplots(
        len(families), len(TASKS), figsize=(6 * len(TASKS), 4.2 * len(families)), sharey=True, squeeze=False
    )
    for (family, task), axis in zip(((f, t) for f in families for t in TASKS), axes.flat, strict=True):
        panel = [cell for cell in cells if (cell.family, cell.task) == (family, task)]
        _draw_panel(axis, panel)
        axis.set_title(f"{family}: {'read the image' if task == 'ocr' else 'answer questions'}")
    axes.flat[0].legend(fontsize="small")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_panel(axis: Any, cells: list[Cell]) -> None:
    for method in dict.fromkeys(cell.method for cell in cells):
        line = [cell for cell in cells if cell.method == method]
        if method == "fullkv":
            axis.axhline(line[0].characters, color="black", linestyle=":", label="fullkv")
            continue
        style = "--" if method in CONTROLS else "-"
        axis.plot(
            [cell.budget for cell in line],
            [cell.characters for cell in line],
            style,
            marker="o",
            markersize=4,
            linewidth=2.5 if method == "sparsemm" else 1.3,
            label=method,
        )
    axis.set_xscale("log", base=2)
    ticks = sorted({cell.budget for cell in cells if cell.budget})
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_xlabel("budget (tokens per kv head, window included)")
    axis.set_ylabel("character accuracy")
    axis.set_ylim(-0.02, 1.05)
    axis.grid(alpha=0.3)


def _parse_methods(text: str) -> list[str]:
    rows = [name.strip() for name in text.split(",") if name.strip()] or list(ROWS)
    for row in rows:
        if row not in ROWS:
            raise ValueError(unknown_name("method", row, ROWS))
    return rows


def _parse_budgets(text: str) -> list[int]:
    try:
        budgets = [int(part) for part in text.split(",") if part.strip()] or list(BUDGETS)
    except ValueError:
        raise ValueError(f"--budgets {text!r} must be whole numbers with commas between, for example 48,96.") from None
    for budget in budgets:
        CompressionConfig(budget=budget)  # raises with a sentence
    return sorted(set(budgets))
