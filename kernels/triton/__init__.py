"""Kernels of the ragged KV cache: window scores, eviction, append, decode; each in triton and in plain torch."""

from sparsemm_lmms.kernels.append import append
from sparsemm_lmms.kernels.backend import resolve_backend
from sparsemm_lmms.kernels.evict import evict
from sparsemm_lmms.kernels.ragged_decode import ragged_decode, store_places
from sparsemm_lmms.kernels.window_score import window_score

__all__ = ["append", "evict", "ragged_decode", "resolve_backend", "store_places", "window_score"]
