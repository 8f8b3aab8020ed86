"""`sparsemm-lmms card`: what a leaderboard asks for, from finished runs: a Markdown card and the submission files.

lmms-eval writes submission files under names that all runs share, some with a time. The card's copies state task,
model, method and budget.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm_lmms.families import family_of
from sparsemm_lmms.head_scores import write_atomically
from sparsemm_lmms.json_files import checked, read_bytes, read_json
from sparsemm_lmms.presets import FREE, FREE_PARTS
from sparsemm_lmms.reports.markdown import code, item, plain
from sparsemm_lmms.reports.names import split_name
from sparsemm_lmms.reports.results import KEY, read_results
from sparsemm_lmms.reports.statistics import QUIET, place
from sparsemm_lmms.reports.store import COMPACT, CellRecord, cell_folder, read_cells, write_text

app = typer.Typer()
MEND = "restore the file, or run again"
RECORD: dict[str, Any] = {
    "settings": {"model": str, "pretrained": str, "budget": int | None},
    "environment": {"num_processes": int | None, "versions": dict | None},
    "measured": dict[str, float],
}
"""What a card takes from the record of a run."""


@dataclass(frozen=True)
class Leaderboard:
    """A test server, and how lmms-eval names the file for it. `shared` are other tasks that write such a file too."""

    name: str
    task: str
    pattern: str
    shared: tuple[str, ...] = ()


LEADERBOARDS = (
    Leaderboard("DocVQA test", "docvqa_test", "docvqa_test_for_submission.json"),
    Leaderboard("TextVQA test", "textvqa_test", "textvqa_submission_*.json", ("textvqa_val", "textvqa_val_lite")),
    Leaderboard("VQAv2 test-dev", "vqav2_test", "vqav2-test-submission-*.json"),
    Leaderboard("MMBench test", "mmbench_en_test", "mmbench_en_test_results.xlsx"),
)


@dataclass(frozen=True)
class Run:
    """One evaluated model, whichever file told of it.

    Attributes:
        scores: task -> metric -> value.
        documents: of each task.
        folder: where the host's submission files lie, at any depth.
        listed: whether the card has a line for it; of others it has the citations alone.
    """

    source: Path
    folder: Path
    model: str
    method: str
    budget: int | None
    variant: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    scores: dict[str, dict[str, float]]
    documents: dict[str, int]
    measured: dict[str, float]
    listed: bool = True

    @property
    def label(self) -> str:
        """For file names: model, method, budget and what an ablation changed."""
        parts = [self.model, self.method, *([f"budget{self.budget}"] if self.budget else [])]
        parts += [f"{name}{value:g}" for name, value in self.variant.items()]
        return "__".join(re.sub(r"[^\w.-]+", "_", part)[:100] for part in parts)


@dataclass
class Collected:
    """Submission files: those copied, by run label and leaderboard, and what is missing in words."""

    copied: list[tuple[str, str, Path]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@app.command()
def card(
    results: Annotated[list[Path], typer.Argument(help="Folders of sweeps or lmms-eval runs, *_results.json files.")],
    output: Annotated[Path, typer.Option(help="The card; submission files lie beside it in submissions/.")] = Path(
        "card.md"
    ),
) -> None:
    """A Markdown card of finished runs, and their submission files under names that state method and budget."""
    runs = [run for path in results for run in read_runs(path)]
    collected = write_card(runs, output)
    for name, _, path in collected.copied:
        print(f"{name}: {path}")
    for line in collected.missing:
        print(f"missing: {line}")
    print(f"{sum(run.listed for run in runs)} runs, {len(collected.copied)} submission files: {output}")


def read_runs(path: Path) -> list[Run]:
    """The runs of a sweep, of a results file, or of all results files below a folder.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"There is nothing at {path}; give the folder of a sweep or a *_results.json.")
    if path.is_file():
        return [_of_results(path)]
    if (path / "cells").is_dir() or (path / COMPACT).exists():
        runs = [_of_cell(path, record) for record in sorted(read_cells(path), key=_place) if record.error is None]
    else:
        runs = [_of_results(file) for file in sorted(path.rglob("*_results.json")) if file.parent.name != "submissions"]
    if not runs:
        raise ValueError(f"{path} holds neither a sweep with results nor a *_results.json of lmms-eval.")
    return runs


def write_card(runs: Sequence[Run], output: Path) -> Collected:
    """Write the card, and copy submission files into `submissions/` beside it.

    Raises:
        ValueError: when the card exists with other content: nothing is overwritten.
    """
    folder = output.parent / "submissions"
    collected = Collected()
    listed = [run for run in runs if run.listed]
    for run in listed:
        for board in LEADERBOARDS:
            _collect(run, board, folder, collected)
    text = _markdown(listed, collected, output.parent) + _citation(runs)
    if output.exists() and read_bytes(output, "Card", "name another file with --output") != text.encode():
        raise ValueError(f"--output {output} exists with other content; name another file or move it away.")
    write_text(output, text)
    return collected


