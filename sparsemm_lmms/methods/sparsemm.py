"""SparseMM (https://arxiv.org/abs/2506.05344): the budget of the whole model goes to the visual heads.

Deviations: none by default. `redistribute=True` gives what a head cannot use to the other heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.methods.base import VisualShares


@dataclass(frozen=True)
class SparseMM(VisualShares):
    """A uniform floor of `ratio`, the rest in proportion to measured visual-head scores."""

    needs_head_scores = True
    arguments = ("ratio",)

    def table(self) -> np.ndarray:
        assert self.head_scores is not None  # checked when the method was made
        return self.head_scores
