"""The matrix of `sparsemm-lmms families --check`: its quick part whole, each other column on some of the rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from transformers.models.smolvlm import processing_smolvlm as smolvlm
from typer.testing import CliRunner

from sparsemm_lmms.cli import app
from sparsemm_lmms.families import FAMILIES, family_for
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.loading import find_family, load_checkpoint, read_config
from sparsemm_lmms.model_wrappers.matrix import checks, makers
from sparsemm_lmms.model_wrappers.matrix.commands import table

from ..vlmevalkit.conftest import IS_REAL

DOCS = Path(__file__).parents[2] / "docs"
KINDS = sorted(makers.MAKERS)
SLOW = [cell for cell in checks.CELLS if cell not in checks.QUICK]


def cells_of(number: int, kind: str) -> list[str]:
    """The quick ones, and every fourth of the others, shifted from row to row."""
    family = family_for(kind.partition(",")[0])
    assert family is not None
    shifted = [cell for column, cell in enumerate(SLOW) if (number + column) % 4 == 0]
    missing = {"video"} if not family.reads_video else set()
    missing |= {"VLMEvalKit"} if IS_REAL else set()  # that one runs in processes of its own
    return [cell for cell in (*checks.QUICK, *shifted) if cell not in missing]


@pytest.mark.parametrize(("number", "kind"), enumerate(KINDS), ids=KINDS)
def test_a_row(number: int, kind: str) -> None:
    if kind == "smolvlm" and smolvlm.num2words is None:
        pytest.skip("transformers' processor of SmolVLM2 needs num2words")
    cells = cells_of(number, kind)
    assert checks.check(kind, cells) == dict.fromkeys(cells, checks.PASSED)


def test_every_model_type_has_a_row() -> None:
    known = {model_type for family in FAMILIES.values() for model_type in family.architectures}
    assert {kind.partition(",")[0] for kind in makers.MAKERS} == known


def test_the_documents_show_every_cell() -> None:
    """`sparsemm-lmms families --check --output docs/families.json --markdown`, where VLMEvalKit is importable."""
    matrix = json.loads((DOCS / "families.json").read_text())
    assert list(matrix["cells"]) == list(checks.CELLS) and set(matrix["rows"]) == set(makers.MAKERS)
    for kind, row in matrix["rows"].items():
        family = FAMILIES[row["family"]]
        missing = {} if family.reads_video else {"video": "no video: images only"}
        assert row["cells"] == dict.fromkeys(checks.CELLS, checks.PASSED) | missing, kind
    header, rows = table(matrix)
    page = (DOCS / "families.md").read_text()
    assert all(f"| {' | '.join(line)} |\n" in page for line in [header, *rows])


def test_a_failing_cell_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(tiny: checks.Tiny) -> None:
        raise ValueError("no such\nlayer")

    monkeypatch.setitem(checks.CELLS, "padded batch", broken)
    stranger = dataclasses.replace(FAMILIES["llava"], model_type="mine", also={})
    monkeypatch.setitem(FAMILIES, "mine", stranger)
    file = tmp_path / "matrix.json"
    result = CliRunner().invoke(app, ["families", "--check", "--quick", "--family", "gemma3", "--output", str(file)])
    assert str(result.exception).splitlines()[1:] == ["gemma3, padded batch: ValueError: no such layer"]
    assert isinstance(result.exception, SystemExit)
    cells = dict.fromkeys(checks.QUICK, checks.PASSED) | {"padded batch": "failed: ValueError: no such layer"}
    assert json.loads(file.read_text())["rows"] == {"gemma3": {"family": "gemma3", "cells": cells}}
    result = CliRunner().invoke(app, ["families", "--check", "--family", "mine", "--markdown"], catch_exceptions=False)
    assert f"| `mine` | mine |{' not checked: no tiny model |' * len(checks.CELLS)}" in result.stdout


def test_families_are_listed() -> None:
    listed = CliRunner().invoke(app, ["families", "--markdown"], catch_exceptions=False).stdout
    assert listed in (DOCS / "families.md").read_text()
    for arguments, sentence in (
        (["--family", "gema3"], "Unknown --family 'gema3'; .* Did you mean 'gemma3'"),
        (["--quick"], "--quick belongs to the checks; add --check"),
    ):
        with pytest.raises(ValueError, match=sentence):
            CliRunner().invoke(app, ["families", *arguments], catch_exceptions=False)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smolvlm, "num2words", smolvlm.num2words or print)
    options = RunOptions(str(makers.smolvlm(tmp_path)))
    monkeypatch.setattr(smolvlm, "num2words", None)
    with pytest.raises(ValueError, match=r"pretrained=\S+ needs a package that is not installed here: .*num2words"):
        load_checkpoint(FAMILIES["smolvlm"], options, torch.device("cpu"))


def test_a_checkpoint_finds_its_family(tmp_path: Path) -> None:
    for kind in KINDS:
        kind, folder = kind.partition(",")[0], makers.MAKERS[kind](tmp_path / kind)
        family = find_family("vlm_snapkv", {"pretrained": str(folder)})
        assert family is family_for(kind)
        other = FAMILIES["gemma3" if family is not FAMILIES["gemma3"] else "llava"]
        with pytest.raises(ValueError, match=rf"'{kind}' checkpoint.*belongs to the {family.model_type}_\* models"):
            read_config(other, RunOptions(str(folder)))
