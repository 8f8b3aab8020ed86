"""What a sweep keeps on disk, and nothing else needs: every table and figure is made from it without a model.

<sweep>/sweep.json                 the plan and the environment
<sweep>/cells/<name>/cell.json     one run: settings, metrics, cache statistics; there only once it is complete
<sweep>/cells/<name>/samples.jsonl one line a document
<sweep>/cells.jsonl.xz             all of `cells/` in one file, to publish a sweep without its thousand files
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...head_scores import write_atomically

COMPACT = "cells.jsonl.xz"


@dataclass(frozen=True)
class Sample:
    """One document of one task under one cell.

    Attributes:
        scores: the host's per-document metrics that are numbers.
        kept_tokens: mean over layers and kv heads.
    """

    task: str
    doc_id: int
    scores: dict[str, float]
    answer: str
    target: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    kept_tokens: float | None = None


@dataclass(frozen=True)
class CellRecord:
    """One model, method and budget on all tasks of the sweep.

    Attributes:
        model: name of the family with its checkpoint, as tables show it.
        method: name of the method, or of the control (`permuted`, `layer_mean`, `random#3`).
        budget: tokens per kv head, or None for fullkv.
        variant: what an ablation changed, e.g. {"ratio": 0.3}; empty otherwise.
        settings: everything that decided the answers, as `CompressedModel.settings()` gives it.
        metrics: task -> metric -> the host's aggregated value.
        statistics: what `RunStatistics.metrics()` measured (kept_tokens, kv_bytes_used, tpot_ms...), by task.
        error: why the cell failed, or None.
        environment: versions, commit, GPU, kernel backend and checkpoint, as the host's results hold them.
    """

    name: str
    model: str
    family: str
    method: str
    budget: int | None
    variant: dict[str, Any]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    statistics: dict[str, dict[str, float]]
    seconds: float
    error: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = field(default=(), compare=False)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def write_cell(sweep: Path, record: CellRecord) -> None:
    """Store a cell: samples first, `cell.json` last, so a folder with that file is complete."""
    folder = sweep / "cells" / record.name
    lines = [json.dumps(asdict(sample), ensure_ascii=False, sort_keys=True) for sample in record.samples]
    write_text(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    values = asdict(record)
    del values["samples"]
    write_text(folder / "cell.json", json.dumps(values, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def read_cell(folder: Path) -> CellRecord:
    """A complete cell with its samples.

    Raises:
        ValueError: for a folder that is not what `write_cell` wrote.
    """
    try:
        values = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        lines = _lines((folder / "samples.jsonl").read_text(encoding="utf-8"))
        record = CellRecord(**values, samples=tuple(Sample(**json.loads(line)) for line in lines))
        if record.name != folder.name:  # the name says where more files of the cell are looked for
            raise ValueError(f"its cell.json calls itself {record.name!r}")
        return record
    except (TypeError, ValueError, FileNotFoundError, RecursionError) as error:
        raise ValueError(f"{folder} is not a complete cell of a sweep ({error}); delete it and run again.") from error


def _lines(text: str) -> list[str]:
    """The lines that we wrote. `str.splitlines` would also split at U+0085, U+2028 and others inside an answer."""
    return [line for line in text.split("\n") if line]


def read_cells(sweep: Path) -> Iterator[CellRecord]:
    """All complete cells of a sweep, by name: those of its folders, and those that stand in its compact file alone.

    Raises:
        ValueError: for a record that is damaged.
    """
    folders = {file.parent.name: file.parent for file in (sweep / "cells").glob("*/cell.json")}
    packed = {record.name: record for record in _read_compact(sweep / COMPACT)}
    for name in sorted({*folders, *packed}):
        yield read_cell(folders[name]) if name in folders else packed[name]


def write_compact(sweep: Path, records: Iterable[CellRecord]) -> Path:
    """Store cells in one compressed file, a line each; the same records give the same bytes."""
    lines = [json.dumps(_packed(record), ensure_ascii=False, sort_keys=True) + "\n" for record in records]
    data = lzma.compress("".join(lines).encode(), preset=9)  # its window spans cells: answers repeat
    path, part = sweep / COMPACT, sweep / f".{COMPACT}.{os.getpid()}"
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _read_compact(path: Path) -> Iterator[CellRecord]:
    if not path.exists():
        return
    try:
        for line in _lines(lzma.decompress(path.read_bytes()).decode()):
            values = json.loads(line)
            samples = [dict(zip(values["sample_fields"], row, strict=True)) for row in values.pop("samples")]
            del values["sample_fields"]
            record = CellRecord(**values, samples=tuple(Sample(**sample) for sample in samples))
            if record.name in ("", "..") or Path(record.name).name != record.name:
                raise ValueError(f"a cell calls itself {record.name!r}, which is no name of a folder")
            yield record
    except (lzma.LZMAError, EOFError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not what a sweep wrote ({error}); restore it from where it came.") from error


def _packed(record: CellRecord) -> dict[str, Any]:
    """Samples as rows, so that the names of their fields stand there once a cell."""
    names = [field.name for field in fields(Sample)]
    values = asdict(record)
    values["samples"] = [[sample[name] for name in names] for sample in values["samples"]]
    return {**values, "sample_fields": names}


def forget_cell(sweep: Path, name: str) -> None:
    """Remove a cell, so that it runs again."""
    shutil.rmtree(sweep / "cells" / name, ignore_errors=True)
