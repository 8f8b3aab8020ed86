"""Where image tokens look: prompt positions of image tokens -> pixel boxes of the original image.

A visual head is found by asking whether the image token it attends to lies on the word being written
(SparseMM, https://arxiv.org/abs/2506.05344, §3), so each kind of grid has the exact geometry of its preprocessing.

* ``AnyresGrid``: base view (whole image, stretched), then the any-resolution tiles with padding removed, row by row,
  each row ended by a newline token. ``transformers``' own ``select_best_resolution``, ``get_patch_output_size`` and
  ``unpad_image`` are called here, so a change of theirs moves this grid with it.
* ``PatchGrid``: ``grid_thw`` after the spatial merge, row by row, frame group by frame group; images and videos.

The research code looks at the high-resolution view only (``views="high"``, the default) and divides pixels by
a floored cell size, which drifts on sizes that the grid doesn't divide; here cells are exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, Protocol

import numpy as np
import torch

from sparsemm_lmms.families import FAMILIES

Views = Literal["high", "all"]
NEWLINE, BASE, HIGH = -1, 0, 1


@dataclass(frozen=True, eq=False)
class TokenGrid:
    """The image tokens of one prompt, in prompt order; all arrays have one entry a token.

    positions: int64, index in the (padded) prompt row. item: int64, which image or video of the prompt, in order of
    appearance. view: int8, NEWLINE, BASE or HIGH (families with one view: HIGH). frame: int64, temporal group of a
    video, 0 for images. boxes: float64 [tokens, 4], (left, top, right, bottom) in pixels of the original image, clipped
    to it; a token that shows no pixel of it (newline, leftover padding) has an empty box.
    """

    positions: np.ndarray
    item: np.ndarray
    view: np.ndarray
    frame: np.ndarray
    boxes: np.ndarray

    def inside(
        self, xyxy: Sequence[float], item: int = 0, views: Views = "high", frame: int | None = None
    ) -> np.ndarray:
        """Prompt positions (int64) of the tokens whose box overlaps ``xyxy`` at all, as in the paper's code."""
        left, top, right, bottom = xyxy
        width = np.minimum(self.boxes[:, 2], right) - np.maximum(self.boxes[:, 0], left)
        height = np.minimum(self.boxes[:, 3], bottom) - np.maximum(self.boxes[:, 1], top)
        chosen = (width > 0) & (height > 0) & (self.item == item)
        chosen &= self.view >= (HIGH if views == "high" else BASE)
        if frame is not None:
            chosen &= self.frame == frame
        return self.positions[chosen]


@dataclass(frozen=True, eq=False)
class _Item:
    """Tokens of one image or video before they get positions."""

    view: np.ndarray
    frame: np.ndarray
    boxes: np.ndarray


class GridFamily(Protocol):
    """What a kind of grid provides."""

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
    ) -> list[TokenGrid]:
        """One grid for each row of ``inputs["input_ids"]``; sizes are (width, height), flat over the batch."""
        ...


class AnyresGrid:
    """A base view and any-resolution tiles: ``config`` is the model's config, ``tokens`` has the image token's id.

    >>> # AnyresGrid(config, [id]).grids(processor(text=..., images=image, return_tensors="pt"), [image.size])
    """

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.model_type: str = config.model_type
        self.image_token_id = tokens[0]
        self.pinpoints: list[list[int]] = [list(pair) for pair in config.image_grid_pinpoints]
        self.tile: int = config.vision_config.image_size
        self.patch: int = config.vision_config.patch_size

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
    ) -> list[TokenGrid]:
        if len(video_sizes):
            raise ValueError(f"{self.model_type} models take images only; give the frames as images.")
        images = [self._image(width, height) for width, height in image_sizes]
        return _place(inputs["input_ids"], {self.image_token_id: images})

    def _image(self, width: int, height: int) -> _Item:
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

        modeling = import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        side = self.tile // self.patch
        base = _cells(side, side, width / side, height / side)
        target = select_best_resolution((height, width), self.pinpoints)
        # An image without memory: the function reads the shape alone.
        shape_only = np.broadcast_to(np.uint8(0), (height, width, 1))
        new_height, new_width = get_patch_output_size(shape_only, target, input_data_format="channels_last")
        rows, columns = target[0] // self.patch, target[1] // self.patch
        scale_x, scale_y = width / new_width, height / new_height
        high = _cells(rows, columns, self.patch * scale_x, self.patch * scale_y)
        high[:, [0, 2]] -= (target[1] - new_width) // 2 * scale_x
        high[:, [1, 3]] -= (target[0] - new_height) // 2 * scale_y
        kept = modeling.unpad_image(torch.arange(rows * columns).view(1, rows, columns), (height, width))[0].numpy()
        newline = np.full((kept.shape[0], 1), rows * columns)
        order = np.concatenate([kept, newline], axis=1).reshape(-1)
        high = np.concatenate([high, np.zeros((1, 4))])[order]
        view = np.concatenate([np.full(len(base), BASE), np.where(order == rows * columns, NEWLINE, HIGH)])
        boxes = _clip(np.concatenate([base, high]), width, height)
        return _Item(view.astype(np.int8), np.zeros(len(view), np.int64), boxes)