def _is_listed(record: CellRecord) -> bool:
    """Ablations and single draws of controls belong into the report of the sweep."""
    return not record.variant and "#" not in record.method


def _place(record: CellRecord) -> tuple[str, tuple[int, int, int, str], int]:
    return record.model, place(record.method), -(record.budget or 0)


def _of_cell(sweep: Path, record: CellRecord) -> Run:
    counts = {task: sum(sample.task == task for sample in record.samples) for task in record.metrics}
    measured = list(record.statistics.values())
    names = {name for values in measured for name in values}
    if not all(values.get("other_cores", QUIET) < QUIET for values in measured):
        names -= {"tpot_ms", "tpot_ms_median"}
    total = sum(values.get("num_requests", 1) for values in measured) or 1
    return Run(
        source=sweep,
        folder=cell_folder(sweep, record.name),
        model=record.model,
        method=record.method,
        budget=record.budget,
        variant=record.variant,
        settings=record.settings,
        environment=checked(record.environment, RECORD["environment"], f"Cell {record.name} of {sweep}", MEND),
        scores=record.metrics,
        documents=counts,
        measured={n: sum(v.get(n, 0) * v.get("num_requests", 1) for v in measured) / total for n in names},
        listed=_is_listed(record),
    )


def _of_results(path: Path) -> Run:
    data = read_results(path)
    where = f"Results file {path}"
    record = checked(data[KEY], RECORD, where, MEND, KEY)
    samples = data["n-samples"]
    checked(samples, {task: {"effective": float} for task in samples}, where, MEND, "n-samples")
    settings = record["settings"]
    family = family_of(settings["model"]) or settings["model"]
    scores = {
        task: {name.removesuffix(",none"): float(v) for name, v in values.items() if _is_score(name, v)}
        for task, values in data["results"].items()
    }
    pretrained = settings["pretrained"]
    return Run(
        source=path,
        folder=path.parent,
        model=f"{family} demo" if pretrained == "demo" else Path(pretrained).name,
        method=settings["model"].removeprefix(f"{family}_"),
        budget=settings.get("budget"),
        variant={},
        settings=settings,
        environment=record["environment"],
        scores={task: values for task, values in scores.items() if values or task in samples},
        documents={task: counts["effective"] for task, counts in samples.items()},
        measured=record["measured"],
    )


