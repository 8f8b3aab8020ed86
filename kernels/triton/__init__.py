"""Kernels of the ragged KV cache: window scores, eviction, append, decode; each beside its torch reference."""

from sparsemm_lmms.kernels.append import append
from sparsemm_lmms.kernels.backend import DecodePlan, resolve_backend
from sparsemm_lmms.kernels.evict import evict
from sparsemm_lmms.kernels.plan import ReferencePlan
from sparsemm_lmms.kernels.ragged_decode import ragged_decode
from sparsemm_lmms.kernels.window_score import window_score

__all__ = [
    "DecodePlan",
    "ReferencePlan",
    "append",
    "evict",
    "ragged_decode",
    "resolve_backend",
    "window_score",
]
