"""The real VLMEvalKit where it is importable, else the stand-in beside this file."""

from __future__ import annotations

import base64
import csv
import importlib.util
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ..wrappers import tiny

STAND_IN = Path(__file__).parent / "standin"
IS_REAL = importlib.util.find_spec("vlmeval") is not None
if not IS_REAL:
    sys.path.insert(0, str(STAND_IN))

PIXELS = {"min_pixels": 4 * 28 * 28, "max_pixels": 30 * 28 * 28}


@pytest.fixture(scope="session")
def host() -> Any:
    """`vlmeval.config` after `register()`; `.before` is what its table held before, `.added` what was added."""
    from vlmeval import config

    from sparsemm_lmms.model_wrappers.vlmevalkit.model import register

    config.before = dict(config.supported_VLM)
    config.added = register()
    return config


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each family's tiny checkpoint."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {family: make(root / family) for family, make in tiny.MAKERS.items()}


@pytest.fixture(scope="session")
def model(host: Any, checkpoints: dict[str, Path]) -> Callable[..., Any]:
    """`model("qwen2_vl", method="snapkv", budget=20)`: one of our classes on the tiny checkpoint."""
    from sparsemm_lmms.model_wrappers.vlmevalkit.model import model_class

    def build(family: str, **given: Any) -> Any:
        small = {"method": "snapkv", "window_size": 8, "budget": 20, "max_new_tokens": 6, "device": "cpu"}
        if family == "qwen2_vl":
            small |= PIXELS
        if "method" in given and given["method"] == "fullkv":
            del small["budget"], small["window_size"]
        return model_class(family)(**{"pretrained": str(checkpoints[family]), **small, **given})

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
