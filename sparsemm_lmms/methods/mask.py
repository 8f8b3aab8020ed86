"""Head masking (SparseMM §3.2, Figure 3): a study of the heads, no compression.

Deviation: the SparseMM code gives a masked head uniform attention, so that it still writes the mean of all values into
the output; here it contributes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.methods.fullkv import FullKV


def best_heads(head_scores: np.ndarray, ratio: float) -> np.ndarray:
    """Flat indices of the `ratio` best heads of the whole model, at least one unless it is 0 (ties: the earlier)."""
    count = max(1, round(ratio * head_scores.size)) if ratio else 0
    return np.argsort(-head_scores.ravel(), kind="stable")[:count]


@dataclass(frozen=True)
class Mask(FullKV):
    """Silence the `mask_ratio` best visual heads; nothing is evicted."""

    needs_head_scores = True
    arguments = ("mask_ratio",)

    def masked_heads(self) -> np.ndarray:
        assert self.head_scores is not None  # checked when the method was made
        masked = np.zeros(self.head_scores.size, dtype=bool)
        masked[self._chosen(self.head_scores)] = True
        return masked.reshape(self.head_scores.shape)

    def _chosen(self, head_scores: np.ndarray) -> np.ndarray:
        return best_heads(head_scores, self.config.mask_ratio)


@dataclass(frozen=True)
class MaskRandom(Mask):
    """The control: silence as many heads, drawn with `seed` from those that `mask` leaves alone."""

    arguments = ("mask_ratio", "seed")

    def _chosen(self, head_scores: np.ndarray) -> np.ndarray:
        best = best_heads(head_scores, self.config.mask_ratio)
        others = np.setdiff1d(np.arange(head_scores.size), best)
        if len(others) < len(best):
            raise ValueError(
                f"mask_ratio={self.config.mask_ratio} leaves {len(others)} other heads, too few for {len(best)}; "
                "use at most 0.5."
            )
        return np.random.default_rng(self.config.seed).choice(others, len(best), replace=False)
