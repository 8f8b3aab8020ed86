"""CAKE (https://arxiv.org/abs/2503.12491): a layer's budget by how spread and how shifting its attention is.

As the published code does it in its cascading mode, rounding included: the layers so far share the budget of the whole
model, and shrink when another comes. What the share of one exceeds the prompt by goes to the others in equal parts; a
layer that was cut below what it gets at the end cannot be given more, so less than the budget may be spent then.
`tau1` and `tau2` are tuned for each model and budget there (0.4 to 2.3) and 1 for others. Deviation: that code keeps
prompts of up to budget + window whole, here those shorter than the budget are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.budgets import highest_averages
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.cake import window_statistics
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class CakeLayers(Allocator):
    """Layers by entropy^(1/tau1) * variance^(1/tau2) of the attention of the window's queries (CAKE)."""

    cascades = True
    papers = (("CAKE", "2503.12491"),)

    tau1: float = setting(1.0, help="the larger, the less the entropy of a layer counts (CAKE)", word="ent", low=0.01)
    tau2: float = setting(1.0, help="the larger, the less its variance over the window counts", word="var", low=0.01)

    def observe(self, view: LayerView, scores: Tensor) -> Tensor:
        found = window_statistics(view)
        variance = found.variance.sum((1, 2), dtype=found.entropy.dtype)
        return found.entropy.clamp_min(0) ** (1 / self.tau1) * variance ** (1 / self.tau2)

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[np.ndarray]:
        total = shape.base * shape.num_layers
        weights = np.stack(seen, 1)
        if shape.redistribute:
            rows = [highest_averages(w, n, total) for w, n in zip(weights, lengths, strict=True)]
        else:
            rows = [_cascade(w, n, total) for w, n in zip(weights, lengths, strict=True)]
        return list(np.stack(rows, 1)[..., None])


def _cascade(weights: np.ndarray, limit: int, total: int) -> np.ndarray:
    """What the layers of one prompt have left after all stages so far.

    Args:
        weights: float64 `[layers]`.
        limit: tokens of the prompt outside the window.
        total: tokens that the layers of a stage share.

    Returns:
        int64 `[layers]`.
    """
    layers = len(weights)
    there = np.tri(layers, dtype=bool)  # stage s has the layers 0..s
    worth = np.where(there, weights, 0.0)
    worth = np.where(worth.any(1, keepdims=True), worth, there)
    counts = (worth / worth.sum(1, keepdims=True) * total).astype(np.int64)
    surplus = np.where(there, np.maximum(counts - limit, 0), 0).sum(1, keepdims=True)
    counts = _in_equal_parts(np.minimum(counts, limit), surplus, there & (counts < limit))
    rest = total - counts.sum(1, keepdims=True)
    counts = np.minimum(_in_equal_parts(counts, rest, there & (counts < limit)), limit)
    return np.where(there, counts, limit).min(0)


def _in_equal_parts(counts: np.ndarray, tokens: np.ndarray, able: np.ndarray) -> np.ndarray:
    """Add `tokens` `[stages, 1]` to the layers that are `able`; the first of them get what does not divide."""
    heads = np.maximum(able.sum(1, keepdims=True), 1)
    each, over = np.divmod(tokens, heads)
    return np.where(able, counts + each + (np.cumsum(able, 1) <= over), counts)
