"""The command line and the demo sweep (on tiny random models: the code path, not the demo's accuracy)."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sparsemm_lmms
from sparsemm_lmms import HeadScores, demo_sweep
from sparsemm_lmms.cli import app
from sparsemm_lmms.demo_sweep import ROWS, Document

from .wrappers import tiny
from .wrappers.conftest import conversation

START = "import sys; from sparsemm_lmms.cli import main; sys.argv[0] = 'sparsemm-lmms'; "


def run(*arguments: str, after: str = "") -> subprocess.CompletedProcess[str]:
    code = f"{START}\ntry: main()\nfinally: {after or 'pass'}"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_tasks_prints_one_line_without_importing_torch() -> None:
    done = run(
        "tasks", after="print(*{'torch', 'transformers', 'lmms_eval', 'numpy'} & set(sys.modules), file=sys.stderr)"
    )
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert (Path(done.stdout.strip()) / "__init__.py").is_file()
    assert done.stderr.strip() == ""


def test_version() -> None:
    for argument in ("version", "--version"):
        assert run(argument).stdout.strip() == sparsemm_lmms.__version__


def test_help_names_the_commands() -> None:
    text = run("--help").stdout
    assert all(command in text for command in ("tasks", "demo", "version"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "snapkw"], "Unknown method 'snapkw'; known: .* Did you mean 'snapkv'"),
        (["--budgets", "a,b"], "whole numbers"),
        (["--budgets", "16"], "must be larger than window_size=32"),
        (["--output", "plot.pdf"], "must end in .png"),
    ],
)
def test_mistakes_are_one_sentence(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert isinstance(result.exception, ValueError)  # `main` turns it into an exit with the sentence
    with pytest.raises(ValueError, match=sentence):
        raise result.exception


def test_a_mistake_leaves_no_traceback() -> None:
    done = run("demo", "--budgets", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("sparsemm-lmms: budget=0 must be larger") and done.stderr.count("\n") == 1


@pytest.fixture
def tiny_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny random checkpoints and three questions in place of the packaged demo."""
    folders = {family: make(tmp_path / family) for family, make in tiny.MAKERS.items()}
    monkeypatch.setattr("sparsemm_lmms.demo.model_path", lambda family: str(folders[family]))
    monkeypatch.setattr(demo_sweep.Sweep, "_packaged_scores", lambda self, config, path: HeadScores.random(3, 4, 5))
    monkeypatch.setattr(demo_sweep, "TASKS", dict.fromkeys(demo_sweep.TASKS, demo_sweep.GenerationSettings(6)))

    def documents(task: str, limit: int) -> list[Document]:
        questions = [conversation(i, f"Read {task}.", size=(140, 112)) for i in range(limit)]
        return [Document(question, "abc") for question in questions]

    monkeypatch.setattr(demo_sweep, "read_documents", documents)
    return tmp_path


def test_demo_writes_table_plot_and_numbers(tiny_demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    output = tiny_demo / "new" / "plot.png"
    result = CliRunner().invoke(
        app, ["demo", "--family", "all", "--limit", "3", "--budgets", "36,400", "--output", str(output)]
    )
    assert result.exit_code == 0, result.output
    assert all(row in result.output for row in ROWS) and "OCR characters" in result.output
    assert output.read_bytes().startswith(b"\x89PNG")
    cells: list[dict[str, Any]] = json.loads(output.with_suffix(".json").read_text())["cells"]
    assert len(cells) == 2 * 2 * (1 + 2 * (len(ROWS) - 1))
    for cell in cells:
        full = next(
            c for c in cells if c["method"] == "fullkv" and (c["family"], c["task"]) == (cell["family"], cell["task"])
        )
        if cell["budget"] == 400:  # covers the prompt: nothing is lost
            assert cell["characters"] == full["characters"] and cell["kept_tokens"] == full["kept_tokens"]
        elif cell["budget"] == 36 and cell["method"] in ("snapkv", "local_window"):
            assert cell["kept_tokens"] == 36 < cell["prompt_tokens"] and cell["kv_bytes"] < full["kv_bytes"]
            assert cell["kv_bytes_used"] < full["kv_bytes_used"]
        assert cell["documents"] == 3 and math.isfinite(cell["ms_per_token"])


def test_controls_are_sparsemm_with_other_scores(tiny_demo: Path) -> None:
    sweep = demo_sweep.Sweep("llava_next", 1, seed=3)
    scores = {row: sweep._compression(row, 36, draw=2) for row in ("sparsemm", "permuted", "layer_mean", "random")}
    assert scores["sparsemm"][1] is sweep.scores
    assert sorted(scores["permuted"][1].values.flat) == sorted(sweep.scores.values.flat)
    assert (scores["permuted"][1].values != sweep.scores.values).any()
    assert (scores["layer_mean"][1].values == sweep.scores.values.mean(1, keepdims=True)).all()
    assert [scores[row][0].method for row in scores] == ["sparsemm", "sparsemm", "sparsemm", "random"]
    assert scores["random"][0].seed == 5  # a table of its own for each batch of documents
