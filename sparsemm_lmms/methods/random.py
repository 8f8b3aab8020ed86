"""Random: SparseMM's rule with seeded random head scores, normalised over the whole model. The control of the paper.

Deviation: the SparseMM code draws a new table in each layer, which changes the totals of the layers; here one table
is drawn for the model (as for the measured scores).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods.base import VisualShares


@dataclass(frozen=True)
class Random(VisualShares):
    """`HeadScores.random(layers, q_heads, seed)` instead of measured scores."""

    arguments = ("ratio", "seed")

    def table(self) -> np.ndarray:
        return HeadScores.random(self.model.num_layers, self.model.q_heads, self.config.seed).values
