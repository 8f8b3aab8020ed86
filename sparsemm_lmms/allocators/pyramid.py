"""PyramidKV (https://arxiv.org/abs/2406.02069): less with depth, as in the SparseMM code.

Deviation: that code computes the capacities for the first prompt of a process and reuses them; here each prompt gets
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.budgets import pyramid_capacities_exact, pyramid_capacity
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class Pyramid(Allocator):
    """Every head of a layer keeps the same number; shallow layers keep more."""

    papers = (("PyramidKV", "2406.02069"),)

    beta: int = setting(20, help="the shallowest share is `budget / beta`", word="beta", low=1)

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> int:
        if shape.redistribute:
            return int(pyramid_capacities_exact(shape.num_layers, shape.base, length, self.beta)[layer_idx])
        return pyramid_capacity(layer_idx, shape.num_layers, shape.base, length, self.beta)
