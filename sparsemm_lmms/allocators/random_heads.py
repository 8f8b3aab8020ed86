"""SparseMM's rule with seeded random head scores, normalised over the whole model: the control of the paper.

Deviation: the SparseMM code draws a new table in each layer, which changes the totals of the layers; here one table
is drawn for the model (as for the measured scores).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from sparsemm_lmms.allocators.base import Shape
from sparsemm_lmms.allocators.head_scores import ByHeadScores
from sparsemm_lmms.head_scores import HeadScores


@dataclass(frozen=True)
class RandomHeads(ByHeadScores):
    """`HeadScores.random(layers, q_heads, seed)` instead of measured scores."""

    needs_head_scores = False
    draws = True

    def _of_model(self, shape: Shape, length: int) -> np.ndarray:
        drawn = HeadScores.random(shape.num_layers, shape.q_heads, shape.seed).values
        return super()._of_model(replace(shape, head_scores=drawn, memo={}), length)
