"""Kernels of the ragged KV cache: window scores, eviction, append, decode; each in triton and in plain torch."""

from .append import append
from .backend import resolve_backend
from .evict import evict
from .ragged_decode import ragged_decode, store_places
from .window_score import window_score

__all__ = ["append", "evict", "ragged_decode", "resolve_backend", "store_places", "window_score"]
