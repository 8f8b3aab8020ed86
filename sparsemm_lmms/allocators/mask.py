"""Head masking (SparseMM §3.2, Figure 3): a study of the heads, no compression.

Deviation: the SparseMM code gives a masked head uniform attention, so that it still writes the mean of all values into
the output; here it contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.allocators.base import Shape
from sparsemm_lmms.allocators.everything import Everything
from sparsemm_lmms.settings import setting


def best_heads(head_scores: np.ndarray, ratio: float) -> np.ndarray:
    """Flat indices of the `ratio` best heads of the whole model, at least one unless it is 0 (ties: the earlier)."""
    count = max(1, round(ratio * head_scores.size)) if ratio else 0
    return np.argsort(-head_scores.ravel(), kind="stable")[:count]


@dataclass(frozen=True)
class Mask(Everything):
    """Silence the `mask_ratio` best visual heads; nothing is evicted."""

    needs_head_scores = True
    papers = (("SparseMM", "2506.05344"),)

    mask_ratio: float = setting(0.1, help="share of the model's query heads that is silenced", word="m", low=0, high=1)

    def masked_heads(self, shape: Shape) -> np.ndarray:
        masked = np.zeros(shape.table.size, dtype=bool)
        masked[self._chosen(shape)] = True
        return masked.reshape(shape.table.shape)

    def _chosen(self, shape: Shape) -> np.ndarray:
        return best_heads(shape.table, self.mask_ratio)