class PatchGrid:
    """Images and videos as patches, merged; a video's token covers ``temporal_patch_size`` frames (a ``frame`` group).

    ``tokens``: ids of the image token and, where there is one, the video token.
    """

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.image_token_id, self.video_token_id = tokens[0], tokens[-1]
        self.merge: int = config.vision_config.spatial_merge_size

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
    ) -> list[TokenGrid]:
        images = self._items(inputs.get("image_grid_thw"), image_sizes, "image")
        videos = self._items(inputs.get("video_grid_thw"), video_sizes, "video")
        if self.video_token_id == self.image_token_id and videos:
            raise ValueError("This model has no token for videos; give the frames as images.")
        return _place(inputs["input_ids"], {self.video_token_id: videos, self.image_token_id: images})

    def _items(self, grid_thw: Any, sizes: Sequence[tuple[int, int]], kind: str) -> list[_Item]:
        shapes = [] if grid_thw is None else np.asarray(grid_thw).reshape(-1, 3).tolist()
        if len(shapes) != len(sizes):
            raise ValueError(f"{len(shapes)} {kind} grids but {len(sizes)} {kind} sizes; give one for each.")
        items = []
        for (frames, rows, columns), (width, height) in zip(shapes, sizes, strict=True):
            rows, columns = rows // self.merge, columns // self.merge
            boxes = _clip(_cells(rows, columns, width / columns, height / rows), width, height)
            frame = np.repeat(np.arange(frames), rows * columns)
            items.append(_Item(np.full(len(frame), HIGH, np.int8), frame, np.tile(boxes, (frames, 1))))
        return items


GRIDS: dict[str, type] = {"anyres": AnyresGrid, "patches": PatchGrid}
"""Kind of grid, as families name it."""


def grid_for(config: Any) -> GridFamily:
    """The token grid of a model, by its config's ``model_type``.

    Raises:
        ValueError: for a model type without one.
    """
    family = FAMILIES.get(config.model_type)
    if family is None or family.grid is None:
        known = [name for name, other in FAMILIES.items() if other.grid is not None]
        raise ValueError(f"No token grid for model type {config.model_type!r}; known are {', '.join(known)}.")
    if family.grid not in GRIDS:
        raise ValueError(f"The grid {family.grid!r} of {family.model_type} is unknown; known are {', '.join(GRIDS)}.")
    return GRIDS[family.grid](config, family.vision_ids(config))


def _cells(rows: int, columns: int, width: float, height: float) -> np.ndarray:
    """Boxes [rows * columns, 4] of a regular grid, row by row."""
    row, column = (axis.reshape(-1).astype(np.float64) for axis in np.indices((rows, columns)))
    return np.stack([column * width, row * height, (column + 1) * width, (row + 1) * height], axis=1)


def _clip(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.clip(boxes, 0, [width, height, width, height])


def _place(input_ids: Any, items: Mapping[int, Sequence[_Item]]) -> list[TokenGrid]:
    """Deal the images and videos of a batch to the placeholder tokens of its rows, in order of appearance."""
    rows = np.asarray(input_ids)
    queues = {token: list(queue) for token, queue in items.items()}
    grids = []
    for row in rows:
        slots = np.flatnonzero(np.isin(row, list(queues)))
        taken: list[_Item] = []
        start = 0
        while start < len(slots):
            token = int(row[slots[start]])
            if not queues[token]:
                raise ValueError(f"The prompt has more image tokens (id {token}) than its images and videos explain.")
            item = queues[token].pop(0)
            stop = start + len(item.view)
            if stop > len(slots) or (row[slots[start:stop]] != token).any():
                raise ValueError(
                    f"An image needs {len(item.view)} tokens, but the prompt has {len(slots) - start} left; "
                    "processor and model config disagree on sizes, or the prompt was truncated."
                )
            taken.append(item)
            start = stop
        grids.append(_join(slots, taken))
    left = sum(len(queue) for queue in queues.values())
    if left:
        raise ValueError(f"{left} images or videos have no tokens in the prompts.")
    return grids


def _join(slots: np.ndarray, items: Sequence[_Item]) -> TokenGrid:
    if not items:
        empty = np.zeros(0, np.int64)
        return TokenGrid(empty, empty, empty.astype(np.int8), empty, np.zeros((0, 4)))
    return TokenGrid(
        slots.astype(np.int64),
        np.repeat(np.arange(len(items)), [len(item.view) for item in items]),
        np.concatenate([item.view for item in items]),
        np.concatenate([item.frame for item in items]),
        np.concatenate([item.boxes for item in items]),
    )
