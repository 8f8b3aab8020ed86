"""Files of runs and sweeps, damaged in one place each: they are read, or one sentence names the file."""

from __future__ import annotations

import copy
import json
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.model_wrappers.lmms_eval.commands import rerun
from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan, open_sweep
from sparsemm_lmms.reports import plots
from sparsemm_lmms.reports.card import read_runs, write_card
from sparsemm_lmms.reports.report import write_report
from sparsemm_lmms.reports.store import COMPACT, read_cells, read_plan, write_cell, write_compact

from .records import cell
from .test_card import results

pytestmark = pytest.mark.filterwarnings("error")
OTHERS: list[Any] = [
    None,
    True,
    -1,
    10**39,
    1e308,
    float("nan"),
    "",
    "\0|\n",
    "a" * 300,
    "../..",
    [],
    {},
    [{}],
    {"a": []},
]


def damaged(value: Any) -> Iterator[Any]:
    """JSON values that differ from this one in one place: left out, or another value there."""
    yield from OTHERS
    for *steps, last in _places(value):
        for other in [*OTHERS, KeyError]:
            whole = copy.deepcopy(value)
            inner = whole
            for step in steps:
                inner = inner[step]
            inner[last] = other
            if other is KeyError:
                del inner[last]
            yield whole


def _places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*before, step)
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*before, step))


def refused(path: Path, read: Callable[[], Any]) -> bool:
    """Whether reading ends in a sentence that names the path; anything else but success fails the test."""
    try:
        read()
    except (ValueError, FileNotFoundError) as error:
        assert type(error) in (ValueError, FileNotFoundError) and str(path) in str(error) and "\n" not in str(error)
        return True
    return False


def make_card(path: Path) -> None:
    output = path.parent / "card.md"
    output.unlink(missing_ok=True)
    write_card(read_runs(path), output)


def test_results(tmp_path: Path) -> None:
    file = results(tmp_path / "run", "sparsemm", 64, {"docvqa_test": 2})
    found = []
    for value in damaged({"config": {}, **json.loads(file.read_text())}):
        file.write_text(json.dumps(value))
        found.append(refused(file, lambda: make_card(file)))
        assert refused(file, lambda: rerun(file, None))  # without the arguments of a command line at the least
    assert 100 < sum(found) < len(found) - 100


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for method, budget in (("fullkv", None), ("snapkv", 48), ("sparsemm", 48)):
        write_cell(tmp_path / "sweep", cell(method, budget, {"docvqa_test": {"anls": [1.0, 0.5]}}))
    return tmp_path / "sweep"


@pytest.mark.parametrize("name", ["cell.json", "samples.jsonl"])
def test_cells(sweep: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(plots, "draw", lambda *given: None)
    [folder] = (sweep / "cells").glob("*snapkv*")
    first = (folder / name).read_text() if name == "cell.json" else (folder / name).read_text().split("\n")[0]
    found = []
    for index, value in enumerate(damaged(json.loads(first))):
        (folder / name).write_text(json.dumps(value) + "\n")
        (sweep / COMPACT).unlink(missing_ok=True)
        found.append(refused(sweep, lambda: make_card(sweep)))
        if index % 10 == 0:
            refused(sweep, lambda: write_report(sweep, ["accuracy"]))
    assert sum(found) > 50 and not all(found)


def test_packed_cells(sweep: Path) -> None:
    path = write_compact(sweep, read_cells(sweep))
    packed = sweep.with_name("packed")
    packed.mkdir()
    first, *others = lzma.decompress(path.read_bytes()).decode().split("\n")
    found = []
    for value in damaged(json.loads(first)):
        (packed / COMPACT).write_bytes(lzma.compress("\n".join([json.dumps(value), *others]).encode(), preset=0))
        found.append(refused(packed, lambda: list(read_cells(packed))))
    assert sum(found) > 100 and not all(found)


def test_plans(tmp_path: Path) -> None:
    plan = make_plan(model_args="pretrained=demo,device=cpu", methods="snapkv", budgets="64", limit=2)
    open_sweep(tmp_path, plan)
    file = tmp_path / "sweep.json"
    found = []
    for value in damaged({**json.loads(file.read_text()), "commands": [["sweep"]], "versions": {}}):
        file.write_text(json.dumps(value))
        found.append(refused(tmp_path, lambda: open_sweep(tmp_path, plan)))
    assert sum(found) > 50 and not all(found)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for each kind of file."""
    root, made = tmp_path_factory.mktemp("whole"), cell("snapkv", 48, {"t": {"m": [1.0]}})
    results(root / "results", "sparsemm", 64, {"t": 1})
    write_cell(root / "cells", made)
    (root / "packed").mkdir()
    write_compact(root / "packed", [made])
    (root / "plan").mkdir()
    (root / "plan" / "sweep.json").write_text('{"settings": {"limit": 1}, "cells": ["a"]}')
    return root


@settings(max_examples=200, deadline=None, derandomize=True)
@given(pattern=st.sampled_from(["*_results.json", "cell.json", "samples.jsonl", COMPACT, "sweep.json"]), data=st.data())
def test_any_bytes(whole: Path, pattern: str, data: st.DataObject) -> None:
    [file] = whole.rglob(pattern)
    folder = whole / file.relative_to(whole).parts[0]
    content = file.read_bytes()
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, len(content)) | st.integers(start, min(start + 3, len(content))))
    put = data.draw(st.binary(max_size=6) | st.just(b"[" * 50_000))
    file.write_bytes(content[:start] + put + content[end:])
    try:
        refused(folder, lambda: read_plan(folder) if pattern == "sweep.json" else make_card(folder))
    finally:
        file.write_bytes(content)
