"""Cells come back as they were written, whatever a model answers; a name never leads out of the sweep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.model_wrappers.sweeps.store import read_cell, read_cells, write_cell, write_compact

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
