"""AdaKV (https://arxiv.org/abs/2407.11550): a layer's budget goes where its attention mass is.

The rule is the one of the SparseMM code, which its published numbers come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.budgets import spend_exactly
from sparsemm_lmms.methods.base import LayerPrompt, Method


@dataclass(frozen=True)
class AdaKV(Method):
    """Heads of one layer compete for `base * kv_heads` tokens; a floor protects the losers."""

    arguments = ("floor_ratio", "normalize", "skip")

    def capacities(self, prompt: LayerPrompt) -> np.ndarray:
        base, heads = self.config.base, self.model.kv_heads
        if prompt.layer_idx < self.config.skip:
            return np.full((len(prompt.lengths), heads), base, dtype=np.int64)
        wins = self._tokens_won(prompt.scores)
        if self.config.redistribute:
            rows = [self._spend(row, length) for row, length in zip(wins.cpu().numpy(), prompt.lengths, strict=True)]
            return np.stack(rows)
        # float32 and a truncated floor, as published: kept totals are usually a little under the budget
        kept = torch.round(wins.float() * (1 - self.config.floor_ratio) + int(base * self.config.floor_ratio))
        return kept.to(torch.int64).cpu().numpy()

    def _tokens_won(self, scores: Tensor) -> Tensor:
        """How many of the layer's best `base * kv_heads` tokens belong to each head (int64 `[batch, kv_heads]`)."""
        heads, length = scores.shape[1:]
        base = min(self.config.base, length)
        weighted = scores
        if self.config.normalize:
            # float64: sums must not depend on how many columns of padding they run over
            mass = scores.clamp_min(0).sort(dim=-1, descending=True).values.double()
            share = mass[..., :base].sum(-1, keepdim=True) / mass.sum(-1, keepdim=True).clamp_min(1e-38)
            weighted = (scores * share.float()).masked_fill(scores == float("-inf"), float("-inf"))  # not 0 * -inf
        # of equal scores the newer column is better, then the lower head: see `selection._best`
        newest_first = weighted.flip(-1).transpose(1, 2).flatten(1)
        best = newest_first.sort(dim=-1, descending=True, stable=True).indices[:, : base * heads] % heads
        return torch.zeros(scores.shape[:2], dtype=torch.int64, device=scores.device).scatter_add_(
            1, best, torch.ones_like(best)
        )

    def _spend(self, wins: np.ndarray, length: int) -> np.ndarray:
        base, heads = self.config.base, self.model.kv_heads
        floor = np.full(heads, base * self.config.floor_ratio)
        return spend_exactly(floor, wins, np.full(heads, length), min(base, length) * heads)
