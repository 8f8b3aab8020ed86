"""Sweeps on the packaged demo model: what they record, how they go on, and what happens when something breaks."""

from __future__ import annotations

import errno
import json
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from typer.testing import CliRunner

from sparsemm_lmms import head_scores
from sparsemm_lmms.cli import app, tasks_folder
from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan, open_sweep
from sparsemm_lmms.model_wrappers.sweeps.runner import OtherLoad, host_defaults, read_samples, run
from sparsemm_lmms.reports.store import CellRecord, forget_cell, read_cells

from .kill_run import Silent, contents, start, warm_up, with_kills

ARGUMENTS: dict[str, Any] = {
    "model_args": "pretrained=demo,device=cpu",
    "methods": "sparsemm,permuted#2",
    "budgets": "64",
    "limit": 2,
    "batch_size": 2,
}
LABEL = "llava_next_demo"


class Watching(Silent):
    """Remembers which cells were run."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def starting(self, cell: Any) -> None:
        self.started.append(cell.name.removeprefix(f"{LABEL}__"))


def do(output: Path, **changed: Any) -> list[str]:
    """Run a sweep; returns the cells that had to run."""
    plan = make_plan(**{**ARGUMENTS, **changed})
    watching = Watching()
    open_sweep(output, plan)
    run(plan, output, watching)
    return watching.started


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("datasets"))
        patch.setattr("lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: folder)
        yield


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory, datasets: None) -> Path:
    """A finished sweep of three cells."""
    output = tmp_path_factory.mktemp("sweep") / "run"
    assert do(output) == ["fullkv", "sparsemm__b64", "permuted_2__b64"]
    return output


def records(output: Path) -> dict[str, CellRecord]:
    return {record.name.removeprefix(f"{LABEL}__"): record for record in read_cells(output)}


def test_a_cell_is_what_lmms_eval_finds_alone(swept: Path) -> None:
    manager = TaskManager(include_path=str(tasks_folder()), include_defaults=False, model_name="llava_next_sparsemm")
    alone = simple_evaluate(
        "llava_next_sparsemm",
        "pretrained=demo,device=cpu,budget=64,head_scores=permuted,seed=2",
        tasks=["sparsemm_demo_ocr"],
        task_manager=manager,
        batch_size=2,
        limit=2,
        bootstrap_iters=0,
        cli_args=host_defaults(),
    )
    record = records(swept)["permuted_2__b64"]
    assert record.settings == alone["sparsemm_lmms"]["settings"]
    names = ("character_accuracy", "anls")
    values = alone["results"]["sparsemm_demo_ocr"]
    assert record.metrics["sparsemm_demo_ocr"] == {name: values[f"{name},none"] for name in names}
    samples = [sample for sample in record.samples if sample.task == "sparsemm_demo_ocr"]
    for sample, line in zip(samples, alone["samples"]["sparsemm_demo_ocr"], strict=True):
        counts = line["token_counts"][0]
        assert (sample.doc_id, sample.target) == (line["doc_id"], line["target"])
        assert (sample.answer, sample.scores) == (line["filtered_resps"][0], {name: line[name] for name in names})
        assert (sample.prompt_tokens, sample.kept_tokens) == (counts["input_tokens"], counts["kept_tokens"])


def test_records_tell_method_budget_and_what_was_kept(swept: Path) -> None:
    found = records(swept)
    assert [(r.method, r.budget, r.error) for r in (found["fullkv"], found["permuted_2__b64"])] == [
        ("fullkv", None, None),
        ("permuted#2", 64, None),
    ]
    assert list(found["fullkv"].metrics) == ["sparsemm_demo_ocr", "sparsemm_demo_vqa"]
    for task, full in found["fullkv"].statistics.items():
        assert full["kept_tokens"] == full["prompt_tokens"] > 400
        assert found["sparsemm__b64"].statistics[task]["kept_tokens"] == pytest.approx(64, abs=1)
        assert found["sparsemm__b64"].statistics[task]["num_requests"] == 2
        assert 0 <= full["other_cores"] <= (os.cpu_count() or 1)


def test_the_load_of_others_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 s, in which all cores were busy for 25 s and this process for 9 s: others kept 1.6 cores busy."""
    clock = iter([(100.0, 50.0, 7.0), (110.0, 75.0, 16.0)])
    monkeypatch.setattr(OtherLoad, "_seconds", staticmethod(lambda: next(clock)))
    assert OtherLoad().cores() == pytest.approx(1.6)
    monkeypatch.undo()
    (wall, busy, own), (later, more, mine) = OtherLoad._seconds(), OtherLoad._seconds()
    assert wall < later and busy <= more and own <= mine and own < busy


