"""Nothing is evicted: the uncompressed baseline, through the same cache as all methods."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.allocators.base import Allocator, Shape


@dataclass(frozen=True)
class Everything(Allocator):
    """Every token."""

    compresses = False

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> int:
        return length
