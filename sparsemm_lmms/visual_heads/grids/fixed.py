"""LLaVA-1.5 and PaliGemma: one picture of a fixed size, stretched, cropped or padded to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsemm_lmms.visual_heads.grids.base import Item, OfProcessor, Shown, item_of, with_blanks


class FixedGrid(OfProcessor):
    """The steps of the image processor: padding to a square, resizing, a crop from the centre, as it has them set.

    Pixels that the crop cuts away are shown by no token. A class token among the image tokens has an empty box.
    """

    def __init__(self, config: Any, tokens: Sequence[int]) -> None:
        super().__init__(config, tokens)
        self.patch: int = config.vision_config.patch_size

    def item(self, processor: Any, width: int, height: int) -> Item:
        (left, top, right, bottom), pixels = seen_part(processor.image_processor, width, height)
        rows, columns = pixels[0] // self.patch, pixels[1] // self.patch
        # What whole patches don't fill at the right and at the bottom is not seen.
        right = left + (right - left) * columns * self.patch / pixels[1]
        bottom = top + (bottom - top) * rows * self.patch / pixels[0]
        item = item_of([Shown((left, top, right, bottom), rows, columns)], width, height)
        extra = getattr(processor, "num_additional_image_tokens", 0)
        if getattr(processor, "vision_feature_select_strategy", None) == "default":
            extra -= 1
        return with_blanks(item, [0] * extra)


def seen_part(
    image_processor: Any, width: int, height: int
) -> tuple[tuple[float, float, float, float], tuple[int, int]]:
    """Part of the image that reaches the model, in pixels of the original, and its (height, width) there.

    The part reaches beyond the image where that is padded.
    """
    square = max(width, height) if getattr(image_processor, "do_pad", False) and _squares(image_processor) else None
    from_x, from_y = (0, 0) if square is None else ((square - width) // 2, (square - height) // 2)
    padded = (square or height, square or width)
    resized = _resized(image_processor, *padded) if image_processor.do_resize else padded
    final, start_y, start_x = resized, 0, 0
    if getattr(image_processor, "do_center_crop", False):
        final = (image_processor.crop_size["height"], image_processor.crop_size["width"])
        start_y, start_x = _crop_start(resized[0], final[0]), _crop_start(resized[1], final[1])
    scale_y, scale_x = padded[0] / resized[0], padded[1] / resized[1]
    top, left = start_y * scale_y - from_y, start_x * scale_x - from_x
    return (left, top, left + final[1] * scale_x, top + final[0] * scale_y), final


def _crop_start(side: int, crop: int) -> int:
    """Where a crop begins on a side; below 0 where the side is shorter and padded on both ends."""
    return -((crop - side) // 2) if crop > side else (side - crop) // 2


def _squares(image_processor: Any) -> bool:
    """Whether its padding makes images square before they are resized; elsewhere it evens out a batch."""
    return hasattr(image_processor, "pad_to_square")


def _resized(image_processor: Any, height: int, width: int) -> tuple[int, int]:
    from transformers.image_transforms import get_resize_output_image_size

    size = image_processor.size
    if size.get("height") and size.get("width"):
        return size["height"], size["width"]
    if size.get("shortest_edge") and not size.get("longest_edge"):
        shape_only = np.broadcast_to(np.uint8(0), (height, width, 1))
        new_height, new_width = get_resize_output_image_size(
            shape_only, size["shortest_edge"], default_to_square=False, input_data_format="channels_last"
        )
        return new_height, new_width
    raise ValueError(
        f"No token grid for an image processor with size={dict(size)}; height and width, or shortest_edge."
    )
