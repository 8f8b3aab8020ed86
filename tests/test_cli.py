"""The command line: what answers at once, what mistakes look like, and the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import sparsemm_lmms
from sparsemm_lmms import catalog
from sparsemm_lmms.cli import app
from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.reports.store import read_cells

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
    assert all(command in text for command in ("tasks", "demo", "sweep", "version"))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "snapkw"], "Unknown method 'snapkw'; known: .* Did you mean 'snapkv'"),
        (["--budgets", "a,b"], "whole numbers"),
        (["--budgets", "16"], "must be larger than window_size=32"),
        (["--methods", "random#x"], "draws are whole numbers"),
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
    assert done.stderr.startswith("sparsemm-lmms: budget=0 must be at least 1") and done.stderr.count("\n") == 1


def test_demo_is_a_sweep_on_the_packaged_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(tmp_path / "datasets"))
    monkeypatch.setenv("COLUMNS", "120")
    output = tmp_path / "new" / "demo"
    arguments = ["--family", "all", "--limit", "1", "--budgets", "64", "--methods", "sparsemm", "--output", str(output)]
    result = CliRunner().invoke(app, ["demo", *arguments])
    assert result.exit_code == 0, result.output
    cells = [f"{family}_demo__{cell}" for family in sorted(DEMO_FAMILIES) for cell in ("fullkv", "sparsemm__b64")]
    assert sorted(record.name for record in read_cells(output)) == cells
    assert all(name in result.output for name in [*cells, "fullkv", "sparsemm"])
    again = CliRunner().invoke(app, ["demo", *arguments])  # all is there: only the table is made anew
    assert "6 cells, 6 of them done before" in again.output and again.exit_code == 0


def test_readme_tells_methods_and_settings_as_they_are_declared() -> None:
    readme = (Path(sparsemm_lmms.__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    settings = [row for row in catalog.setting_rows() if row[0] != "`method`"]
    assert catalog.as_markdown(("method", "which tokens of a head stay", "how many"), catalog.method_rows()) in readme
    assert catalog.as_markdown(("setting", "default", "of", "meaning"), settings) in readme


def test_methods_prints_all_parts() -> None:
    printed = CliRunner().invoke(app, ["methods", "--markdown"]).stdout
    assert "| scorer | `keydiff` |" in printed and "| allocator | `pyramid` |" in printed and "`mask_ratio`" in printed
    assert "keydiff" in CliRunner().invoke(app, ["methods"]).stdout
