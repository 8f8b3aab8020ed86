"""A run says how it was made, shares nothing with a run made otherwise, and can be repeated."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.evaluator_utils import get_task_list
from lmms_eval.loggers import EvaluationTracker
from lmms_eval.tasks import TaskManager, get_task_dict

from sparsemm_lmms import HeadScores
from sparsemm_lmms.cli import app as cli
from sparsemm_lmms.cli import main, tasks_folder
from sparsemm_lmms.model_wrappers.lmms_eval import commands, patches, recording
from sparsemm_lmms.model_wrappers.lmms_eval.model import CompressedChatModel
from sparsemm_lmms.model_wrappers.lmms_eval.records import fingerprint, settings_of_evaluation
from sparsemm_lmms.reports.results import KEY, read_results

from . import tiny
from .conftest import png

DOCUMENTS = 3


@pytest.fixture
def evaluate(arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`evaluate(name, {"budget": 24}, limit=2)` -> results, saved below `tmp_path/out` as from the command line."""
    folder = task([png(i) for i in range(DOCUMENTS)])

    def run(name: str = "qwen2_vl_sparsemm", given: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=name)
        tracker = EvaluationTracker(output_path=str(tmp_path / "out"))
        results = simple_evaluate(
            name,
            arguments(name, **(given or {})),
            tasks=["tiny_images"],
            task_manager=manager,
            evaluation_tracker=tracker,
            **{"bootstrap_iters": 0, "batch_size": 1, **more},
        )
        samples = results.pop("samples")
        tracker.save_results_aggregated(results, samples, "20260101_000000")  # the same second for all runs
        tracker.save_results_samples("tiny_images", samples["tiny_images"])
        return results

    return run


def test_the_record_says_how_a_run_was_made(
    evaluate: Callable[..., dict[str, Any]], scores: Path, tmp_path: Path
) -> None:
    evaluate(given={"seed": 3}, limit=2, gen_kwargs="max_new_tokens=4")
    [file] = (tmp_path / "out").rglob("*_results.json")
    record = json.loads(file.read_text())[KEY]
    assert file.parent.name == record["run"] and record["run"].startswith("qwen2_vl__qwen2_vl_sparsemm__budget20__")
    settings, where, evaluation = record["settings"], record["environment"], record["evaluation"]
    assert settings["head_scores"] == {"source": str(scores), "sha256": HeadScores.load(scores).content_hash}
    assert (settings["budget"], settings["seed"], settings["max_pixels"]) == (20, 3, 23520)
    assert settings["system_prompt"] == "You are a helpful assistant." and settings["dtype"] == "float32"
    assert where["kernel_backend"] == "torch" and where["gpu"] is None and where["num_processes"] == 1
    assert where["versions"]["transformers"] == transformers.__version__
    assert set(where["versions"]) == {"sparsemm-lmms", "torch", "triton", "transformers", "lmms-eval", "python"}
    assert where["image_size"]["longest_edge"] == 23520
    assert evaluation["limit"] == 2 and evaluation["tasks"]["tiny_images"]["generation_kwargs"]["max_new_tokens"] == 4
    measured = record["measured"]
    assert measured["num_requests"] == 2 and 0 < measured["kept_tokens"] <= 20.5 and measured["kv_bytes"] > 0
    assert measured["ttft_ms"] > 0 and measured["tpot_ms"] > 0 and measured["peak_memory"] > 0

    lines = next(file.parent.glob("*_samples_tiny_images.jsonl")).read_text().splitlines()
    assert len(lines) == 2
    for sample in map(json.loads, lines):
        assert sample[KEY] == {**settings, "kernel_backend": "torch", "run": record["run"]}
        counts = sample["token_counts"][0]
        assert counts["kept_tokens"] <= 20.5 and counts["kv_bytes"] > 0 and counts["ttft_ms"] > 0