def test_only_what_is_missing_runs(swept: Path, tmp_path: Path) -> None:
    before = contents(swept)
    assert do(swept) == []
    forget_cell(swept, f"{LABEL}__sparsemm__b64")
    assert do(swept) == ["sparsemm__b64"]
    assert contents(swept) == before


def test_methods_and_budgets_may_be_added_but_settings_stay(swept: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="other settings .limit 2 there, 3 here; seed 0 there, 4 here.; repeat its"):
        do(swept, limit=3, seed=4)
    with pytest.raises(ValueError, match="model_args .* there, .*'ratio': '0.3'.* here"):
        do(swept, model_args="pretrained=demo,device=cpu,ratio=0.3")
    do(swept, methods="local_window", budgets="48")
    assert {"local_window__b48", "sparsemm__b64"} <= set(records(swept))
    planned = json.loads((swept / "sweep.json").read_text())["cells"]
    names = ("fullkv", "sparsemm__b64", "permuted_2__b64", "local_window__b48")
    assert planned == [f"{LABEL}__{name}" for name in names]
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files that are no sweep"):
        do(tmp_path)


def test_a_failing_cell_is_recorded_and_runs_again(datasets: None, tmp_path: Path) -> None:
    # half of the heads are masked by `mask`, so there are too few others: only the loaded model can tell
    arguments = ["--model_args", "pretrained=demo,device=cpu,mask_ratio=0.9", "--methods", "mask_random,mask"]
    rest = ["--limit", "1", "--tasks", "sparsemm_demo_vqa", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["sweep", *arguments, *rest])
    assert result.exit_code == 1
    assert "1 of 3 cells failed (ValueError: mask_ratio=0.9 leaves" in str(result.exception)
    found = records(tmp_path / "run")
    assert [name for name, record in found.items() if record.error] == ["mask_random"]
    assert found["mask"].metrics and not found["mask_random"].metrics
    assert "mask_ratio=0.9 leaves" in (tmp_path / "run" / "log.txt").read_text()
    again = {"model_args": arguments[1], "methods": "mask_random,mask", "budgets": "64", "limit": 1, "batch_size": 1}
    assert do(tmp_path / "run", **again, tasks="sparsemm_demo_vqa") == ["mask_random"]


def test_a_full_disk_ends_the_sweep_and_leaves_nothing_half_written(
    datasets: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = head_scores.os.fsync

    def full(handle: int) -> None:
        if (tmp_path / "run" / "cells" / f"{LABEL}__fullkv" / "cell.json").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        free(handle)

    monkeypatch.setattr(head_scores.os, "fsync", full)
    arguments = ["--model_args", ARGUMENTS["model_args"], "--methods", "sparsemm", "--budgets", "64", "--limit", "1"]
    result = CliRunner().invoke(app, ["sweep", *arguments, "--batch_size", "2", "--output", str(tmp_path / "run")])
    assert "No space left on device; complete cells are kept" in str(result.exception)
    assert "sparsemm__b64" in str(result.exception) and isinstance(result.exception, OSError)  # a sentence in `main`
    assert [*(tmp_path / "run" / "cells" / f"{LABEL}__sparsemm__b64").iterdir()] == []
    monkeypatch.undo()
    assert do(tmp_path / "run", limit=1, methods="sparsemm") == ["sparsemm__b64"]


def test_killed_at_random_moments_it_finds_the_same(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = {**ARGUMENTS, "tasks": "sparsemm_demo_vqa", "methods": "sparsemm,snapkv", "budgets": "64,48"}
    warm_up()
    begun = time.perf_counter()
    both = [start(whole, arguments) for _ in range(2)]  # they share the cells
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    kills = with_kills(broken, arguments, 3, (time.perf_counter() - begun) / 5, random.Random())
    assert kills and contents(broken) == contents(whole), kills
    assert len(contents(whole)) == 5


def test_documents_of_tasks_that_score_otherwise() -> None:
    base = {"doc_id": "3", "target": ["a", "b"], "token_counts": [None], "filtered_resps": [[0.5, True]], "doc": {}}
    ocrbench = {**base, "ocrbench_accuracy": {"question": "q", "score": 1}, "submission": {"score": 7}}
    samples = read_samples("task", [ocrbench, {**base, "other": 0.0}, {**base, "doc_id": 4, "exact": True}])
    assert [(s.doc_id, s.scores, s.target) for s in samples] == [
        (3, {"ocrbench_accuracy": 1.0}, '["a", "b"]'),
        (4, {"exact": 1.0}, '["a", "b"]'),
    ]
    choices = read_samples("task", [{**base, "filtered_resps": [[0.5, True], [0.7, False]]}])
    assert choices[0].answer == "[[0.5, true], [0.7, false]]"
    assert samples[0].answer == "[0.5, true]" and samples[0].kept_tokens is None
