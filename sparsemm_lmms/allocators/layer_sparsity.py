"""VL-Cache (https://arxiv.org/abs/2410.23317): a layer's budget by how little its attention is sparse.

As in the re-implementation of EffiVLM-Bench (one window for all layers): VL-Cache's own code is not public.
Deviation: each layer keeps at least 1 % of the tokens outside the window, which there comes on top of the budget; here
the other layers pay for it, and where the budget is less than that, all layers keep the same. `redistribute=true` has
no such floor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.budgets import highest_averages, with_floor
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.post_vision import post_vision_attention

LEAST = 0.01


@dataclass(frozen=True)
class LayerSparsity(Allocator):
    """Layers in proportion to the share of visible tokens that the queries behind the images attend to (VL-Cache)."""

    cascades = True
    reads_vision = True
    papers = (("VL-Cache", "2410.23317"),)

    def observe(self, view: LayerView, scores: Tensor) -> Tensor:
        return post_vision_attention(view).density

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[np.ndarray]:
        total = shape.base * shape.num_layers
        if shape.redistribute:
            rows = [highest_averages(w, n, total) for w, n in zip(np.stack(seen, 1), lengths, strict=True)]
        else:
            least = [min(LEAST * n, shape.base) for n in lengths]
            rows = [np.floor(with_floor(w, m, total)) for w, m in zip(np.stack(seen, 1), least, strict=True)]
        return list(np.stack(rows, 1)[..., None])
