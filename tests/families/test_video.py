"""Families that read video: what the stock class hands to the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import qwen_vl_utils.vision_process as utils
import torch
from transformers import AutoProcessor

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.arguments import split_arguments
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.loading import load_checkpoint
from sparsemm_lmms.model_wrappers.matrix import makers
from sparsemm_lmms.model_wrappers.media import FrameSampling, read_video, sampling_of

from ..wrappers import tiny
from .test_stock import QUESTION, asked_of_stock, defaults, stock_class

FRAMES, FPS = 12, 5
SMALL = {"min_pixels": 4 * 32**2, "max_pixels": 8 * 32**2}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        for i in range(FRAMES):
            pixels = np.asarray(tiny.picture(i, (10, 6)).resize((160, 96)))
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return path


def film(clip: Path, question: str = QUESTION) -> list[dict[str, Any]]:
    content = [{"type": "video", "url": str(clip)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def read_with_av(asked: dict[str, Any]) -> Any:
    """What qwen-vl-utils' readers return, which need packages that are not everywhere."""
    whole = read_video(asked["video"], FrameSampling(FRAMES))
    count = utils.smart_nframes(asked, total_frames=FRAMES, video_fps=FPS)
    picked = torch.linspace(0, FRAMES - 1, count).round().long()
    metadata = dict(fps=float(FPS), frames_indices=picked, total_num_frames=FRAMES, video_backend="torchvision")
    return torch.from_numpy(whole.frames)[picked].permute(0, 3, 1, 2), metadata, count / FRAMES * FPS


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.lmms_eval.frame_limits])
@pytest.mark.parametrize("limits", [{}, SMALL, {"fps": 1.0}])
def test_frames_and_time_stamps_are_those_of_the_stock_class(
    name: str, limits: dict[str, Any], clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, folder = FAMILIES[name], makers.MAKERS[name](tmp_path)
    frames = {} if "fps" in limits or family.lmms_eval.frame_limits.fps else {"max_num_frames": 6}  # stock: no more
    monkeypatch.setattr(utils, "get_video_reader_backend", lambda: "av")
    monkeypatch.setitem(utils.VIDEO_READER_BACKENDS, "av", read_with_av)
    cls = stock_class(family, monkeypatch)
    given = {**defaults(cls), **limits, **frames}
    processor = AutoProcessor.from_pretrained(folder, **{edge: given[edge] for edge in SMALL})
    stock = asked_of_stock(cls, film(clip)[0]["content"][0], processor, **limits, **frames)
    options, _ = split_arguments(family, "fullkv", {"pretrained": str(folder), **limits, **frames})
    loaded = load_checkpoint(family, options, torch.device("cpu"))
    ours = Engine(loaded, options.system_prompt, sampling=sampling_of(family, options, loaded.processor))
    inputs = ours.batch_inputs([ours.prompt(film(clip))])
    assert stock["video_grid_thw"].tolist() == inputs["video_grid_thw"].tolist()
    assert {"input_ids", "mm_token_type_ids", "pixel_values_videos"} <= set(inputs)
    for key, value in inputs.items():
        assert torch.equal(torch.as_tensor(stock[key]), torch.as_tensor(value)), key
