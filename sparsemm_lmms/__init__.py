"""Per-head compressed KV caches for vision-language models (SparseMM, SnapKV, PyramidKV, AdaKV).

    from sparsemm_lmms import CompressionConfig, HeadScores, compress

Names are imported on first use, so that `import sparsemm_lmms` costs nothing in programs that only look for plugins.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sparsemm_lmms._source_tree import map_folders
from sparsemm_lmms._version import __version__

map_folders()

if TYPE_CHECKING:
    from sparsemm_lmms.cache import RaggedCache
    from sparsemm_lmms.config import CompressionConfig
    from sparsemm_lmms.head_scores import HeadScores
    from sparsemm_lmms.selection import head_budgets, kept_positions, token_scores
    from sparsemm_lmms.session import CompressionSession, compress

_HOMES = {
    "CompressionConfig": "config",
    "CompressionSession": "session",
    "HeadScores": "head_scores",
    "RaggedCache": "cache",
    "compress": "session",
    "head_budgets": "selection",
    "kept_positions": "selection",
    "token_scores": "selection",
}

__all__ = [
    "CompressionConfig",
    "CompressionSession",
    "HeadScores",
    "RaggedCache",
    "__version__",
    "compress",
    "head_budgets",
    "kept_positions",
    "token_scores",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
