"""A card of finished runs, and submission files that the host's own code wrote, under names that tell them apart."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsemm_lmms.cli import main
from sparsemm_lmms.reports.card import read_runs, write_card
from sparsemm_lmms.reports.store import write_cell
from sparsemm_lmms.scorers.base import Scorer

from ..core.plugins import plugin
from .records import cell, write_sweep


def results(folder: Path, method: str, budget: int, tasks: dict[str, int]) -> Path:
    """A results file as lmms-eval writes it, with this package's record."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model": f"llava_next_{method}", "pretrained": "llava-hf/llava-v1.6-vicuna-7b-hf", "budget": budget}
    environment = {"gpu": "NVIDIA H100", "num_processes": 1, "versions": {"torch": "2.14.1"}, "git_commit": "abc"}
    data = {
        "results": {task: {"alias": task, "anls,none": 0.5, "anls_stderr,none": 0.1} for task in tasks},
        "n-samples": {task: {"original": count, "effective": count} for task, count in tasks.items()},
        "sparsemm_lmms": {
            "settings": {**settings, "window_size": 32},
            "environment": environment,
            "measured": {"kept_tokens": 60.5, "kv_bytes_used": 2**20, "tpot_ms_median": 3.0},
        },
    }
    path = folder / "20260101_000000_results.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture
def submit() -> Callable[..., None]:
    """Makes the host write the submission file of a task: `submit(folder, "docvqa", ["answer", ...])`."""
    from lmms_eval.tasks.docvqa.utils import docvqa_test_aggregate_results
    from lmms_eval.tasks.textvqa.utils import textvqa_aggregate_submissions

    def write(folder: Path, task: str, answers: list[str]) -> None:
        kinds: dict[str, Any] = {"docvqa": docvqa_test_aggregate_results, "textvqa": textvqa_aggregate_submissions}
        answered = [{"questionId": i, "answer": answer} for i, answer in enumerate(answers)]
        kinds[task](answered, argparse.Namespace(output_path=str(folder)))

    return write


