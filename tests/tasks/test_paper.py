"""The eight tasks of the paper from document to score with the host's own code, offline, on a demo model."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.tasks import TaskManager, get_task_dict

from . import documents

JAVA = "java is missing: the host's caption metrics (CIDEr, METEOR) call it"
METRICS = {
    "docvqa_val": "anls",
    "ocrbench": "ocrbench_accuracy",
    "textvqa_val": "exact_match",
    "chartqa": "relaxed_overall",
    "mmbench_en_dev_static": "gpt_eval_score",
    "gqa": "exact_match",
    "vqav2_val": "exact_match",
}
"""Task -> the metric of the paper; `textcaps_val` has a test of its own."""


def run(
    manager: TaskManager, tasks: list[Any], out: Path, name: str, budget: int, predict_only: bool = False
) -> dict[str, Any]:
    manager.model_name = name
    return simple_evaluate(
        name,
        f"pretrained=demo,budget={budget}",
        tasks=tasks,
        task_manager=manager,
        batch_size=1,
        bootstrap_iters=0,
        predict_only=predict_only,
        cli_args=argparse.Namespace(output_path=str(out), process_with_media=False),
    )


def scores(results: dict[str, Any]) -> dict[str, float]:
    return {task: results["results"][task][f"{metric},none"] for task, metric in METRICS.items()}


def answers(results: dict[str, Any]) -> dict[str, list[str]]:
    return {task: [s["filtered_resps"][0] for s in samples] for task, samples in results["samples"].items()}


def files(results: dict[str, Any], out: Path) -> dict[str, Path]:
    """What a run has written into its folder: name -> file."""
    folder = out / results["sparsemm_lmms"]["run"]
    return {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_seven_tasks_from_document_to_score(
    family: str, manager: TaskManager, hub: Path, enter: Callable[[Path], None], tmp_path: Path
) -> None:
    enter(hub)
    full = run(manager, list(METRICS), tmp_path, f"{family}_fullkv", 64)
    said = answers(full)
    assert set(said) == set(METRICS) and all(
        text for task in set(said) - {"mmbench_en_dev_static"} for text in said[task]
    )

    # documents whose reference answers are what the uncompressed model says: agreement with it is a perfect score
    references = {task: [text.strip() for text in texts] for task, texts in said.items()}  # hosts strip answers
    enter(documents.write(tmp_path / "agree", answers=references))
    enough = run(manager, list(METRICS), tmp_path, f"{family}_sparsemm", 2000)
    assert answers(enough) == said
    for task, score in scores(enough).items():
        if task == "ocrbench":
            assert score == documents.COUNT / 1000  # of the whole benchmark's 1000
        elif task == "mmbench_en_dev_static":
            assert score == scores(full)[task]
        else:
            assert score == 1, task
    small = run(manager, list(METRICS), tmp_path, f"{family}_sparsemm", 48)
    assert answers(small) != said and scores(small)["ocrbench"] < scores(enough)["ocrbench"]
    assert all(scores(small)[task] <= scores(enough)[task] for task in set(METRICS) - {"mmbench_en_dev_static"})

    for results in (full, enough, small):
        written = files(results, tmp_path)
        assert {"submissions/mmbench_en_dev_static_results.json", "results/ocrbench_results.txt"} < set(written)
        table = pandas.read_excel(written["submissions/mmbench_en_dev_results.xlsx"], keep_default_na=False)
        assert list(map(str, table["prediction"])) == answers(results)["mmbench_en_dev_static"]
        [submission] = [path for name, path in written.items() if "textvqa_submission_" in name]
        assert [entry["question_id"] for entry in json.loads(submission.read_text())] == [200, 201]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason=JAVA)
def test_captions_from_document_to_score(
    manager: TaskManager, hub: Path, enter: Callable[[Path], None], tmp_path: Path
) -> None:
    enter(hub)
    said = answers(run(manager, ["textcaps_val"], tmp_path, "llava_next_fullkv", 64, predict_only=True))
    enter(documents.write(tmp_path / "agree", answers=said))
    enough = run(manager, ["textcaps_val"], tmp_path, "llava_next_sparsemm", 2000)
    found = {name: value for name, value in enough["results"]["textcaps_val"].items() if "stderr" not in name}
    assert found["textcaps_ROUGE_L,none"] == pytest.approx(1) and found["textcaps_Bleu_1,none"] == pytest.approx(1)
    assert found["textcaps_CIDEr,none"] > 1 and found["textcaps_METEOR,none"] > 0.9, found
    captions = json.loads(files(enough, tmp_path)["submissions/textcaps_captions_val2014_alg_results.json"].read_text())
    assert answers(enough) == said
    assert [entry["caption"] for entry in captions] == [text.strip() for text in said["textcaps_val"]]  # by the host


def test_ocrbench_twice_is_not_twice_the_score(
    manager: TaskManager, hub: Path, enter: Callable[[Path], None], tmp_path: Path
) -> None:
    enter(hub)
    manager.model_name = "llava_next_fullkv"
    [task] = [output.task for output in get_task_list(get_task_dict(["ocrbench"], manager, "chat"))]
    found = [run(manager, [task], tmp_path, "llava_next_fullkv", 64)["results"]["ocrbench"] for _ in range(2)]
    assert found[0]["ocrbench_accuracy,none"] == found[1]["ocrbench_accuracy,none"] == 0.002


def test_the_host_finds_the_groups(manager: TaskManager) -> None:
    assert {"sparsemm_paper", "sparsemm_paper_lite", "sparsemm_demo"} <= set(manager.all_groups)
