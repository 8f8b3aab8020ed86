"""Cells come back as they were written, whatever a model answers; a name never leads out of the sweep."""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.reports import store
from sparsemm_lmms.reports.store import (
    COMPACT,
    forget_cell,
    read_cell,
    read_cells,
    read_plan,
    write_cell,
    write_compact,
)

from .test_statistics import cell

NAMES = ["../../private", "/", "..", "a/b", ""]


def record(answer: str):
    made = cell("snapkv", 48, {"t": {"m": [1.0, 0.0]}})
    return replace(made, samples=tuple(replace(sample, answer=answer) for sample in made.samples))


@pytest.mark.parametrize("answer", ["a\x85b", "a\u2028b\u2029", "\x1c\x0b\r\n", "| $x$ <b>"])
def test_line_breaks_of_unicode_in_an_answer(tmp_path: Path, answer: str) -> None:
    made = record(answer)
    write_cell(tmp_path, made)
    back = read_cell(tmp_path / "cells" / made.name)
    assert (back, back.samples) == (made, made.samples)
    packed = tmp_path / "packed"
    packed.mkdir()
    write_compact(packed, [made])
    (back,) = read_cells(packed)
    assert (back, back.samples) == (made, made.samples)


@settings(max_examples=60, deadline=None)
@given(answer=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_answer_comes_back(tmp_path_factory: pytest.TempPathFactory, answer: str) -> None:
    folder, made = tmp_path_factory.mktemp("sweep"), record(answer)
    write_cell(folder, made)
    assert read_cell(folder / "cells" / made.name).samples == made.samples


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_its_folder(tmp_path: Path, name: str) -> None:
    made = record("x")
    write_cell(tmp_path, made)
    file = tmp_path / "cells" / made.name / "cell.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "name": name}))
    with pytest.raises(ValueError, match="calls itself"):
        list(read_cells(tmp_path))


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_name_is_no_path(tmp_path: Path, name: str) -> None:
    write_compact(tmp_path, [replace(record("x"), name=name)])
    with pytest.raises(ValueError, match="no name of a folder"):
        list(read_cells(tmp_path))


@pytest.mark.parametrize("name", [*NAMES, ".", "a\0b"])
def test_no_name_leads_out_of_the_sweep(tmp_path: Path, name: str) -> None:
    sweep, private = tmp_path / "sweep", tmp_path / "private" / "file"
    write_cell(sweep, record("x"))
    private.parent.mkdir()
    private.write_text("mine")
    with pytest.raises(ValueError, match="no name of a folder"):
        forget_cell(sweep, name)
    with pytest.raises(ValueError, match="no name of a folder"):
        write_cell(sweep, replace(record("x"), name=name))
    assert private.exists() and len(list(read_cells(sweep))) == 1
    forget_cell(sweep, record("x").name)
    forget_cell(sweep, record("x").name)  # it need not be there
    assert not list(read_cells(sweep))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda data: data[:-20], "its end is missing"),
        (lambda data: b"", "its end is missing"),
        (lambda data: data + data, "stands behind its end"),
        (lambda data: lzma.compress(2 * lzma.decompress(data)), "twice"),
        (lambda data: lzma.compress(b" " * 5000), "more than a sweep holds"),
        (lambda data: lzma.compress(b"\xff"), "line 1 is not UTF-8"),
        (lambda data: data[:30] + b"\0\0" + data[32:], "Corrupt"),
    ],
)
def test_a_compact_file_that_no_sweep_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[bytes], bytes], said: str
) -> None:
    path = write_compact(tmp_path, [record("x")])
    monkeypatch.setattr(store, "LARGEST_UNPACKED", 4000)
    assert len(list(read_cells(tmp_path))) == 1
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} is not what a sweep wrote: .*({said}).*; restore it"):
        list(read_cells(tmp_path))


def test_a_compact_file_is_read_by_others_and_leaves_no_parts(tmp_path: Path) -> None:
    umask = os.umask(0o027)
    try:
        path = write_compact(tmp_path, [record("x")])
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o640 and os.listdir(tmp_path) == [COMPACT]


def test_a_plan_that_no_sweep_wrote(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == {}
    file = tmp_path / "sweep.json"
    file.write_text('{"settings": null, "models": {"m": {"model_args": {"a": 1}}}}')
    assert read_plan(tmp_path) == {"models": {"m": {"model_args": {"a": 1}}}}
    for text in ("[]", '{"settings": 1}', '{"models": {"m": {}}}', '{"models": []}', '{"cells": [1]}', "{", "[" * 9999):
        file.write_text(text)
        with pytest.raises(ValueError, match=str(file)):
            read_plan(tmp_path)
