"""AdaKV (https://arxiv.org/abs/2407.11550): a layer's budget goes where its attention mass is.

The rule is the one of the SparseMM code, which its published numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.allocators.base import Allocator, LayerPrompt, Shape
from sparsemm_lmms.budgets import spend_exactly
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class AdaKV(Allocator):
    """Heads of one layer compete for `base * kv_heads` tokens; a floor protects the losers."""

    compares_heads = True
    papers = (("AdaKV", "2407.11550"),)

    floor_ratio: float = setting(
        0.2, help="share of a head's budget that is not shared out inside the layer", word="f", low=0, high=1
    )
    normalize: bool = setting(
        True, help="weigh heads by the attention mass that their best tokens hold", words={"nonorm": False}
    )
    skip: int = setting(0, help="the first `skip` layers keep a uniform budget", word="skip", low=0)

    def counts(self, shape: Shape, prompt: LayerPrompt) -> np.ndarray | Tensor:
        base, heads = shape.base, shape.kv_heads
        if prompt.layer_idx < self.skip:
            return np.full((len(prompt.lengths), heads), base, dtype=np.int64)
        wins = self._tokens_won(base, prompt.scores)
        if shape.redistribute:
            rows = [self._spend(base, row, n) for row, n in zip(wins.cpu().numpy(), prompt.lengths, strict=True)]
            return np.stack(rows)
        # float32 and a truncated floor, as published: kept totals are usually a little under the budget
        return torch.round(wins.float() * (1 - self.floor_ratio) + int(base * self.floor_ratio)).to(torch.int64)

    def _tokens_won(self, base: int, scores: Tensor) -> Tensor:
        """How many of the layer's best `base * kv_heads` tokens belong to each head (int64 `[batch, kv_heads]`)."""
        heads, length = scores.shape[1:]
        base = min(base, length)
        weighted = scores
        if self.normalize:
            # float64: sums must not depend on how many columns of padding they run over
            mass = scores.clamp_min(0).sort(dim=-1, descending=True).values.double()
            share = mass[..., :base].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True).clamp_min(1e-38)
            weighted = (scores * share.float()).masked_fill(scores == float("-inf"), float("-inf"))  # not 0 * -inf
        # of equal scores the newer column is better, then the lower head: see `scorers.base.best_first`
        newest_first = weighted.flip(-1).transpose(1, 2).flatten(1)
        best = newest_first.sort(dim=-1, descending=True, stable=True).indices[:, : base * heads] % heads
        return torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device).scatter_add_(
            1, best, torch.ones_like(best)
        )

    def _spend(self, base: int, wins: np.ndarray, length: int) -> np.ndarray:
        floor = np.full(len(wins), base * self.floor_ratio)
        return spend_exactly(floor, wins, np.full(len(wins), length), min(base, length) * len(wins))
