"""The control of `mask`: as many heads, drawn from those that it leaves alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsemm_lmms.allocators.base import Shape
from sparsemm_lmms.allocators.mask import Mask, best_heads


@dataclass(frozen=True)
class MaskRandom(Mask):
    """Silence as many heads as `mask`, drawn with `seed`.

    Raises:
        ValueError: if too few others are left.
    """

    draws = True

    def _chosen(self, shape: Shape) -> np.ndarray:
        best = best_heads(shape.table, self.mask_ratio)
        others = np.setdiff1d(np.arange(shape.table.size), best)
        if len(others) < len(best):
            raise ValueError(
                f"mask_ratio={self.mask_ratio} leaves {len(others)} other heads, too few for {len(best)}; "
                "use at most 0.5."
            )
        return np.random.default_rng(shape.seed).choice(others, len(best), replace=False)