def test_submission_files_state_method_and_budget(
    tmp_path: Path, submit: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for method in ("sparsemm", "snapkv"):
        results(tmp_path / method, method, 64, {"docvqa_test": 2, "textvqa_test": 3})
        submit(tmp_path / method, "docvqa", [f"read by {method}", "x"])
    output = tmp_path / "out" / "card.md"
    line = ["sparsemm-lmms", "card", str(tmp_path / "sparsemm"), str(tmp_path / "snapkv"), "--output", str(output)]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    names = [f"docvqa_test__llava-v1.6-vicuna-7b-hf__{method}__budget64.json" for method in ("snapkv", "sparsemm")]
    assert sorted(path.name for path in (output.parent / "submissions").iterdir()) == names
    assert json.loads((output.parent / "submissions" / names[0]).read_text())[0]["answer"] == "read by snapkv"
    printed = capsys.readouterr().out
    assert "2 runs, 2 submission files" in printed and printed.count("missing: TextVQA test") == 2
    text = output.read_text()
    for said in (
        "| llava-v1.6-vicuna-7b-hf | sparsemm | 64 | 0.5 |",
        "docvqa_test anls (2 documents)",
        "hardware: NVIDIA H100",
        "torch 2.14.1",
        "* window_size: 32",
        "missing: TextVQA test of llava-v1.6-vicuna-7b-hf__snapkv__budget64: textvqa_test was run, but",
        "MMBench test: not run (`--tasks mmbench_en_test`)",
        "2506.05344",
        "2404.14469",
        f"`submissions/{names[1]}`",
    ):
        assert said in text


def test_nothing_is_overwritten(tmp_path: Path, submit: Callable[..., None]) -> None:
    file = results(tmp_path / "run", "sparsemm", 64, {"docvqa_test": 1})
    submit(tmp_path / "run", "docvqa", ["first"])
    output = tmp_path / "card.md"
    for _ in range(2):  # the same again changes nothing
        [(_, _, first)] = write_card(read_runs(file), output).copied
    submit(tmp_path / "run", "docvqa", ["second"])
    with pytest.raises(ValueError, match="exists with other content"):
        write_card(read_runs(file), output)
    [(_, _, second)] = write_card(read_runs(file), tmp_path / "card2.md").copied
    assert second.name == f"{first.stem}__2.json" and "first" in first.read_text() and "second" in second.read_text()


def test_files_that_two_tasks_name_alike(tmp_path: Path, submit: Callable[..., None]) -> None:
    """TextVQA's validation and test write the same name; the number of answers tells them apart."""
    file = results(tmp_path / "run", "adakv", 128, {"textvqa_test": 3, "textvqa_val": 2})
    submit(tmp_path / "run", "textvqa", ["a", "b"])
    collected = write_card(read_runs(file), tmp_path / "card.md")
    assert not collected.copied and "TextVQA test" in collected.missing[0]
    [written] = (tmp_path / "run" / "submissions").iterdir()
    written.rename(written.with_name("textvqa_submission_earlier.json"))
    submit(tmp_path / "run", "textvqa", ["a", "b", "c"])
    [(_, _, path)] = write_card(read_runs(file), tmp_path / "card2.md").copied
    assert len(json.loads(path.read_text())) == 3


def test_a_card_of_a_sweep(tmp_path: Path, submit: Callable[..., None]) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    record = cell("snapkv", 64, {"docvqa_test": {"anls": [0.0, 0.0]}})
    write_cell(sweep, record)
    submit(sweep / "cells" / record.name / "some_run", "docvqa", ["a", "b"])
    runs = read_runs(sweep)
    shown = {"fullkv", "sparsemm", "snapkv", "local_window", "layer_mean", "uniform"}
    assert {run.method for run in runs if run.listed} == shown  # ablations and single draws belong into the report
    [(_, _, path)] = write_card(runs, tmp_path / "card.md").copied
    assert path.name == "docvqa_test__llava_next_demo__snapkv__budget64.json"
    text = (tmp_path / "card.md").read_text()
    assert "| llava_next demo | sparsemm | 96 |" in text and "hardware: CPU" in text
    assert "| mask" not in text and "| random" not in text


def test_a_card_cites_all_methods_of_a_sweep(tmp_path: Path) -> None:
    """Also those of draws and ablations, which have no line of their own; times where the machine was quiet."""
    names = ["bacon+adakv", "sparsemm_mixkv@layer_mean", "vlcache", "keydiff+waterfill", "pyramidkv", "tgv+cake#1"]
    for number, name in enumerate(names):
        made = cell(name, 64, {"ocrbench": {"m": [1.0]}})
        load = {"other_cores": 0.1} if number < 4 else {"other_cores": 1.0} if number == 4 else {}
        told = {task: {**values, **load} for task, values in made.statistics.items()}
        write_cell(tmp_path, replace(made, name=re.sub(r"\W", "_", name), statistics=told))
    write_cell(tmp_path, replace(cell("mask", None, {"ocrbench": {"m": [1.0]}}, variant={"mask_ratio": 0.1}), name="m"))
    write_card(read_runs(tmp_path), tmp_path / "card.md")
    listed, _, cited = (tmp_path / "card.md").read_text().partition("## Citation")
    assert listed.count("| 5.64 |") == 4 and "| pyramidkv | 64 | 1 |" in listed and "mask" not in listed
    papers = re.findall(r"^\* (.+): \[arXiv", cited, re.M)
    told = ["AdaKV", "BACON", "CAKE", "KeyDiff", "MixKV", "PyramidKV", "SnapKV", "SparseMM", "TGV-KV", "VL-Cache"]
    assert sorted(papers) == [*told, "lmms-eval"]


HOSTILE = (
    "x |\n| **llava-34b** | fullkv | 99.9 |\r\n# <script>alert(1)</script> `a` $b$ [c](http://d)\u2028[e]: f \\| & -\t"
)


def test_a_card_shows_letters_and_no_mark_up(tmp_path: Path) -> None:
    """A whole record whose names, settings and versions are hostile gives the lines that a plain one gives."""

    def lines(text: str) -> list[str]:
        folder = tmp_path / str(len(text))
        file = results(folder, "sparsemm", 64, {"docvqa_test": 1})
        data = json.loads(file.read_text())
        record = data["sparsemm_lmms"]
        record["settings"] |= {"model": f"llava_next_{text}", "pretrained": text, text: [text]}
        names = ("gpu", "git_commit", "kernel_backend", "checkpoint", "image_size")
        record["environment"] |= {**dict.fromkeys(names, text), "versions": {text: text}}
        data["results"][text] = {f"{text},none": 0.5}
        data["n-samples"][text] = {"effective": 1}
        file.write_text(json.dumps(data))
        write_card(read_runs(file), tmp_path / f"{len(text)}.md")
        return (tmp_path / f"{len(text)}.md").read_text().splitlines()

    plain, hostile = lines("plain"), lines(HOSTILE.replace("/", "|"))
    assert len(hostile) == len(plain)
    for ours, theirs in zip(plain, hostile, strict=True):
        bare = re.sub(r"\\[!-/:-@\[-`{-~]", "", theirs)  # what Markdown takes for more than letters
        assert bare.count("|") == ours.count("|") and not re.search(r"[<>$]|\]\(http:|e\]:", bare)
        assert bare.count("`") == ours.count("`") and bare.count("**") == ours.count("**")
    assert any("&lt;script&gt;alert(1)&lt;|script&gt;".replace("|", r"\|") in line for line in hostile)
    assert "| plain | plain | 64 | 0.5 | 0.5 | 60.5 | 1 | 3 |" in plain


def test_names_of_files_are_letters_too(tmp_path: Path) -> None:
    file = results(tmp_path / "run", "adakv", 128, {"textvqa_test": 1})
    (tmp_path / "run" / "submissions").mkdir()
    (tmp_path / "run" / "submissions" / "textvqa_submission_`<b>\n| x.json").write_text("[1]")
    write_card(read_runs(file), tmp_path / "card.md")
    assert r"(lmms-eval: textvqa_submission_\`&lt;b&gt; \| x.json, sha256" in (tmp_path / "card.md").read_text()
    assert (tmp_path / "card.md").stat().st_mode == file.stat().st_mode  # of the umask
    assert [path.stat().st_mode for path in (tmp_path / "submissions").iterdir()] == [file.stat().st_mode]


def test_mistakes_get_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is nothing at"):
        read_runs(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="neither a sweep with results nor"):
        read_runs(tmp_path)
    (tmp_path / "x_results.json").write_text("{}")
    with pytest.raises(ValueError, match="no record under"):
        read_runs(tmp_path)


class Mine(Scorer):
    """A stranger's scorer."""

    papers = (("Mine", "2601.00001"),)


def test_parts_of_a_method_say_what_is_cited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of presets, of controls, of free combinations, of settings; nothing where a run's parts are not installed."""
    plugin(monkeypatch, "scorers", "mine", Mine)
    runs = [("adakv_bacon", {}), ("compressed", {"scorer": "mine", "allocator": "pyramid"}), ("permuted", {})]
    runs += [("gone", {}), ("compressed", {"scorer": "gone", "allocator": "uniform"}), ("snapkv", {"critical": True})]
    for number, (method, settings) in enumerate(runs):
        path = results(tmp_path / str(number), method, 64, {"ocrbench": 2})
        data = json.loads(path.read_text())
        data["sparsemm_lmms"]["settings"] |= settings
        path.write_text(json.dumps(data))
    write_card([run for i in range(len(runs)) for run in read_runs(tmp_path / str(i))], tmp_path / "card.md")
    cited = (tmp_path / "card.md").read_text().partition("## Citation")[2]
    names = "AdaKV BACON PyramidKV Mine SparseMM SnapKV CriticalKV lmms-eval".split()
    assert re.findall(r"^\* (\S+): \[arXiv", cited, re.M) == names
    assert "* Mine: [arXiv 2601.00001](https://arxiv.org/abs/2601.00001)" in cited
