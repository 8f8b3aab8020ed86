"""How runs end that fail, under lmms-eval's own command line and under `sparsemm-lmms eval`, and what reruns trust."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lmms_eval import __main__ as host
from lmms_eval.loggers import EvaluationTracker
from tenacity import Future, RetryError

from sparsemm_lmms import failures
from sparsemm_lmms.cli import main
from sparsemm_lmms.model_wrappers.lmms_eval import commands, saving
from sparsemm_lmms.model_wrappers.lmms_eval import model as base
from sparsemm_lmms.reports.results import KEY

from .conftest import png

ARGUMENTS = {"model": "llava_next_snapkv", "tasks": "ocrbench", "model_args": "pretrained=demo,budget=64"}


@pytest.fixture(params=["lmms-eval", "sparsemm-lmms eval"])
def run(
    request: Any, arguments: Callable[..., str], task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """One document by one of the two commands."""
    folder = task([png(0)])
    monkeypatch.setattr(host, "TaskManager", partial(host.TaskManager, include_defaults=False))  # reads no others

    def command(more: str = "", *flags: str) -> None:
        words = request.param.split()
        name = "llava_next_snapkv"
        given = ["--model", name, "--model_args", arguments(name) + more, "--include_path", str(folder)]
        monkeypatch.setattr(sys, "argv", [*words, *given, "--tasks", "tiny_images", *flags])
        if words[0] == "lmms-eval":
            host.cli_evaluate()
        else:
            main()

    return command


def ends(run: Callable[..., None], *given: str) -> str:
    with pytest.raises(SystemExit) as ended:
        run(*given)
    assert isinstance(ended.value.code, str)  # Python prints it and ends with status 1
    return ended.value.code


def test_a_wrong_word_ends_in_a_sentence(run: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(run, ",pooling=median").startswith("sparsemm-lmms: Unknown pooling 'median'")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("verbosity", ["INFO", "DEBUG"])
def test_a_bug_ends_in_one_traceback_and_a_sentence(
    run: Callable[..., None], verbosity: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> None:
        raise TypeError("no such thing")

    monkeypatch.setattr(base.CompressedChatModel, "generate_until", broken)
    assert ends(run, "", "--verbosity", verbosity) == "sparsemm-lmms: TypeError: no such thing"
    assert capsys.readouterr().err.count("Traceback") == 1


def test_an_output_path_that_is_a_file_is_refused_before_the_first_document(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    asked: list[Any] = []
    monkeypatch.setattr(base.CompressedChatModel, "generate_until", lambda self, requests: asked.extend(requests))
    path = tmp_path / "file" / "out"
    sentence = ends(run, "", "--output_path", str(path))
    assert sentence.startswith(f"sparsemm-lmms: --output_path={path} cannot be written to") and not asked


def test_results_that_the_host_could_not_write_are_rescued(
    run: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any, **__: Any) -> Any:
        if self.suffix == ".json" and tmp_path in self.parents:
            raise OSError(28, "No space left on device")
        return opened(self, *_, **__)

    opened = Path.open
    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(Path, "write_text", lambda self, text, **_: full(self, "w", encoding="utf-8").write(text))
    sentence = ends(run, "", "--output_path", str(tmp_path / "out"), "--log_samples")
    monkeypatch.undo()
    assert "could not be written (No space left on device)" in sentence
    rescued = Path(sentence.split("what belongs there is in ")[1].split(": move it")[0])
    assert json.loads(rescued.read_text())[KEY]["measured"]["num_requests"] == 1


def _tracker(folder: Path) -> EvaluationTracker:
    tracker = EvaluationTracker(output_path=str(folder))
    tracker.general_config_tracker.model_name = "m"
    return tracker


def test_what_the_host_wrote_in_part_is_written_whole(tmp_path: Path) -> None:
    results = {KEY: {"run": "r"}, "results": {"t": {"acc": 0.5}}}
    samples = [{"doc_id": i, "arguments": ("q",), "doc": object()} for i in range(3)]

    def half(tracker: Any, *_: Any) -> None:
        (tmp_path / "r").mkdir(exist_ok=True)
        (tmp_path / "r/now_results.json").write_text('{"results": {"t"')

    def two_of_three(tracker: Any, *_: Any) -> None:
        (tmp_path / "r/now_samples_t.jsonl").write_text('{"doc_id": 0}\n{"doc_id": 1}\n{"doc_')

    tracker = _tracker(tmp_path)
    saving.save_results(half, tracker, results, {"t": samples}, "now")
    saving.save_samples(two_of_three, tracker, "t", samples)
    assert json.loads((tmp_path / "r/now_results.json").read_text()) == results
    lines = (tmp_path / "r/now_samples_t.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"doc_id": i} for i in range(3)]


def test_the_cause_of_what_was_tried_again_is_told() -> None:
    tried = Future(3)
    tried.set_exception(PermissionError(13, "Permission denied", "home"))
    assert failures.sentence(RetryError(tried)) == "sparsemm-lmms: [Errno 13] Permission denied: 'home'"
    assert failures.is_refusal(RetryError(tried)) and not failures.is_refusal(KeyError("x"))
    assert failures.sentence(KeyError("x")) == "sparsemm-lmms: KeyError: 'x'"


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"include_path": "theirs"}, "include_path=theirs"),
        ({"include_path": ["a", "b"]}, "include_path="),
        ({"tasks": "here/task.yaml"}, "task file here/task.yaml"),
        ({"tasks": "ocrbench,here/task.yaml"}, "task file here/task.yaml"),
        ({"tasks": "here"}, "task file here"),
        ({"model_args": "pretrained=here"}, "pretrained=here"),
        ({"model_args": "pretrained=x/y,trust_remote_code=True"}, "trust_remote_code=True"),
        ({"model": "llava_hf"}, "Unknown model 'llava_hf'"),
        ({"model": 3}, "model=3 is a int"),
        ({"limit": True}, "limit=True is a bool"),
        ({"tasks": None}, "has no tasks"),
        ({"seed": [0, 1]}, "four whole numbers"),
        ({"seed": [0, 1, 2, "3"]}, "four whole numbers"),
    ],
)
def test_a_rerun_loads_nothing_that_a_record_brings(
    more: dict[str, Any], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/task.yaml").touch()
    with pytest.raises(ValueError, match=sentence):
        commands.repeated(Path("r.json"), {**ARGUMENTS, **more}, trust=False)


def test_a_rerun_takes_what_shapes_answers_and_nothing_else() -> None:
    rest = {"launcher_args": "name=sglang", "baseline": "b", "use_cache": "c", "config": "x.yaml", "wandb_args": "w"}
    rest |= {"cache_requests": "true", "power_analysis": True, "trust_remote_code": True, "include_path": None}
    taken = {**ARGUMENTS, "limit": 2.0, "seed": [0, 1, 2, 3], "gen_kwargs": "", "batch_size": "4"}
    assert commands.repeated(Path("r.json"), {**taken, **rest}, trust=False) == taken
    trusted = commands.repeated(Path("r.json"), {**taken, **rest, "include_path": "mine"}, trust=True)
    assert trusted == {**taken, "include_path": "mine"}
