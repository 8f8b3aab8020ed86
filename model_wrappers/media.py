"""Videos as the processor takes them: decoded frames, sampled as the host's stock Qwen2-VL samples them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers.video_utils import VideoMetadata, load_video


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees.

    Attributes:
        max_num_frames: at most so many, spread evenly over the video.
        fps: frames a second, or None for as many as `max_num_frames` allows.
    """

    max_num_frames: int = 32
    fps: float | None = None

    def indices(self, total: int, video_fps: float, start: float | None = None, end: float | None = None) -> np.ndarray:
        """Frames to read of a video of `total` frames, between `start` and `end` seconds: an even number, int64.

        >>> FrameSampling(max_num_frames=4).indices(9, 3.0).tolist()
        [0, 3, 5, 8]
        >>> FrameSampling(fps=1).indices(9, 3.0).tolist()
        [0, 8]
        """
        first = min(round((start or 0) * video_fps), total - 1)
        last = total - 1 if end is None else max(min(round(end * video_fps), total - 1), first)
        length = last - first + 1
        count = length if self.fps is None else length / max(video_fps, 1e-6) * self.fps
        count = int(min(count, self.max_num_frames, length)) // 2 * 2  # two frames make one temporal patch
        return np.linspace(first, last, max(count, min(2, length))).round().astype(np.int64)


def read_video(
    source: Any, sampling: FrameSampling, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """Sampled frames of a video, uint8 `[frames, height, width, 3]`.

    Args:
        source: a file, a dict with its `path` or `url` (and `video_start`, `video_end`), or frames: images or an array.
        start, end: seconds between which frames are taken.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that does not tell how many frames it has.
    """
    if isinstance(source, dict):
        start, end = source.get("video_start", start), source.get("video_end", end)
        found = [source[key] for key in ("video", "path", "url") if source.get(key) is not None]
        if not found:
            raise ValueError(f"A video was given as a dict with keys {sorted(source)}; it needs `path` or `url`.")
        source = found[0]
    if isinstance(source, np.ndarray):
        return source[FrameSampling(sampling.max_num_frames).indices(len(source), 1.0)]
    if isinstance(source, Sequence) and not isinstance(source, str):
        picked = FrameSampling(sampling.max_num_frames).indices(len(source), 1.0)
        return np.stack([np.asarray(source[i].convert("RGB")) for i in picked])

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        if not metadata.total_num_frames or not metadata.fps:
            raise ValueError(f"The video {source} does not tell its number of frames; convert it to MP4.")
        return sampling.indices(metadata.total_num_frames, metadata.fps, start, end)

    file: Any = str(source)  # a path or an address, for which the signature has names of its own
    if "://" not in file and not Path(file).is_file():
        raise FileNotFoundError(f"There is no video {source}.")
    frames, _ = load_video(file, backend="pyav", sample_indices_fn=choose)  # av comes with lmms-eval
    return np.asarray(frames)
