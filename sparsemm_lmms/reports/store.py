"""What a sweep keeps on disk, and nothing else needs: every table and figure is made from it without a model.

<sweep>/sweep.json                 the plan and the environment
<sweep>/cells/<name>/cell.json     one run: settings, metrics, cache statistics; there only once it is complete
<sweep>/cells/<name>/samples.jsonl one line a document
<sweep>/cells.jsonl.xz             all of `cells/` in one file, to publish a sweep without its thousand files
"""

from __future__ import annotations

import json
import lzma
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from sparsemm_lmms.head_scores import write_atomically
from sparsemm_lmms.json_files import LARGEST, checked, parse_json, quoted, read_bytes, read_json, read_text

T = TypeVar("T")
COMPACT = "cells.jsonl.xz"
LARGEST_UNPACKED = 16 * LARGEST
"""Bytes of records that a compact file may hold; one of them has at most `LARGEST`."""


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
    variant: dict[str, float]
    settings: dict[str, Any]
    metrics: dict[str, dict[str, float]]
    statistics: dict[str, dict[str, float]]
    seconds: float
    error: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = field(default=(), compare=False)


_KINDS: dict[type, dict[str, Any]] = {made: get_type_hints(made) for made in (Sample, CellRecord)}
_NEEDED: dict[type, list[str]] = {
    made: [f.name for f in fields(made) if f.default is MISSING and f.default_factory is MISSING] for made in _KINDS
}
_PLAN_KINDS: dict[str, Any] = {
    "settings": dict | None,
    "models": dict[str, dict] | None,
    "cells": list[str] | None,
    "commands": list | None,
}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def read_plan(sweep: Path) -> dict[str, Any]:
    """What `sweep.json` holds: settings, models with their arguments, names of cells, commands; {} without the file.

    Raises:
        ValueError: for a file that no sweep wrote.
    """
    path, what, mend = sweep / "sweep.json", "Plan", "restore it, or begin a new sweep"
    try:
        found = checked(read_json(path, what, mend), _PLAN_KINDS, f"{what} {path}", mend)
        for about in (found.get("models") or {}).values():
            checked(about, {"model_args": dict}, f"A model in {path}", mend)
    except FileNotFoundError:
        return {}
    return {name: value for name, value in found.items() if value is not None}


def cell_folder(sweep: Path, name: str) -> Path:
    """The folder of a cell, inside the sweep whatever its name.

    Raises:
        ValueError: for a name that is none of a folder.
    """
    if name in ("", "..") or Path(name).name != name or "\0" in name:
        raise ValueError(f"a cell calls itself {quoted(name)}, which is no name of a folder")
    return sweep / "cells" / name


def write_cell(sweep: Path, record: CellRecord) -> None:
    """Store a cell: samples first, `cell.json` last, so a folder with that file is complete."""
    folder = cell_folder(sweep, record.name)
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
    mend = "delete the folder and run again"
    try:
        values = read_json(folder / "cell.json", "Record", mend)
        lines = _lines(read_text(folder / "samples.jsonl", "Samples", mend))
        samples = [parse_json(line, f"line {number} of its samples", mend) for number, line in enumerate(lines, 1)]
        record = _record(values, samples, mend)
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is not a complete cell of a sweep: {error}") from None
    if record.name != folder.name:  # the name says where more files of the cell are looked for
        raise ValueError(f"{folder} is not a complete cell of a sweep: it calls itself {quoted(record.name)}; {mend}.")
    return record


def _record(values: dict[str, Any], samples: list[Any], mend: str) -> CellRecord:
    """A record from the JSON of its fields and of its samples.

    Raises:
        ValueError: for what has other fields, or values of other types.
    """
    made = [_made(Sample, value, f"sample {number}", mend) for number, value in enumerate(samples, 1)]
    return replace(_made(CellRecord, values, "the record", mend), samples=tuple(made))


def _made(made: type[T], values: Any, where: str, mend: str) -> T:
    kinds = _KINDS[made]
    checked(values, dict, where, mend)
    for name in values:
        if name not in kinds or name == "samples":
            raise ValueError(f"{where} has the unknown field {quoted(name)}; {mend}.")
    for name in _NEEDED[made]:
        if name not in values:
            raise ValueError(f"{where} lacks the field {name}; {mend}.")
    checked(values, {name: kinds[name] for name in values}, where, mend)
    return made(**values)


