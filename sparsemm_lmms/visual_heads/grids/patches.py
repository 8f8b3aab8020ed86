"""The Qwen and GLM models and Gemma 4: patches of one resized view, merged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsemm_lmms.visual_heads.grids.base import HIGH, Item, TokenGrid, cells, clip, place


class PatchGrid:
    """Images and videos as patches, merged; a video's token covers ``temporal_patch_size`` frames (a ``frame`` group).

    ``tokens``: ids of the image token and, where there is one, the video token.
    """

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.image_token_id, self.video_token_id = tokens[0], tokens[-1]
        vision = config.vision_config
        self.merge: int = getattr(vision, "spatial_merge_size", None) or vision.pooling_kernel_size

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
        processor: Any = None,
    ) -> list[TokenGrid]:
        images = self._items(_shapes(inputs, "image"), image_sizes, "image")
        videos = self._items(_shapes(inputs, "video"), video_sizes, "video")
        if self.video_token_id == self.image_token_id and videos:
            raise ValueError("This model has no token for videos; give the frames as images.")
        return place(inputs["input_ids"], {self.video_token_id: videos, self.image_token_id: images})

    def _items(self, shapes: Sequence[Sequence[int]], sizes: Sequence[tuple[int, int]], kind: str) -> list[Item]:
        if len(shapes) != len(sizes):
            raise ValueError(f"{len(shapes)} {kind} grids but {len(sizes)} {kind} sizes; give one for each.")
        items = []
        for (frames, rows, columns), (width, height) in zip(shapes, sizes, strict=True):
            rows, columns = rows // self.merge, columns // self.merge
            boxes = clip(cells(rows, columns, width / columns, height / rows), width, height)
            frame = np.repeat(np.arange(frames), rows * columns)
            items.append(Item(np.full(len(frame), HIGH, np.int8), frame, np.tile(boxes, (frames, 1))))
        return items


def _shapes(inputs: Mapping[str, Any], kind: str) -> list[list[int]]:
    """(frames, rows, columns) of patches of every image or video."""
    if (grid_thw := inputs.get(f"{kind}_grid_thw")) is not None:
        return np.asarray(grid_thw).reshape(-1, 3).tolist()
    if (places := inputs.get(f"{kind}_position_ids")) is None:
        return []
    last = np.asarray(places).max(axis=-2)  # (x, y) of each patch, and -1 for padding: [images, patches, 2]
    return [[1, rows + 1, columns + 1] for columns, rows in last.reshape(-1, 2).tolist()]
