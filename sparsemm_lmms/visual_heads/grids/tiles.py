"""InternVL, Idefics3 and SmolVLM, Gemma 3: the image cut into tiles, and the whole of it as one more picture."""

from __future__ import annotations

import math
from typing import Any

from sparsemm_lmms.visual_heads.grids.base import BASE, Item, OfProcessor, Shown, item_of

Boxes = list[tuple[float, float, float, float]]


class TilesGrid(OfProcessor):
    """Every picture is a square of tokens. Which tiles there are follows from the image processor's settings.

    The whole is a BASE view beside tiles, and the one HIGH view of an image that is not cut.
    """

    def item(self, processor: Any, width: int, height: int) -> Item:
        side = _side(processor)
        whole = (0.0, 0.0, float(width), float(height))
        image_processor = processor.image_processor
        if hasattr(image_processor, "crop_to_patches"):
            tiles, first = _even(*_internvl(processor, width, height), width, height), False
        elif hasattr(image_processor, "max_image_size"):
            tiles, first = _even(*_idefics3(image_processor, width, height), width, height), False
        elif hasattr(image_processor, "do_pan_and_scan"):
            tiles, first = _gemma3(processor, width, height), True
        else:
            name = type(image_processor).__name__
            raise ValueError(f"No token grid for {name}: how it cuts images into tiles is not known.")
        if not tiles:
            return item_of([Shown(whole, side, side)], width, height)
        pictures = [Shown(box, side, side) for box in tiles]
        pictures.insert(0 if first else len(pictures), Shown(whole, side, side, BASE))
        return item_of(pictures, width, height)


def _side(processor: Any) -> int:
    """Tokens on each side of a picture."""
    count = getattr(processor, "image_seq_length", None) or getattr(processor, "image_seq_len", None)
    if count is None or math.isqrt(count) ** 2 != count:
        name = type(processor).__name__
        raise ValueError(f"No token grid for {name}: its pictures have {count} tokens, which is no square.")
    return math.isqrt(count)


def _even(rows: int, columns: int, width: int, height: int) -> Boxes:
    """Tiles row by row over an image that is stretched to them; none for a single one."""
    if rows * columns <= 1:
        return []
    across, down = width / columns, height / rows
    return [
        (column * across, row * down, (column + 1) * across, (row + 1) * down)
        for row in range(rows)
        for column in range(columns)
    ]


def _internvl(processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns: the shape nearest to the image's among those of few enough tiles."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    (pictures,) = processor._get_num_multimodal_tokens(image_sizes=[(height, width)])["num_image_patches"]
    if pictures == 1:
        return 1, 1
    options = processor.image_processor
    tile = (options.size["height"], options.size["width"])
    columns, rows = get_optimal_tiled_canvas((height, width), tile, options.min_patches, options.max_patches)
    return rows, columns


def _idefics3(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns: the longest side is resized, then both are stretched to whole tiles."""
    from transformers.models.idefics3.image_processing_pil_idefics3 import (
        _resize_output_size_rescale_to_max_len,
        _resize_output_size_scale_below_upper_bound,
    )

    if not image_processor.do_image_splitting:
        return 1, 1
    tile = image_processor.max_image_size["longest_edge"]
    if image_processor.do_resize:
        largest = image_processor.size["longest_edge"]
        height, width = _resize_output_size_rescale_to_max_len(height, width, max_len=largest)
        bound: Any = 4096  # annotated as a dict there, and compared with sides
        height, width = _resize_output_size_scale_below_upper_bound(height, width, max_len=bound)
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / ratio) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * ratio) / tile)
    return rows, columns


def _gemma3(processor: Any, width: int, height: int) -> Boxes:
    """Crops of pan and scan, along the longer side; the last one is what is left."""
    settings = getattr(processor, "images_kwargs", {})
    if not settings.get("do_pan_and_scan"):
        return []
    smallest, most = settings["pan_and_scan_min_crop_size"], settings["pan_and_scan_max_num_crops"]
    long, short = max(width, height), min(width, height)
    if long / short < settings["pan_and_scan_min_ratio_to_activate"]:
        return []
    count = min(most, max(2, min(long // smallest, math.floor(long / short + 0.5))))
    step = math.ceil(long / count)
    if min(step, short) < smallest:
        return []
    starts = [(step * index, min(step * (index + 1), long)) for index in range(count)]
    if width >= height:
        return [(float(a), 0.0, float(b), float(height)) for a, b in starts]
    return [(0.0, float(a), float(width), float(b)) for a, b in starts]
