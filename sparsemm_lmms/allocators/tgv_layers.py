"""TGV-KV (https://arxiv.org/abs/2606.03075): a layer's budget by how much its text attends to the images.

Deviations: the window is every layer's own, and what lies outside of it is shared out, where the published code shares
out the whole budget; shares are rounded down, where it rounds to the nearest and may spend more. The question is what
lies behind the last image (see the scorer `tgv`); prompts without images give all layers the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.budgets import highest_averages, with_floor
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.post_vision import post_vision_attention


@dataclass(frozen=True)
class TGVLayers(Allocator):
    """Layers in proportion to the attention that the text behind the images pays to them (TGV-KV)."""

    cascades = True
    reads_vision = True
    papers = (("TGV-KV", "2606.03075"),)

    def observe(self, view: LayerView, scores: Tensor) -> Tensor:
        if view.vision is None:
            return torch.zeros(view.key.shape[0])
        mass = post_vision_attention(view).mass.double().sum(1)
        return (mass * view.vision.to(mass.device)).sum(-1)

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[np.ndarray]:
        total = shape.base * shape.num_layers
        weights = np.stack(seen, 1)
        if shape.redistribute:
            rows = [highest_averages(w, n, total) for w, n in zip(weights, lengths, strict=True)]
        else:
            rows = [np.floor(with_floor(w, 0.0, total)) for w in weights]
        return list(np.stack(rows, 1)[..., None])
