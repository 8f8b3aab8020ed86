"""SparseMM (https://arxiv.org/abs/2506.05344): the budget of the whole model goes to the visual heads.

Deviations: none by default. `redistribute=True` gives what a head cannot use to the other heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.budgets import sparsemm_capacities, spend_exactly
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class ByHeadScores(Allocator):
    """A uniform floor of `ratio`, the rest in proportion to the scores of the heads."""

    needs_head_scores = True
    papers = (("SparseMM", "2506.05344"),)

    ratio: float = setting(
        0.1, help="share of `budget - window_size` that every head gets (rho of the paper)", word="r", low=0, high=1
    )

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> np.ndarray:
        if not shape.redistribute:
            length = -1  # the published rule does not look at the prompt
        if length not in shape.memo:
            shape.memo[length] = self._of_model(shape, length)
        return shape.memo[length][layer_idx]

    def _of_model(self, shape: Shape, length: int) -> np.ndarray:
        if not shape.redistribute:
            return sparsemm_capacities(shape.shares, shape.base, self.ratio)
        limit = np.full(shape.shares.shape, length)
        floor = np.full(shape.shares.shape, shape.base * self.ratio)
        return spend_exactly(floor, shape.shares, limit, min(shape.base, length) * shape.shares.size)