def _is_score(name: str, value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and "_stderr" not in name


def _collect(run: Run, board: Leaderboard, folder: Path, collected: Collected) -> None:
    """Copy the file of one leaderboard, or say why there is none."""
    if board.task not in run.documents:
        return
    files = sorted(path for path in run.folder.rglob(board.pattern) if path.parent.name == "submissions")
    files = [path for path in files if _is_of(path, run, board)]
    if not files:
        where = f"{run.folder}/**/submissions/{board.pattern}"
        collected.missing.append(f"{board.name} of {run.label}: {board.task} was run, but {where} does not exist.")
        return
    newest = max(files, key=lambda path: path.stat().st_mtime)
    target = _copy(newest, folder, f"{board.task}__{run.label}")
    collected.copied.append((f"{board.name}, {run.label}", newest.name, target))


def _is_of(path: Path, run: Run, board: Leaderboard) -> bool:
    """Whether a file that several tasks name alike has as many answers as this task has documents."""
    if not any(task in run.documents for task in board.shared):
        return True
    where = f"Submission file {path}"
    return len(checked(read_json(path, "Submission file", MEND), list, where, MEND)) == run.documents[board.task]


def _copy(source: Path, folder: Path, stem: str) -> Path:
    """A copy under this name; under a numbered one where another file has it."""
    folder.mkdir(parents=True, exist_ok=True)
    content = read_bytes(source, "Submission file", MEND)
    number = 1
    while True:
        target = folder / f"{stem}{f'__{number}' if number > 1 else ''}{source.suffix}"
        if not target.exists():
            break
        if read_bytes(target, "Submission file", "move it away") == content:
            return target
        number += 1
    write_atomically(target, content)
    return target


def _markdown(runs: Sequence[Run], collected: Collected, root: Path) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    parts = [f"# {plain(', '.join(models))} with compressed KV caches\n", "## Results\n", _results(runs)]
    parts += ["## Settings\n", _settings(runs), "## Hardware and versions\n", _environment(runs)]
    parts += ["## Submission files\n", _submissions(runs, collected, root), "## Citation\n", ""]
    return "\n".join(parts)


def _results(runs: Sequence[Run]) -> str:
    """One table for all runs of the same tasks and documents."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(run.documents, sort_keys=True), []).append(run)
    note = (
        "Budget: tokens kept per kv head on average, the window included. KV MiB: used by a document's cache. "
        "ms/token: of cells of a sweep only where nothing else kept the processor busy.\n"
    )
    return "\n".join([*(_table(group) for group in groups.values()), note])


def _table(runs: Sequence[Run]) -> str:
    columns = list(dict.fromkeys((t, m) for run in runs for t, values in run.scores.items() for m in values))
    names = [f"{task} {metric} ({runs[0].documents.get(task, '?')} documents)" for task, metric in columns]
    header = ["model", "method", "budget", *names, "tokens kept", "KV MiB", "ms/token"]
    lines = []
    for run in runs:
        variant = "".join(f" {name}={value:g}" for name, value in run.variant.items())
        size = run.measured.get("kv_bytes_used")
        measured = [run.measured.get("kept_tokens"), None if size is None else size / 2**20]
        measured.append(run.measured.get("tpot_ms_median", run.measured.get("tpot_ms")))
        values = [run.scores.get(task, {}).get(metric) for task, metric in columns] + measured
        lines.append([run.model, run.method + variant, str(run.budget or "all"), *map(_text, values)])
    shown = [[plain(text) for text in row] for row in (header, *lines)]
    rows = [shown[0], ["---"] * 3 + ["---:"] * (len(header) - 3), *shown[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _settings(runs: Sequence[Run]) -> str:
    """What all runs share, once; what differs, by run."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings if name not in ("model", "budget")))
    texts = {name: [json.dumps(run.settings.get(name), sort_keys=True) for run in runs] for name in names}
    shared = [item(f"{name}: {values[0]}") for name, values in texts.items() if len(set(values)) == 1]
    differing = [name for name in names if len(set(texts[name])) > 1]
    own = []
    for index, run in enumerate(runs):
        told = [f"{name} {texts[name][index]}" for name in differing if run.settings.get(name) is not None]
        own += [item(f"{run.model}, {run.method}: {', '.join(told)}")] if told else []
    return "".join(shared) + ("\nBy method:\n\n" + "".join(dict.fromkeys(own)) if own else "")


def _environment(runs: Sequence[Run]) -> str:
    lines = []
    for text in dict.fromkeys(json.dumps(run.environment, sort_keys=True) for run in runs):
        where = json.loads(text)
        lines.append(item(f"hardware: {where.get('gpu') or 'CPU'}, {where.get('num_processes') or 1} processes"))
        versions = where.get("versions") or {}
        lines.append(item(f"versions: {', '.join(f'{name} {value}' for name, value in versions.items())}"))
        for name in ("checkpoint", "git_commit", "kernel_backend", "image_size"):
            lines += [item(f"{name}: {where[name]}")] if where.get(name) is not None else []
    return "".join(dict.fromkeys(lines))


def _submissions(runs: Sequence[Run], collected: Collected, root: Path) -> str:
    lines = []
    for name, original, path in collected.copied:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        told = f"lmms-eval: {code(original)}, sha256 {digest[:16]}"
        lines.append(f"* {plain(name)}: `{path.relative_to(root)}` ({told})\n")
    lines += [item(f"missing: {line}").replace("\\*", "*") for line in collected.missing]  # patterns of files
    run_tasks = {task for run in runs for task in run.documents}
    lines += [
        f"* {board.name}: not run (`--tasks {board.task}`)\n" for board in LEADERBOARDS if board.task not in run_tasks
    ]
    return "".join(lines)


def _citation(runs: Sequence[Run]) -> str:
    lines = [*dict.fromkeys(paper for run in runs for paper in _papers(run)), ("lmms-eval", "2407.12772")]
    return "".join("* {0}: [arXiv {1}](https://arxiv.org/abs/{1})\n".format(*line) for line in lines)


def _papers(run: Run) -> tuple[tuple[str, str], ...]:
    """What the parts of a run's method declare; nothing for parts of a package that is not installed here."""
    from sparsemm_lmms.methods import METHODS, find_method
    from sparsemm_lmms.registry import allocator_names, scorer_names

    method = split_name(run.method).method
    if method == FREE:
        method = "+".join(str(run.settings.get(part)) for part in FREE_PARTS)
    scorer, _, allocator = method.partition("+")
    if method not in METHODS and (scorer not in scorer_names() or allocator not in allocator_names()):
        return ()
    return find_method(method).papers(run.settings)
