"""Videos as the processor takes them: decoded frames, sampled (and in some families resized) as qwen-vl-utils does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchvision.transforms.functional import InterpolationMode, resize
from transformers.video_utils import VideoMetadata, load_video

from sparsemm_lmms.families import Family
from sparsemm_lmms.model_wrappers.arguments import RunOptions

GIVEN_FPS = 2.0
"""Frames a second of a video that comes as frames, as qwen-vl-utils takes them."""


class Video(NamedTuple):
    """`frames`, uint8 `[frames, height, width, 3]`, and which ones of the whole video they are."""

    frames: np.ndarray
    metadata: VideoMetadata


@dataclass(frozen=True)
class FrameSize:
    """To which size the frames of a video are brought.

    Attributes:
        cell: side of what one token shows, in pixels; sides become multiples of it.
        min_pixels, max_pixels: limits of a frame; None are 128 cells, and none beside the other two.
        total_pixels: limit of all frames together; a frame has at most 768 cells anyway.
    """

    cell: int
    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None

    def fit(self, frames: np.ndarray) -> np.ndarray:
        """Resized frames, uint8 `[frames, height, width, 3]`."""
        from qwen_vl_utils import smart_resize  # a requirement of both hosts

        count, height, width = frames.shape[:3]
        area = self.cell**2
        least = self.min_pixels or 128 * area
        total = self.total_pixels or int(0.9 * 128000 * area)
        most = max(min(768 * area, total / count * 2), int(least * 1.05))
        size = smart_resize(
            height, width, factor=self.cell, min_pixels=least, max_pixels=min(most, self.max_pixels or most)
        )
        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
        return resize(pixels, list(size), InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class FrameSampling:
    """Which frames of a video the model sees.

    Attributes:
        max_num_frames: at most so many, spread evenly over the video.
        fps: frames a second, or None for as many as `max_num_frames` allows.
        min_num_frames: at least so many where `fps` says how many, if the video has them.
        size: of the frames, or None for that of the video.
    """

    max_num_frames: int = 32
    fps: float | None = None
    min_num_frames: int = 2
    size: FrameSize | None = None

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
        count: float = length
        if self.fps is not None:
            count = max(length / max(video_fps, 1e-6) * self.fps, self.min_num_frames)
        count = int(min(count, self.max_num_frames, length)) // 2 * 2  # two frames make one temporal patch
        return np.linspace(first, last, max(count, min(2, length))).round().astype(np.int64)


def sampling_of(family: Family, options: RunOptions, processor: Any) -> FrameSampling:
    """How the videos of a run are sampled, and in families with `frame_limits` resized."""
    limits = family.lmms_eval.frame_limits
    if limits is None:
        return FrameSampling(options.max_num_frames, options.fps)
    cell = processor.video_processor.patch_size * processor.video_processor.merge_size
    most = options.max_pixels if limits.total_pixels is None else None
    size = FrameSize(cell, options.min_pixels, most, limits.total_pixels)
    return FrameSampling(options.max_num_frames, options.fps, min_num_frames=4, size=size)


def read_video(source: Any, sampling: FrameSampling, start: float | None = None, end: float | None = None) -> Video:
    """Sampled frames of a video.

    Args:
        source: a file, a dict with its `path` or `url` (and `video_start`, `video_end`), frames (images or an array),
            or a video that was read before.
        start, end: seconds between which frames are taken.

    Raises:
        FileNotFoundError: for a file that is not there.
        ValueError: for a file that does not tell how many frames it has.
    """
    if isinstance(source, Video):
        return source
    video = _read(source, sampling, start, end)
    return video if sampling.size is None else video._replace(frames=sampling.size.fit(video.frames))


def _read(source: Any, sampling: FrameSampling, start: float | None, end: float | None) -> Video:
    if isinstance(source, dict):
        start, end = source.get("video_start", start), source.get("video_end", end)
        found = [source[key] for key in ("video", "path", "url") if source.get(key) is not None]
        if not found:
            raise ValueError(f"A video was given as a dict with keys {sorted(source)}; it needs `path` or `url`.")
        source = found[0]
    if isinstance(source, (np.ndarray, Sequence)) and not isinstance(source, str):
        picked = FrameSampling(sampling.max_num_frames).indices(len(source), GIVEN_FPS)
        metadata = VideoMetadata(len(source), fps=GIVEN_FPS, frames_indices=picked.tolist())
        if isinstance(source, np.ndarray):
            return Video(source[picked], metadata)
        return Video(np.stack([np.asarray(source[i].convert("RGB")) for i in picked]), metadata)

    def choose(metadata: VideoMetadata, **_: Any) -> np.ndarray:
        if not metadata.total_num_frames or not metadata.fps:
            raise ValueError(f"The video {source} does not tell its number of frames; convert it to MP4.")
        return sampling.indices(metadata.total_num_frames, metadata.fps, start, end)

    file: Any = str(source)  # a path or an address, for which the signature has names of its own
    if "://" not in file and not Path(file).is_file():
        raise FileNotFoundError(f"There is no video {source}.")
    frames, metadata = load_video(file, backend="pyav", sample_indices_fn=choose)  # av comes with lmms-eval
    return Video(np.asarray(frames), metadata)