@pytest.mark.slow
def test_runs_that_differ_share_no_folder(
    evaluate: Callable[..., dict[str, Any]], scores: Path, tmp_path: Path
) -> None:
    other = tiny.head_scores(tmp_path / "other.json", seed=1)
    replaced = tmp_path / "replaced.json"
    shutil.copy(scores, replaced)
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {}),
        ({"budget": 24}, {}),
        ({"pooling": "maxpool"}, {}),
        ({"max_pixels": 19600}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"system_prompt": "Be brief."}, {}),
        ({"head_scores": other}, {}),
        ({"head_scores": replaced}, {}),
        ({}, {"limit": 1}),
        ({}, {"gen_kwargs": "max_new_tokens=3"}),
    ]
    names = [evaluate(given=given, **more)[KEY]["run"] for given, more in runs]
    names.append(evaluate("qwen2_vl_snapkv")[KEY]["run"])
    shutil.copy(other, replaced)  # the same path with other content
    names.append(evaluate(given={"head_scores": replaced})[KEY]["run"])
    assert len(set(names)) == len(names)
    assert {file.parent.name for file in (tmp_path / "out").rglob("*_results.json")} == set(names)
    assert evaluate()[KEY]["run"] == names[0]  # the same settings, the same folder


def test_a_response_cache_of_other_settings_is_not_used(
    evaluate: Callable[..., dict[str, Any]], scores: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    shutil.copy(scores, path)

    def hits(name: str = "qwen2_vl_sparsemm", **given: Any) -> int:
        results = evaluate(name, {"head_scores": path, **given}, use_cache=str(tmp_path / "cache"))
        used, measured = results[KEY]["responses_from_cache"], results[KEY]["measured"]["num_requests"]
        assert used + measured == DOCUMENTS
        return used

    assert [hits(), hits()] == [0, DOCUMENTS]
    assert hits(seed=1) == hits(dtype="bfloat16") == hits(kernel_backend="torch") == 0
    tiny.head_scores(path, seed=1)  # lmms-eval sees the same --model_args
    assert [hits(), hits()] == [0, DOCUMENTS]


def test_the_hosts_other_models_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install(CompressedChatModel)
    import lmms_eval.evaluator

    before = lmms_eval.evaluator.evaluate
    patches.install(CompressedChatModel)
    assert lmms_eval.evaluator.evaluate is before  # wrapped once
    seen: list[dict[str, Any]] = []

    def original(lm: Any, task_dict: Any, cli_args: Any = None, response_cache: Any = None) -> str:
        seen.append({"lm": lm, "cli_args": cli_args})
        return "theirs"

    assert recording.recorded(CompressedChatModel, original, lm="another", task_dict={}) == "theirs"
    assert seen == [{"lm": "another", "cli_args": None}]


@pytest.fixture
def finished(arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> Path:
    """Results file of a run by `sparsemm-lmms eval`, with a task folder of the user's own beside ours."""
    folder = task([png(i) for i in range(DOCUMENTS)])
    name = "llava_next_sparsemm"
    command = ["eval", "--model", name, "--model_args", arguments(name), "--include_path", str(folder)]
    command += ["--tasks", "tiny_images,sparsemm_demo_ocr", "--limit", "2", "--output_path", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sparsemm-lmms", *command])
    cli(standalone_mode=False)
    [file] = (tmp_path / "out").rglob("*_results.json")
    return file


@pytest.mark.slow
def test_a_run_is_repeated_from_its_record(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = json.loads(finished.read_text())
    assert {"tiny_images", "sparsemm_demo_ocr"} <= set(results["results"])
    command = ["sparsemm-lmms", "rerun", str(finished), "--output_path", str(tmp_path / "again")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="files or code of its own .include_path=.*, pretrained=.*give --trust"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--trust"])
    capsys.readouterr()
    cli(standalone_mode=False)
    assert "All metrics equal those in" in capsys.readouterr().out
    [again] = (tmp_path / "again").rglob("*_results.json")
    assert again.parent.name == finished.parent.name

    results["results"]["tiny_images"]["letters,none"] += 1
    results[KEY]["environment"]["versions"]["torch"] = "1.0"
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["sparsemm-lmms", "rerun", str(changed), "--trust"])
    with pytest.raises(SystemExit, match="metrics differ"):
        main()
    printed = capsys.readouterr().out
    assert "environment.versions.torch: 1.0 in the record" in printed and "differs" in printed


def evaluation_of(folder: Path) -> dict[str, Any]:
    manager = TaskManager("ERROR", include_path=str(folder), include_defaults=False)
    found = get_task_list(get_task_dict(["tiny_images"], manager, "chat"))
    return settings_of_evaluation({"include_path": str(folder)}, {o.task_name: o.task.dump_config() for o in found})


def replaced(file: Path, old: str, new: str) -> None:
    assert old in (text := file.read_text())
    file.write_text(text.replace(old, new))


def test_what_a_task_is_decides_the_fingerprint(task: Callable[..., Path], tmp_path: Path) -> None:
    folder = task([png(0)])
    [yaml] = folder.glob("*.yaml")
    replaced(yaml, "metric: letters", "metric: !function utils.results")  # a function inside a list stays a function
    first = evaluation_of(folder)
    seen = {fingerprint(first)}
    assert "0x" not in json.dumps(first) and str(tmp_path) not in json.dumps(first)
    config = first["tasks"]["tiny_images"]
    assert config["doc_to_target"] == "answer" and config["doc_to_text"] == "<function text>"
    source = hashlib.sha256((folder / "utils.py").read_bytes()).hexdigest()
    assert config["metric_list"][0]["metric"] == {"function": "results", "sha256": source}
    data = config["dataset_kwargs"]["data_files"]["test"]
    [parquet] = tmp_path.rglob(data["name"])
    assert data["sha256"] == hashlib.sha256(parquet.read_bytes()).hexdigest()

    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    assert fingerprint(evaluation_of(moved)) in seen
    changes: list[Callable[[], object]] = [
        lambda: replaced(yaml, "higher_is_better: true", "higher_is_better: false"),
        lambda: replaced(yaml, "max_new_tokens: 6", "max_new_tokens: 5"),
        lambda: replaced(folder / "utils.py", 'doc["question"]', '"Say nothing."'),
        lambda: (folder / "helper.py").write_text("WORDS = 3\n"),
        lambda: shutil.copy(tasks_folder() / "sparsemm_demo_ocr.parquet", parquet),
    ]
    for change in changes:
        change()
        seen.add(fingerprint(evaluation_of(folder)))
    assert len(seen) == 1 + len(changes)


def test_local_data_is_told_by_content(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.json").write_text(name)

    def told(path: str, **kwargs: Any) -> Any:
        tasks = settings_of_evaluation({}, {"t": {"dataset_path": path, "dataset_kwargs": kwargs}})["tasks"]
        return tasks["t"]["dataset_path"], tasks["t"]["dataset_kwargs"].get("data_files")

    def all_told() -> list[Any]:
        return [told(str(tmp_path / "data")), told("json", data_files=[str(tmp_path / "data" / "*.json")])]

    (path, _), (builder, [files]) = before = all_told()
    assert path["name"] == "data" and builder == "json" and files["sha256"] == path["sha256"]
    (tmp_path / "data" / "b.json").write_text("c")
    assert all(after != first for after, first in zip(all_told(), before, strict=True))
    assert told("org/data", data_files="test/*.json") == ("org/data", "test/*.json")  # on the hub
    assert told("json", data_files="https://host/a.json") == ("json", "https://host/a.json")


def test_functions_are_told_by_name_and_source() -> None:
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    tasks = {"t": {"process_docs": png, "filter_list": [functools.partial(replaced, old="a"), len, {"b", "a"}]}}
    config = settings_of_evaluation({"limit": None}, tasks)["tasks"]["t"]
    assert config["process_docs"]["function"] == "png" and len(config["process_docs"]["sha256"]) == 64
    ours = {"function": "replaced", "sha256": source, "arguments": [[], {"old": "a"}]}
    assert config["filter_list"] == [ours, {"function": "len", "sha256": None}, ["a", "b"]]


def test_rerun_of_no_record(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no results file"):
        read_results(tmp_path / "nothing.json")
    for text, said in (("no json", "is no JSON file"), ("{}", "has no record"), ("[]", "has no record")):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_results(tmp_path / "results.json")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model llava_next_sparsem --tasks tiny_images", "Did you mean 'llava_next_sparsemm'"),
        ("--model llava_next_snapvk --tasks tiny_images", "Did you mean 'llava_next_snapkv'"),
        ("", "eval needs lmms-eval's arguments"),
    ],
)
def test_eval_refuses_in_one_sentence(line: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sparsemm-lmms", "eval", *line.split()])
    with pytest.raises(SystemExit, match=said):
        main()


def test_an_unknown_task_is_a_sentence() -> None:
    failure = ValueError("Tasks not found: ocrbenchh. Try `lmms-eval --tasks list`")
    with pytest.raises(ValueError, match="Unknown task 'ocrbenchh' in --tasks.*Did you mean 'ocrbench'"):
        commands._raise(failure, ["gqa", "ocrbench"])
