"""Mistral 3 and Pixtral: one picture of the image's shape, its rows of tokens parted by break tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sparsemm_lmms.visual_heads.grids.base import Item, Shown, TokenGrid, item_of, place


class RowsGrid:
    """``inputs["image_sizes"]`` says how large each picture became; break and end tokens are no image tokens."""

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        self.model_type: str = config.model_type
        self.image_token_id = tokens[0]
        self.cell: int = config.vision_config.patch_size * getattr(config, "spatial_merge_size", 1)

    def grids(
        self,
        inputs: Mapping[str, Any],
        image_sizes: Sequence[tuple[int, int]],
        video_sizes: Sequence[tuple[int, int]] = (),
        processor: Any = None,
    ) -> list[TokenGrid]:
        if len(video_sizes):
            raise ValueError(f"{self.model_type} models take images only; give the frames as images.")
        resized = inputs.get("image_sizes")
        shapes = [] if resized is None else np.asarray(resized).reshape(-1, 2).tolist()
        if len(shapes) != len(image_sizes):
            raise ValueError(
                f"{len(shapes)} images in the inputs but {len(image_sizes)} image sizes; give one for each."
            )
        items = [self._image(shape, *size) for shape, size in zip(shapes, image_sizes, strict=True)]
        return place(inputs["input_ids"], {self.image_token_id: items})

    def _image(self, shape: Sequence[int], width: int, height: int) -> Item:
        whole = Shown((0, 0, width, height), shape[0] // self.cell, shape[1] // self.cell)
        return item_of([whole], width, height)
