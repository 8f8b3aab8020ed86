"""The same for every head (SnapKV, https://arxiv.org/abs/2404.14469)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.allocators.base import Allocator, Shape


@dataclass(frozen=True)
class Uniform(Allocator):
    """`budget - window_size` tokens."""

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> int:
        return shape.base
