"""Video for Qwen2-VL: which frames are read, stock answers with everything kept, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from lmms_eval.models import get_model

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.media import FrameSampling
from sparsemm_lmms.model_wrappers.media import read_video as whole_video

from . import tiny
from .conftest import conversation, request
from .test_rounds import hold, stock_conversation

FRAMES, FPS = 13, 5


def read_video(*given: Any, **times: Any) -> np.ndarray:
    return whole_video(*given, **times).frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame i is a picture of brightness 18 i."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 18 * i, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def film(clip: Any, question: str = "What happens?", **times: float) -> list[dict[str, Any]]:
    video = {"type": "video", "url": clip if not isinstance(clip, Path) else str(clip), **times}
    return [{"role": "user", "content": [video, {"type": "text", "text": question}]}]


@pytest.mark.parametrize(
    ("sampling", "times", "wanted"),
    [
        (FrameSampling(4), {}, [0, 4, 8, 12]),
        (FrameSampling(32), {}, list(np.linspace(0, 12, 12).round())),  # an even number
        (FrameSampling(32, fps=2.0), {}, [0, 4, 8, 12]),
        (FrameSampling(2, fps=5.0), {}, [0, 12]),
        (FrameSampling(32, fps=0.1), {}, [0, 12]),
        (FrameSampling(4), {"start": 1.0, "end": 1.6}, [5, 6, 7, 8]),
        (FrameSampling(4), {"start": 9.0}, [12]),
    ],
)
def test_the_frames_that_are_read(clip: Path, sampling: FrameSampling, times: Any, wanted: list[int]) -> None:
    frames = read_video(str(clip), sampling, **times)
    assert frames.shape == (len(wanted), 48, 64, 3) and frames.dtype == np.uint8
    assert [round(float(frame.mean()) / 18) for frame in frames] == wanted


def test_what_else_a_task_may_send(clip: Path) -> None:
    four = FrameSampling(4)
    whole = read_video(str(clip), four)
    assert (read_video({"path": str(clip), "video_start": 1.0, "video_end": 1.6}, four) != whole).any()
    assert (read_video(whole, FrameSampling(32)) == whole).all()
    pictures = [tiny.picture(i) for i in range(9)]
    assert (read_video(pictures, four)[-1] == np.asarray(pictures[-1])).all()
    with pytest.raises(ValueError, match=r"keys \['bytes'\]; it needs `path` or `url`"):
        read_video({"bytes": b""}, four)
    with pytest.raises(FileNotFoundError):
        read_video(str(clip) + "4", four)


def test_llava_next_refuses_video(engine: Engine, clip: Path) -> None:
    if engine.model.config.model_type == "llava_next":
        with pytest.raises(NotImplementedError, match="llava_next models read text and images only"):
            engine.prompt(film(clip))
        with pytest.raises(NotImplementedError, match="llava_next models read text and images only"):
            hold(engine, [film(clip)], method="fullkv")
    with pytest.raises(NotImplementedError, match="hear nothing"):
        engine.prompt([{"role": "user", "content": [{"type": "audio", "url": "a.wav"}]}])


def test_a_template_without_videos_is_refused(engine: Engine, clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if engine.model.config.model_type != "qwen2_vl":
        pytest.skip("video is for qwen2_vl")
    monkeypatch.setattr(engine.processor, "chat_template", "nothing")
    with pytest.raises(ValueError, match="no place for videos"):
        engine.prompt(film(clip))


def test_video_in_batches_and_rounds(engine: Engine, clip: Path) -> None:
    if engine.model.config.model_type != "qwen2_vl":
        pytest.skip("video is for qwen2_vl")
    engine.sampling = FrameSampling(4)
    asked = [film(clip), conversation(1), film(clip, "And the end?", start_time=1.0, end_time=2.0), film(clip, "?")]
    asked[3][0]["content"].insert(0, conversation(2)[0]["content"][0])  # an image and a video

    def stock(messages: list[Any]) -> str:
        decoded = [
            {**part, "url": read_video(part["url"], FrameSampling(4), part.get("start_time"), part.get("end_time"))}
            if part["type"] == "video"
            else part
            for part in messages[0]["content"]
        ]
        for part in decoded:
            part.pop("start_time", None), part.pop("end_time", None)
        return stock_conversation(engine, [[{"role": "user", "content": decoded}]])[0]

    wanted = [stock(messages) for messages in asked]
    settings = GenerationSettings(max_new_tokens=7)
    for agnostic in (False, True):
        engine.compress_before_question = agnostic
        try:
            with compress(engine.model, CompressionConfig(method="snapkv", budget=4096)) as session:
                together = engine.generate(session, asked, settings)
                assert [answer.text for answer in together.answers] == wanted
            with compress(engine.model, CompressionConfig(method="snapkv", budget=8, window_size=4)) as session:
                small = engine.generate(session, asked, settings)
                alone = [engine.generate(session, [one], settings).answers[0].text for one in asked]
        finally:
            engine.compress_before_question = False
        assert [answer.text for answer in small.answers] == alone
        assert alone != wanted and small.answers[0].kept_tokens < small.answers[0].prompt_tokens
    assert [engine.size(engine.prompt(m)) for m in asked] == [answer.prompt_tokens for answer in small.answers]
    talk = [asked[0], conversation(1), asked[2]]
    frames = [read_video(str(clip), FrameSampling(4)), read_video(str(clip), FrameSampling(4), 1.0, 2.0)]
    whole = stock_conversation(engine, [film(frames[0]), conversation(1), film(frames[1], "And the end?")])
    assert hold(engine, talk, method="snapkv", budget=4096, window_size=8)[0] == whole


def test_arguments_reach_the_frames_and_the_record(arguments: Callable[..., str], clip: Path) -> None:
    name = "qwen2_vl_snapkv"
    few, many = (
        get_model(name).create_from_arg_string(arguments(name, **more), {})
        for more in ({"max_num_frames": 4}, {"fps": 2.5, "max_pixels": 28 * 28 * 4})
    )
    assert few.settings()["max_num_frames"] == 4 and many.settings()["fps"] == 2.5
    counts = []
    for model in (few, many):
        asked = request(model, film(clip), 0, {"max_new_tokens": 3})
        counts.append(model.generate_until([asked])[0].token_counts.input_tokens)
    patches = [few.engine.size(few.engine.prompt(film(clip))), many.engine.size(many.engine.prompt(film(clip)))]
    assert counts == patches
    grids = [m.engine.batch_inputs([m.engine.prompt(film(clip))])["video_grid_thw"].tolist() for m in (few, many)]
    assert grids[0][0][0] == 2 and grids[1][0][0] == 3  # two frames a patch: 4, and 2.5 a second of 2.6 s
    assert grids[1][0][1] * grids[1][0][2] <= 16  # max_pixels of a frame
