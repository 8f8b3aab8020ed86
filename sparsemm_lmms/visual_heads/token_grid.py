"""Where image tokens look: prompt positions of image tokens -> pixel boxes of the original image.

A visual head is found by asking whether the image token it attends to lies on the word being written
(SparseMM, https://arxiv.org/abs/2506.05344, §3), so each kind of grid has the exact geometry of its preprocessing:

* ``anyres``: base view (whole image, stretched), then the any-resolution tiles with padding removed, row by row,
  each row ended by a newline token (LLaVA-NeXT, LLaVA-OneVision with its pooling).
* ``fixed``: one picture of a size that does not depend on the image (LLaVA-1.5, PaliGemma).
* ``patches``: patches of the resized image after their merge (Qwen-VL, GLM-V, Gemma 4), and of videos frame group by
  frame group (Qwen2-VL, Qwen2.5-VL).
* ``rows``: one picture of the image's shape, a token between its rows (Mistral 3, Pixtral).
* ``tiles``: the image cut into tiles, and the whole as a thumbnail (InternVL, Idefics3 and SmolVLM, Gemma 3).

Where ``transformers`` has a function for a step, that is called, so a change there moves the grid with it.

The research code looks at the high-resolution view only (``views="high"``, the default) and divides pixels by
a floored cell size, which drifts on sizes that the grid doesn't divide; here cells are exact.
"""

from __future__ import annotations

from typing import Any

from sparsemm_lmms.families import FAMILIES, family_for
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


def kind_of(config: Any) -> str | None:
    """The kind of grid of a model type without a family, where its config tells; else None.

    A vision tower with ``spatial_merge_size`` merges neighbouring patches of one resized picture, row by row.
    """
    merge = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    return "patches" if isinstance(merge, int) and _tokens(config) else None


def _tokens(config: Any) -> list[int]:
    """Ids of the image token and, where there is one, the video token, by transformers' usual names."""
    found = [[getattr(config, f"{media}_token_{end}", None) for end in ("id", "index")] for media in ("image", "video")]
    ids = [next((value for value in values if isinstance(value, int)), None) for values in found]
    return [] if ids[0] is None else [value for value in ids if value is not None]


def grid_for(config: Any) -> GridFamily:
    """The token grid of a model, by its config's ``model_type``, or by ``kind_of`` where that is no family's.

    Raises:
        ValueError: for a model type without one.
    """
    family = family_for(config.model_type)
    grid = kind_of(config) if family is None else family.grid
    if grid is None:
        known = [name for other in FAMILIES.values() if other.grid is not None for name in other.architectures]
        raise ValueError(
            f"No token grid for model type {config.model_type!r}, so nothing tells what its image tokens show "
            f"and its visual heads cannot be found (use head_scores=PATH); known are {', '.join(known)}."
        )
    if grid not in GRIDS:
        raise ValueError(f"The grid {grid!r} of {config.model_type} is unknown; known are {', '.join(GRIDS)}.")
    # LLaVA's class around Pixtral's vision tower: the pictures are Pixtral's.
    kind = "rows" if config.vision_config.model_type == "pixtral" else grid
    return GRIDS[kind](config, _tokens(config) if family is None else family.vision_ids(config))
