"""Where image tokens look: prompt positions of image tokens -> pixel boxes of the original image.

A visual head is found by asking whether the image token it attends to lies on the word being written
(SparseMM, https://arxiv.org/abs/2506.05344, §3), so each kind of grid has the exact geometry of its preprocessing:

* ``anyres``: base view (whole image, stretched), then the any-resolution tiles with padding removed, row by row,
  each row ended by a newline token (LLaVA-NeXT, LLaVA-OneVision with its pooling).
* ``fixed``: one picture of a size that does not depend on the image (LLaVA-1.5, PaliGemma).
* ``patches``: ``grid_thw`` after the spatial merge, frame group by frame group (Qwen-VL); images and videos.
* ``rows``: one picture of the image's shape, a token between its rows (Mistral 3, Pixtral).
* ``tiles``: the image cut into tiles, and the whole as a thumbnail (InternVL, Idefics3 and SmolVLM, Gemma 3).

Where ``transformers`` has a function for a step, that is called, so a change there moves the grid with it.

The research code looks at the high-resolution view only (``views="high"``, the default) and divides pixels by
a floored cell size, which drifts on sizes that the grid doesn't divide; here cells are exact.
"""

from __future__ import annotations

from typing import Any

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.visual_heads.grids.anyres import AnyresGrid
from sparsemm_lmms.visual_heads.grids.base import BASE, HIGH, NEWLINE, GridFamily, TokenGrid, Views
from sparsemm_lmms.visual_heads.grids.fixed import FixedGrid
from sparsemm_lmms.visual_heads.grids.patches import PatchGrid
from sparsemm_lmms.visual_heads.grids.rows import RowsGrid
from sparsemm_lmms.visual_heads.grids.tiles import TilesGrid

__all__ = ["BASE", "GRIDS", "HIGH", "NEWLINE", "GridFamily", "TokenGrid", "Views", "grid_for"]

GRIDS: dict[str, type] = {
    "anyres": AnyresGrid,
    "fixed": FixedGrid,
    "patches": PatchGrid,
    "rows": RowsGrid,
    "tiles": TilesGrid,
}
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
    # LLaVA's class around Pixtral's vision tower: the pictures are Pixtral's.
    kind = "rows" if config.vision_config.model_type == "pixtral" else family.grid
    return GRIDS[kind](config, family.vision_ids(config))
