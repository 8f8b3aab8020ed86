"""The command line as users type it: one process and two, which share the documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import png

pytestmark = pytest.mark.slow
SIZES = [(84, 56), (56, 84), (28, 56)]  # three documents: with two processes the second rank is padded
TWO = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
"""What `accelerate launch --num_processes 2 -m` starts where there are GPUs; without, accelerate starts one process."""


def run(launcher: list[str], name: str, model_args: str, folder: Path, out: Path) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", *launcher, "lmms_eval", "--model", name, "--model_args", model_args]
    command += ["--include_path", str(folder), "--tasks", "tiny_images", "--batch_size", "1", "--log_samples"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    env["LMMS_EVAL_DATASETS_CACHE"] = str(out / "datasets")
    done = subprocess.run(
        [*command, "--output_path", str(out)], capture_output=True, text=True, env=env, timeout=900, cwd=folder
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    [file] = out.rglob("*_results.json")
    return text, json.loads(file.read_text())


def samples(out: Path) -> list[dict[str, Any]]:
    lines = next(iter(out.rglob("*_samples_tiny_images.jsonl"))).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


def test_one_and_two_processes_agree(arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path) -> None:
    name, folder = "qwen2_vl_snapkv", task([png(i, size) for i, size in enumerate(SIZES)])
    text, one = run([], name, arguments(name), folder, tmp_path / "one")
    assert "|tiny_images|" in text.replace(" ", "") and text.count("Settings: {") == 1
    text, both = run(TWO, name, arguments(name), folder, tmp_path / "two")
    assert text.count("Settings: {") == 1  # rank 0 only
    assert [r["sparsemm_lmms"]["environment"]["num_processes"] for r in (one, both)] == [1, 2]
    assert both["results"]["tiny_images"] == one["results"]["tiny_images"]
    answers = [[s["filtered_resps"] for s in samples(tmp_path / out)] for out in ("one", "two")]
    assert answers[0] == answers[1] and len(answers[0]) == len(SIZES)

    # what was measured is of all ranks and leaves the padding out
    measured = [results["sparsemm_lmms"]["measured"] for results in (one, both)]
    counted = ("kept_tokens", "prompt_tokens", "kv_bytes", "kv_bytes_used", "kv_bytes_full", "output_tokens")
    assert measured[1]["num_requests"] == len(SIZES)
    assert {key: measured[1][key] for key in counted} == pytest.approx({key: measured[0][key] for key in counted})
    for results, numbers in zip((one, both), measured, strict=True):
        throughput = results["throughput"]
        assert throughput["total_gen_tokens"] == numbers["output_tokens"]
        assert throughput["avg_kv_bytes"] == numbers["kv_bytes"] and throughput["avg_kept_tokens"] == 20
    assert one["sparsemm_lmms"]["run"] == both["sparsemm_lmms"]["run"]  # how many processes is no setting
