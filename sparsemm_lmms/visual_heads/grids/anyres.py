"""LLaVA-NeXT and LLaVA-OneVision: a base view, then tiles of any resolution with padding removed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch

from sparsemm_lmms.visual_heads.grids.base import (
    BASE,
    HIGH,
    Item,
    Shown,
    TokenGrid,
    clip,
    item_of,
    outer,
    place,
    with_blanks,
)


class AnyresGrid:
    """``config`` is the model's config, ``tokens`` has the image token's id.

    A config with ``vision_aspect_ratio`` (LLaVA-OneVision) bounds the tiles' tokens: more are interpolated to fewer.
    There, images that share a prompt and were given to the processor as one list have a single, padded view each.

    >>> # AnyresGrid(config, [id]).grids(processor(text=..., images=image, return_tensors="pt"), [image.size])
    """

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.model_type: str = config.model_type
        self.image_token_id = tokens[0]
        self.pinpoints: list[list[int]] = [list(pair) for pair in config.image_grid_pinpoints]
        self.tile: int = config.vision_config.image_size
        self.patch: int = config.vision_config.patch_size
        self.side = self.tile // self.patch
        ratio: str | None = getattr(config, "vision_aspect_ratio", None)
        self.most_tiles = None if ratio is None else int(ratio.removeprefix("anyres_max_"))

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
        processor: Any = None,
    ) -> list[TokenGrid]:
        if len(video_sizes):
            raise ValueError(f"{self.model_type} models take images only; give the frames as images.")
        together = [count for count in np.asarray(inputs.get("batch_num_images", [])).tolist() for _ in range(count)]
        images = [
            self._square(*size) if index < len(together) and together[index] > 1 else self._image(*size)
            for index, size in enumerate(image_sizes)
        ]
        return place(inputs["input_ids"], {self.image_token_id: images})

    def _square(self, width: int, height: int) -> Item:
        largest = max(width, height)
        left, top = -((largest - width) // 2), -((largest - height) // 2)
        return _with_newlines(item_of([self._stretched(left, top, largest, largest, HIGH)], width, height), 1)

    def _stretched(self, left: float, top: float, width: int, height: int, view: int) -> Shown:
        """A part of the image, stretched to a tile; what the patches don't fill at its right and bottom is not seen."""
        seen = self.side * self.patch / self.tile
        return Shown((left, top, left + width * seen, top + height * seen), self.side, self.side, view)

    def _image(self, width: int, height: int) -> Item:
        from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

        modeling = import_module(f"transformers.models.{self.model_type}.modeling_{self.model_type}")
        base = item_of([self._stretched(0, 0, width, height, BASE)], width, height)
        target = select_best_resolution((height, width), self.pinpoints)
        # An image without memory: the function reads the shape alone.
        shape_only = np.broadcast_to(np.uint8(0), (height, width, 1))
        new_height, new_width = get_patch_output_size(shape_only, target, input_data_format="channels_last")
        rows, columns = (pixels // self.tile * self.side for pixels in target)
        kept = modeling.unpad_image(torch.empty(1, rows, columns), (height, width))[0]
        kept_rows, kept_columns = kept.shape  # as much is taken from the top as from the bottom, and so on
        high_rows, high_columns = kept_rows, kept_columns
        if self.most_tiles is not None:
            ratio = math.sqrt(kept_rows * kept_columns / (self.most_tiles * self.side**2))
            if ratio > 1.1:
                high_rows, high_columns = int(kept_rows // ratio), int(kept_columns // ratio)
        across = self._edges((columns - kept_columns) // 2, kept_columns, high_columns)
        down = self._edges((rows - kept_rows) // 2, kept_rows, high_rows)
        boxes = outer(
            (across - (target[1] - new_width) // 2) * (width / new_width),
            (down - (target[0] - new_height) // 2) * (height / new_height),
        )
        view, frame = np.full(len(boxes), HIGH, np.int8), np.zeros(len(boxes), np.int64)
        high = _with_newlines(Item(view, frame, clip(boxes, width, height)), high_rows)
        return _joined(base, high)

    def _edges(self, first: int, kept: int, tokens: int) -> np.ndarray:
        """Pixels [tokens, 2] where equal parts of ``kept`` patches, from patch ``first`` on, start and end."""
        edges = np.round(first + np.arange(tokens + 1) * kept / max(tokens, 1), 9)
        starts, ends = edges[:-1], edges[1:]
        patches = np.stack([np.floor(starts), np.ceil(ends) - 1], axis=1)
        inside = np.stack([starts, ends], axis=1) - patches
        return patches // self.side * self.tile + (patches % self.side + inside) * self.patch


def _with_newlines(item: Item, rows: int) -> Item:
    """A newline token after each of ``rows`` equal parts."""
    return with_blanks(item, np.arange(1, rows + 1) * (len(item.view) // max(rows, 1)))


def _joined(first: Item, second: Item) -> Item:
    return Item(
        np.concatenate([first.view, second.view]),
        np.concatenate([first.frame, second.frame]),
        np.concatenate([first.boxes, second.boxes]),
    )