def _lines(text: str) -> list[str]:
    """The lines that we wrote. `str.splitlines` would also split at U+0085, U+2028 and others inside an answer."""
    return [line for line in text.split("\n") if line]


def read_cells(sweep: Path) -> Iterator[CellRecord]:
    """All complete cells of a sweep, by name: those of its folders, and those that stand in its compact file alone.

    Raises:
        ValueError: for a record that is damaged.
    """
    folders = {file.parent.name: file.parent for file in (sweep / "cells").glob("*/cell.json")}
    packed = _read_compact(sweep / COMPACT)
    for name in sorted({*folders, *packed}):
        yield read_cell(folders[name]) if name in folders else packed[name]


def write_compact(sweep: Path, records: Iterable[CellRecord]) -> Path:
    """Store cells in one compressed file, a line each; the same records give the same bytes."""
    lines = [json.dumps(_packed(record), ensure_ascii=False, sort_keys=True) + "\n" for record in records]
    path = sweep / COMPACT
    write_atomically(path, lzma.compress("".join(lines).encode(), preset=9))  # its window spans cells: answers repeat
    return path


def _read_compact(path: Path) -> dict[str, CellRecord]:
    """The cells of a compact file by their names; none without the file."""
    mend = "restore it from where it came"
    records: dict[str, CellRecord] = {}
    try:
        packed = read_bytes(path, "File", mend)
    except FileNotFoundError:
        return {}
    try:
        for number, line in enumerate(_unpacked(packed, mend), 1):
            record = _unpacked_record(parse_json(line, f"line {number}", mend), mend)
            cell_folder(path.parent, record.name)
            if record.name in records:
                raise ValueError(f"it has the cell {quoted(record.name)} twice; {mend}.")
            records[record.name] = record
    except lzma.LZMAError as error:
        raise ValueError(f"{path} is not what a sweep wrote: {error}; {mend}.") from None
    except ValueError as error:
        raise ValueError(f"{path} is not what a sweep wrote: {error}") from None
    return records


def _unpacked(packed: bytes, mend: str) -> Iterator[bytes]:
    """The lines of a compact file, with bounds on each and on all of them together."""
    decompressor = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST)
    total, rest = 0, b""
    while not decompressor.eof:
        if decompressor.needs_input and not packed:
            raise ValueError(f"its end is missing; {mend}.")
        piece = decompressor.decompress(packed, 2**24)
        packed, total = b"", total + len(piece)
        *lines, rest = (rest + piece).split(b"\n")
        if total > LARGEST_UNPACKED or len(rest) > LARGEST:
            raise ValueError(f"it unpacks to more than a sweep holds; {mend}.")
        yield from filter(None, [*lines, rest] if decompressor.eof else lines)
    if decompressor.unused_data:
        raise ValueError(f"something stands behind its end; {mend}.")


def _unpacked_record(values: Any, mend: str) -> CellRecord:
    kinds: dict[str, Any] = {"samples": list[list], "sample_fields": list[str]}
    checked(values, kinds, "a record", mend)
    samples, names = values.pop("samples"), values.pop("sample_fields")
    if any(len(row) != len(names) for row in samples):
        raise ValueError(f"a record has samples without {len(names)} fields; {mend}.")
    return _record(values, [dict(zip(names, row, strict=True)) for row in samples], mend)


def _packed(record: CellRecord) -> dict[str, Any]:
    """Samples as rows, so that the names of their fields stand there once a cell."""
    names = [field.name for field in fields(Sample)]
    values = asdict(record)
    values["samples"] = [[sample[name] for name in names] for sample in values["samples"]]
    return {**values, "sample_fields": names}


def forget_cell(sweep: Path, name: str) -> None:
    """Remove a cell, so that it runs again.

    Raises:
        ValueError: for a name that is none of a folder.
    """
    with suppress(FileNotFoundError):
        shutil.rmtree(cell_folder(sweep, name))
