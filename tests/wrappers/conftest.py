"""Tiny checkpoints and a local task, made once for all tests of the wrappers."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, Value
from lmms_eval.api.instance import Instance

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.loading import load_checkpoint

from . import tiny

TASK = """\
task: tiny_images
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.visual
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.results
generation_kwargs:
  max_new_tokens: 6
  temperature: 0
  until: ["\\u0000"]
metric_list:
  - metric: letters
    aggregation: mean
    higher_is_better: true
"""

UTILS = """\
def visual(doc):
    return [doc["image"].convert("RGB")]

def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def results(doc, results):
    return {"letters": len(results[0])}
"""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each family's tiny checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make(root / family) for family, make in tiny.MAKERS.items()}


@pytest.fixture(scope="module", params=sorted(tiny.MAKERS))
def engine(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Engine:
    family = FAMILIES[request.param]
    limits = {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 30} if family.lmms_eval.pixel_limits else {}
    options = RunOptions(str(checkpoints[request.param]), **limits)
    return Engine(load_checkpoint(family, options, torch.device("cpu")))


@pytest.fixture(scope="session")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head-score file for both tiny checkpoints."""
    return tiny.head_scores(tmp_path_factory.mktemp("scores") / "scores.json")


@pytest.fixture
def arguments(checkpoints: dict[str, Path], scores: Path) -> Callable[..., str]:
    """`arguments("qwen2_vl_sparsemm", budget=20)` -> the --model_args for the tiny checkpoint."""

    def build(name: str, **more: Any) -> str:
        family = next(family for family in checkpoints if name.startswith(family))
        given = {"pretrained": checkpoints[family], "window_size": 8, "budget": 20, "device": "cpu"}
        if METHODS[name.removeprefix(f"{family}_")].needs_head_scores:
            given["head_scores"] = "random" if "waterfill" in name else scores  # that one reads retention curves
        if family == "qwen2_vl":
            given |= {"min_pixels": 28 * 28 * 4, "max_pixels": 28 * 28 * 30}
        return ",".join(f"{key}={value}" for key, value in (given | more).items())

    return build


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a task `tiny_images` with these image files (bytes) and return the folder for --include_path."""
    monkeypatch.setattr("lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(tmp_path / "datasets"))

    def write(images: Sequence[bytes]) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        rows = {
            "image": [{"bytes": image, "path": None} for image in images],
            "question": [f"What is it{'?' * (i + 1)}" for i in range(len(images))],
            "answer": ["x"] * len(images),
        }
        features = Features({"image": Image(), "question": Value("string"), "answer": Value("string")})
        Dataset.from_dict(rows, features=features).to_parquet(folder / "test.parquet")
        (folder / "tiny_images.yaml").write_text(TASK.format(parquet=folder / "test.parquet"))
        (folder / "utils.py").write_text(UTILS)
        return folder

    return write


def png(index: int, size: tuple[int, int] = (84, 56)) -> bytes:
    """One of the tiny pictures as a PNG file."""
    buffer = io.BytesIO()
    tiny.picture(index, size).save(buffer, "PNG")
    return buffer.getvalue()


def conversation(index: int, question: str = "What is it?", images: int = 1, **size: Any) -> list[dict[str, Any]]:
    """A question on one or more tiny pictures."""
    parts = [{"type": "image", "url": tiny.picture(10 * index + i, **size)} for i in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def request(
    model: Any, messages: list[dict[str, Any]], doc_id: int, gen_kwargs: dict[str, Any], **metadata: Any
) -> Instance:
    """A request as lmms-eval makes it, registered in `model.task_dict`."""
    model.task_dict.setdefault("task", {}).setdefault("test", {})[doc_id] = messages
    return Instance(
        request_type="generate_until",
        arguments=("", lambda doc: doc, dict(gen_kwargs), doc_id, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": doc_id, "repeats": 1, **metadata},
    )
