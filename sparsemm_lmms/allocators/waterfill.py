"""Budgets by measured retention, half and half with SparseMM's.

`chase` measures for each kv head how much of the attention of later answer tokens it holds when it keeps k tokens. One
half of the budget goes where it adds most of that mass over the whole model (the concave hulls of the curves, the
steepest piece first), the other half by the scores of the heads, as SparseMM (https://arxiv.org/abs/2506.05344) does.
Exactly `min(budget, prompt)` tokens per head are spent on average.

Mass alone loses short answers at small budgets: it feeds heads whose attention is broad, not those that read. Scores
alone lose long ones at middle budgets: a head that reads a little gets almost nothing. The share was chosen on
calibration images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.allocators.base import Shape
from sparsemm_lmms.allocators.head_scores import ByHeadScores
from sparsemm_lmms.budgets import spend_exactly
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class Waterfill(ByHeadScores):
    """By head scores for `score_share` of the budget, by held mass for the rest."""

    needs_retention = True

    score_share: float = setting(
        0.5,
        help="share of the budget that goes by head scores, the rest by retention",
        word="hss",
        low=0,
        high=1,
    )

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> np.ndarray:
        if length not in shape.memo:
            shape.memo[length] = self._of_prompt(shape, length)
        return shape.memo[length][layer_idx]

    def _of_prompt(self, shape: Shape, length: int) -> np.ndarray:
        assert shape.retention is not None  # checked when the method was made
        limit = np.full(shape.shares.shape, length)
        total = min(shape.base, length) * limit.size
        floor = shape.base * self.ratio
        scored = np.minimum(floor + shape.shares * (shape.base - floor) * limit.size, length)
        wanted = self.score_share * scored + (1 - self.score_share) * shape.retention.fill(total, length)
        return spend_exactly(np.zeros(limit.shape), wanted, limit, total)
