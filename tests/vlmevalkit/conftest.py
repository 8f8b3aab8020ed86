"""The real VLMEvalKit where it is importable, else the stand-in beside this file."""

from __future__ import annotations

import base64
import csv
import functools
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.matrix import makers

from ..wrappers import tiny

STAND_IN = Path(__file__).parent / "standin"
IS_REAL = importlib.util.find_spec("vlmeval") is not None
if not IS_REAL:
    sys.path.insert(0, str(STAND_IN))

CLASSES = [
    (family.model_type, adapter.name)
    for family in FAMILIES.values()
    if family.vlmevalkit is not None
    for adapter in family.vlmevalkit.adapters
]
"""(family, our class in the host), all of them."""
OF_ANOTHER_TYPE = {"CompressedIdefics3": "idefics3", "CompressedSmolVLM": "idefics3"}
"""Our class -> `model_type` of its checkpoints, where it is not the family's first."""
PIXELS = {"min_pixels": 4 * 28 * 28, "max_pixels": 30 * 28 * 28}


@pytest.fixture(scope="session")
def host() -> Any:
    """`vlmeval.config` after `register()`; `.before` is what its table held before, `.added` what was added."""
    from vlmeval import config

    from sparsemm_lmms.model_wrappers.vlmevalkit.model import CompressedVLM, register

    for name in [name for name, entry in config.supported_VLM.items() if issubclass(entry.func, CompressedVLM)]:
        del config.supported_VLM[name]  # another test registered it
    config.before = dict(config.supported_VLM)
    config.added = register()
    return config


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint("qwen2_vl")`: folder of the tiny checkpoint of a family, or of one of its classes in the host."""
    root = tmp_path_factory.mktemp("checkpoints")
    made = functools.cache(lambda kind: makers.MAKERS[kind](root / kind))

    def find(family: str, name: str | None = None) -> Path:
        kind = OF_ANOTHER_TYPE.get(name or "", family)
        if kind == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM2's processor needs num2words, which is not installed")
        return made(kind)

    return find


@pytest.fixture(scope="session")
def model(host: Any, checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """`model("qwen2_vl", method="snapkv", budget=20)`: one of our classes on the tiny checkpoint."""
    from sparsemm_lmms.model_wrappers.vlmevalkit.model import model_class

    def build(family: str, name: str | None = None, **given: Any) -> Any:
        small = {"method": "snapkv", "window_size": 8, "budget": 20, "max_new_tokens": 6, "device": "cpu"}
        if FAMILIES[family].lmms_eval.pixel_limits is not None:
            small |= PIXELS
        if "method" in given and given["method"] == "fullkv":
            del small["budget"], small["window_size"]
        return model_class(family, name)(**{"pretrained": str(checkpoint(family, name)), **small, **given})

    return build


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., str]:
    """`picture(3)`: the path of a small image that differs with its number."""

    def write(index: int, size: tuple[int, int] = (84, 56)) -> str:
        path = tmp_path / f"{index}.png"
        tiny.picture(index, size).save(path)
        return str(path)

    return write


@pytest.fixture
def video(tmp_path: Path) -> Callable[[int], str]:
    """`video(8)`: the path of a video of so many small frames, four a second."""
    pytest.importorskip("decord", reason="VLMEvalKit reads videos with decord, which is not installed")
    cv2 = pytest.importorskip("cv2", reason="the video is written with OpenCV, which is not installed")

    def write(frames: int) -> str:
        path = str(tmp_path / f"{frames}.mp4")
        writer = cv2.VideoWriter(path, cv2.VideoWriter_fourcc(*"mp4v"), 4, (84, 56))
        for i in range(frames):
            writer.write(cv2.cvtColor(np.asarray(tiny.picture(i)), cv2.COLOR_RGB2BGR))
        writer.release()
        return path

    return write


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, str]]:
    """`datasets(rows)`: write multiple-choice and open questions in the host's format and return their names."""
    folder = tmp_path / "LMUData"
    folder.mkdir()
    monkeypatch.setenv("LMUData", str(folder))

    def write(count: int) -> tuple[str, str]:
        names = ("TinyMCQ", "Tiny_openended")
        for name in names:
            with open(folder / f"{name}.tsv", "w", newline="") as file:
                choices = ["A", "B"] if name == "TinyMCQ" else []
                writer = csv.writer(file, delimiter="\t")
                writer.writerow(["index", "image", "question", *choices, "answer", "category"])
                for i in range(count):
                    buffer = io.BytesIO()
                    tiny.picture(i, (84, 56)).save(buffer, "PNG")
                    image = base64.b64encode(buffer.getvalue()).decode()
                    answer = "A" if choices else "['x']"
                    row = [i, image, f"Which is it, {i}?", *(["one", "two"] if choices else []), answer]
                    writer.writerow([*row, "Regular Text Recognition"])
        return names

    return write
