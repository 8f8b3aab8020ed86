"""The command line as users type it: one process, and two with accelerate."""

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


def run(
    launcher: list[str], name: str, model_args: str, folder: Path, out: Path, *more: str
) -> tuple[str, dict[str, Any]]:
    command = [sys.executable, "-m", *launcher, "lmms_eval", "--model", name, "--model_args", model_args]
    command += ["--include_path", str(folder), "--tasks", "tiny_images", "--batch_size", "2", "--log_samples"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(out / "datasets"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, "--output_path", str(out), *more], capture_output=True, text=True, env=env, timeout=900, cwd=folder
    )
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    files = sorted(out.rglob("*_results.json"))
    return text, json.loads(files[-1].read_text()) if files else {}


def samples(out: Path) -> list[dict[str, Any]]:
    lines = next(iter(out.rglob("*_samples_tiny_images.jsonl"))).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


def test_one_and_two_processes_agree(arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path) -> None:
    name, folder = "qwen2_vl_snapkv", task([png(i, size) for i, size in enumerate(SIZES)])
    text, one = run([], name, arguments(name), folder, tmp_path / "one")
    assert "|tiny_images|" in text.replace(" ", "") and text.count("Settings: {") == 1
    two = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m"]
    text, both = run(two, name, arguments(name), folder, tmp_path / "two")
    assert text.count("Settings: {") == 1  # rank 0 only
    assert both["results"]["tiny_images"] == one["results"]["tiny_images"]
    assert [s["filtered_resps"] for s in samples(tmp_path / "two")] == [
        s["filtered_resps"] for s in samples(tmp_path / "one")
    ]
    assert one["throughput"]["avg_kept_tokens"] == both["throughput"]["avg_kept_tokens"] == 20
    assert one["config"]["model"] == name


def test_the_response_cache_gives_the_same_answers(
    arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path
) -> None:
    name, folder = "llava_next_random", task([png(i, size) for i, size in enumerate(SIZES)])
    cache = ["--use_cache", str(tmp_path / "cache")]
    run([], name, arguments(name), folder, tmp_path / "first", *cache)
    text, _ = run([], name, arguments(name), folder, tmp_path / "second", *cache)
    assert "3/3 cache hits" in text
    assert [s["filtered_resps"] for s in samples(tmp_path / "first")] == [
        s["filtered_resps"] for s in samples(tmp_path / "second")
    ]
    text, _ = run([], name, arguments(name, seed=1), folder, tmp_path / "third", *cache)
    assert "cache hits" not in text
