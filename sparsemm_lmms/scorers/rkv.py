"""R-KV's token score (https://arxiv.org/abs/2505.24133): what the window attends to, less what other keys say as well.

As in the published code, with the paper's lambda of 0.1. Deviations: scores stay float32, and a key that is like no
other spares none (that code spares the first token then).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.kernels import window_score
from sparsemm_lmms.scorers.base import BLOCK, LayerView, Scorer

KERNEL, WEIGHT, ALIKE = 7, 0.1, 0.5  # width of the pooling, lambda, and the cosine above which keys are alike


@dataclass(frozen=True)
class RKV(Scorer):
    """Attention of the window's queries, max-pooled, against the likeness of a head's keys (R-KV).

    With I the window attention, max-pooled over 7 positions, and C the cosines between a head's keys, 0 on the
    diagonal and where a key meets the newest key that it is like (C > 0.5): S = 0.1 I - 0.9 softmax(mean of C over
    the keys), the softmax over all tokens of the head.
    """

    papers = (("R-KV", "2505.24133"),)

    def score(self, view: LayerView) -> Tensor:
        attention = window_score(
            view.query[:, :, -view.window :],
            view.key,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            kernel_size=KERNEL,
            pooling="maxpool",
            gqa_func="mean",
            pad=view.pad,
            backend=view.backend,
        )
        likeness = _likeness(view).masked_fill(~view.real()[:, None], float("-inf")).softmax(-1)
        return WEIGHT * attention - (1 - WEIGHT) * likeness[..., : view.length].float()


def _likeness(view: LayerView) -> Tensor:
    """Mean cosine of each key to the others, float64 `[batch, kv_heads, n]`, a block of rows at a time."""
    real = view.real()[:, None, :, None]
    key = view.key.float().masked_fill(~real, 0)
    key = key / (key.norm(dim=-1, keepdim=True) + 1e-8)
    (batch, heads, columns), places = key.shape[:3], torch.arange(key.shape[2], device=key.device)
    total = torch.zeros(batch, heads, columns, dtype=torch.float64, device=key.device)
    step = max(1, BLOCK // (batch * heads * columns))
    for begin in range(0, columns, step):
        cosine = key[:, :, begin : begin + step] @ key.mT
        cosine.masked_fill_(places == places[begin : begin + step, None], 0.0)
        newest = torch.where(cosine > ALIKE, places, -1).amax(-1, keepdim=True)
        cosine.masked_fill_(places == newest, 0.0)
        total += cosine.sum(2, dtype=torch.float64)
    return total / real.sum(2)
