"""The real VLMEvalKit, through `sparsemm-lmms vlmeval`, in processes of its own: two of its dataset classes, a kill in
the middle and `--reuse`, two processes with torchrun. See CONTRIBUTING.md for the environment."""

from __future__ import annotations

import ast
import base64
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from .conftest import IS_REAL
from .test_models import ROOT
from .test_names import HOST_RULES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_REAL, reason="VLMEvalKit is not installed"),
]
COUNT = 14  # the host writes its answers down after every tenth
MODELS = ("LLaVA-NeXT-Demo_sparsemm_b64", "Qwen2VL-Demo_sparsemm_b64_dataprompt")
MCQ, VQA = "SparseMMDemoMCQ", "SparseMMDemo_openended"
CLASSES = {VQA: {"class": "OCRBench", "dataset": VQA}}  # an unknown name with choices is multiple choice by itself

GLOO = """
import sys
import torch.distributed as dist
stock = dist.init_process_group
dist.init_process_group = lambda backend, **more: stock("gloo", **more)  # run.py says nccl, which needs GPUs
from sparsemm_lmms.cli import main
main()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """$LMUData with questions of the packaged task, once open and once with three wrong choices."""
    folder = tmp_path_factory.mktemp("LMUData")
    rows = pq.read_table(ROOT / "task_overrides" / "sparsemm_demo_vqa.parquet").to_pylist()[:COUNT]
    answers = [row["answer"] for row in rows]
    head = ["index", "image", "question", "answer", "category"]
    with open(folder / f"{MCQ}.tsv", "w", newline="") as mcq, open(folder / f"{VQA}.tsv", "w", newline="") as vqa:
        choices, opened = csv.writer(mcq, delimiter="\t"), csv.writer(vqa, delimiter="\t")
        choices.writerow([*head, *"ABCD"])
        opened.writerow(head)
        for i, row in enumerate(rows):
            shared = [i, base64.b64encode(row["image"]["bytes"]).decode(), row["question"]]
            opened.writerow([*shared, str([row["answer"]]), "Regular Text Recognition"])
            options = [answers[(i + 3 * j) % COUNT] for j in range(4)]
            right = i % 4
            options[0], options[right] = options[right], options[0]
            choices.writerow([*shared, "ABCD"[right], row["kind"], *options])
    return folder


@pytest.fixture
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen]:
    """`start(out, "--reuse")`: the command in a process of its own; what it prints goes to `out/printed.txt`."""

    def run(out: Path, *arguments: str, models: tuple[str, ...] = MODELS, launcher: list[str] | None = None) -> Any:
        out.mkdir(exist_ok=True)
        command = [*(launcher or [sys.executable, "-m", "sparsemm_lmms"]), "vlmeval", "--data", VQA, MCQ]
        command += ["--data-config", json.dumps(CLASSES), "--model", *models, "--judge", "exact_matching"]
        environment = {**os.environ, "LMUData": str(data), "PRED_FORMAT": "tsv"}
        return subprocess.Popen(
            [*command, "--work-dir", str(out), *arguments],
            stdout=open(out / "printed.txt", "ab"),
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=out,
        )

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("whole") / "out"


def predictions(out: Path, model: str, dataset: str) -> list[dict[str, str]]:
    csv.field_size_limit(1 << 30)
    with open(out / model / f"{model}_{dataset}.tsv", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_all_rules_by_model_name_are_known() -> None:
    from sparsemm_lmms.model_wrappers.vlmevalkit.run import find_run_py

    run_py = find_run_py(None)
    texts = [file.read_text() for file in (run_py, *sorted(run_py.parent.glob("vlmeval/inference*.py")))]
    found = {rule for text in texts for rule in re.findall(r"['\"]([^'\"]+)['\"] in model_name", text)}
    assert found and found <= set(HOST_RULES)


def test_two_datasets_two_families(start: Callable[..., subprocess.Popen], whole: Path) -> None:
    assert start(whole).wait() == 0, (whole / "printed.txt").read_text()
    for model in MODELS:
        assert json.loads((whole / model / f"{model}_{VQA}_score.json").read_text())["Final Score"] > 0
        assert list((whole / model).glob(f"{model}_{MCQ}_acc.*"))
        for dataset in (VQA, MCQ):
            rows = predictions(whole, model, dataset)
            assert [row["index"] for row in rows] == [str(i) for i in range(COUNT)]
            records = [ast.literal_eval(row["extra_records"]) for row in rows]
            assert all(60 < record["kept_tokens"] < 68 < record["prompt_tokens"] for record in records)
            assert not any(row["prediction"].startswith("{") for row in rows)


def test_a_killed_run_is_taken_up(start: Callable[..., subprocess.Popen], whole: Path, tmp_path: Path) -> None:
    model, out = MODELS[0], tmp_path / "out"
    process = start(out, models=(model,))
    while not list(out.glob(f"{model}/T*/01_{VQA}.pkl")):
        assert process.poll() is None, (out / "printed.txt").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(out.glob(f"{model}/T*/*.tsv"))
    assert start(out, "--reuse", models=(model,)).wait() == 0
    printed = (out / "printed.txt").read_text()
    assert "reuse inference auxiliary file" in printed and f"/{COUNT - 10} [" in printed
    for dataset in (VQA, MCQ):
        keep = ("index", "prediction")
        got, wanted = ([[row[k] for k in keep] for row in predictions(o, model, dataset)] for o in (out, whole))
        assert got == wanted


def test_failed_answers_are_asked_again(start: Callable[..., subprocess.Popen], whole: Path, tmp_path: Path) -> None:
    """The host then mixes old texts with new records, and writes `str` of all."""
    model, out = MODELS[0], tmp_path / "out"
    shutil.copytree(whole, out, symlinks=True)
    written = next(out.glob(f"{model}/T*/{model}_{VQA}.tsv"))
    rows = predictions(out, model, VQA)
    for row in rows[2:4]:
        row["prediction"] = "Failed to obtain answer via API."
    with open(written, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    assert start(out, "--reuse", models=(model,)).wait() == 0
    got, wanted = ([row["prediction"] for row in predictions(o, model, VQA)] for o in (out, whole))
    assert got == wanted and "/2 [" in (out / "printed.txt").read_text()


def test_conversations(host: Any, picture: Callable[..., str]) -> None:
    from vlmeval.inference_mt import chat_mt

    ours = host.supported_VLM["LLaVA-NeXT-Demo_sparsemm_b64"](device="cpu")
    image, text = {"type": "image", "value": picture(0, (336, 224))}, {"type": "text", "value": "Read line 1."}
    empty = {"role": "assistant", "content": "the reference"}
    turns = [{"role": "user", "content": [image, text]}, empty, {"role": "user", "content": [text]}, empty]
    answers = chat_mt(ours, turns, "MMDU")
    assert len(answers) == 2 and all(type(answer) is str and "Failed" not in answer for answer in answers)


def test_video(
    host: Any, model: Callable[..., Any], video: Callable[[int], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the host's loop for videos, which sets the frames on the model and keeps no records."""
    import pandas
    from vlmeval.inference_video import infer_data_job_video

    path = video(8)
    monkeypatch.setenv("PRED_FORMAT", "tsv")

    class Videos:
        dataset_name, videos, nframe, fps, MODALITY = "Video-MME", ["a"], 4, -1, "VIDEO"
        data = pandas.DataFrame({"index": [0], "video": ["a"], "question": ["What?"]})

        def build_prompt(self, line: int, video_llm: bool) -> list[dict[str, str]]:
            assert video_llm
            return [{"type": "video", "value": path}, {"type": "text", "value": "What?"}]

    ours = model("qwen2_vl", method="snapkv")
    infer_data_job_video(ours, str(tmp_path), "tiny_snapkv_b20_w8_new6", Videos())
    assert (ours.nframe, ours.fps) == (4, None)
    written = pandas.read_csv(tmp_path / "tiny_snapkv_b20_w8_new6_Video-MME.tsv", sep="\t", keep_default_na=False)
    assert len(str(written["prediction"][0])) <= 6  # the answer, not the record


def test_two_processes(start: Callable[..., subprocess.Popen], whole: Path, tmp_path: Path) -> None:
    script, out, model = tmp_path / "gloo.py", tmp_path / "out", MODELS[1]
    script.write_text(GLOO)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script)]
    assert start(out, models=(model,), launcher=launcher).wait() == 0, (out / "printed.txt").read_text()
    for dataset in (VQA, MCQ):
        got, wanted = ([row["prediction"] for row in predictions(o, model, dataset)] for o in (out, whole))
        assert got == wanted
