"""Finding visual heads: token grids, calibration images, chase, automatic head scores, pictures (SparseMM §3).

    from sparsemm_lmms.visual_heads import ChaseSettings, GeneratedPages, resolve_head_scores, score_heads

Names are imported on first use, so that importing this package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsemm_lmms.visual_heads.chase import ChaseSettings, score_heads
    from sparsemm_lmms.visual_heads.render import GeneratedPages
    from sparsemm_lmms.visual_heads.resolve import resolve_head_scores
    from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample, Skipped, Span
    from sparsemm_lmms.visual_heads.sources import FolderPages, SynthDogPages
    from sparsemm_lmms.visual_heads.token_grid import grid_for

_HOME = {
    "Box": "samples",
    "CalibrationSample": "samples",
    "ChaseSettings": "chase",
    "FolderPages": "sources",
    "GeneratedPages": "render",
    "Skipped": "samples",
    "Span": "samples",
    "SynthDogPages": "sources",
    "grid_for": "token_grid",
    "resolve_head_scores": "resolve",
    "score_heads": "chase",
}

__all__ = [
    "Box",
    "CalibrationSample",
    "ChaseSettings",
    "FolderPages",
    "GeneratedPages",
    "Skipped",
    "Span",
    "SynthDogPages",
    "grid_for",
    "resolve_head_scores",
    "score_heads",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
