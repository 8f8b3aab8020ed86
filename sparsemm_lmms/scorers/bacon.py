"""BACON (https://arxiv.org/abs/2606.14782): window attention, and what the last query alone sees beyond it.

The default mode of the published code. Its four layers before are layers of full attention here; scores stay float32.
What is chosen again from what was kept has no layers before: they hold other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.window_attention import WindowAttention

BEFORE, WIDTH, WEIGHT, EPSILON = 4, 5, 0.5, 1e-8


@dataclass(frozen=True)
class Bacon(WindowAttention):
    """Window attention and the excess of the last query's over it, smoothed over positions and four layers.

    With B the window attention, Q the last query's: E = max(Q - B, 0), V = E + avgpool_5(E) + the mean of E over the
    layers before, S = B + lambda V. With m = min(2 base, L) and top-m taken of B and V apart, lambda = 0.5 std(top B) /
    std(top V) clip(mean(top V) / mean(top B), 0, 1). Heads share a budget by B.
    """

    papers = (("BACON", "2606.14782"),)

    def score(self, view: LayerView) -> Tensor:
        base = self.attention(view).masked_fill(view.hidden, 0.0)
        excess = (self._of_last_query(view) - base).clamp_min(0).masked_fill(view.hidden, 0.0)
        evidence = excess + avg_pool1d(excess, WIDTH, stride=1, padding=WIDTH // 2)
        if view.whole:
            before = view.state.setdefault("bacon", [])
            if before:
                evidence = evidence + torch.stack(before).mean(0)
            view.state["bacon"] = [*before, excess][-BEFORE:]
        return base + self._weight(view, base, evidence) * evidence

    def shares(self, view: LayerView, scores: Tensor) -> Tensor:
        return self.attention(view)

    def _of_last_query(self, view: LayerView) -> Tensor:
        """What window attention would be if the last query were the window's only row."""
        row = self._of_rows(view, 1, kernel_size=1)[..., : view.length]
        row = row.masked_fill(view.hidden, 0.0)  # as good as the edge: no attention is negative
        pool = avg_pool1d if self.pooling == "avgpool" else max_pool1d
        return pool(row, self.kernel_size, stride=1, padding=self.kernel_size // 2)

    def _weight(self, view: LayerView, base: Tensor, evidence: Tensor) -> Tensor:
        """lambda: float32 `[batch, kv_heads, 1]`."""
        most = (~view.hidden).sum(-1, keepdim=True).clamp(max=2 * view.base)  # [batch, 1, 1]
        base_mean, base_std = _of_top(base, most, view)
        mean, std = _of_top(evidence, most, view)
        share = (mean / (base_mean + EPSILON)).clamp(0, 1)
        return (WEIGHT * base_std / (std + EPSILON) * share).float()


def _of_top(x: Tensor, most: Tensor, view: LayerView) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (without Bessel's correction) of the `most` largest: float64 `[batch, heads, 1]`."""
    top = x.masked_fill(view.hidden, float("-inf")).topk(int(most.max()), dim=-1).values.double()
    out = torch.arange(top.shape[-1], device=top.device) >= most
    mean = top.masked_fill(out, 0).sum(-1, keepdim=True) / most
    return mean, ((top - mean).square().masked_fill(out, 0).sum(-1, keepdim=True) / most).sqrt()
