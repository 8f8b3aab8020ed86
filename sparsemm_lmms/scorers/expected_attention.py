"""Expected Attention (https://arxiv.org/abs/2510.00636): what the queries to come will attend to, whatever they ask.

As in kvpress: the queries of the prompt before rotation have mean mu and covariance C; those to come are turned by R,
the mean rotation of the next 512 positions. A key k gets softmax(k R mu / sqrt(d) + k R C R' k / 2d), averaged over the
query heads of a kv head and times |v|. The first 4 tokens are in no sum and stay.

Deviations: the logits use the model's scaling where it is not 1 / sqrt(d); the first tokens score what the best other
token of their head does, which keeps sums of scores meaningful; what is chosen again from a cache knows its newest
queries only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import CriticalScorer, LayerView

FUTURE, SINKS = 512, 4  # positions to come over which rotations are averaged; first tokens, outliers in all sums


@dataclass(frozen=True)
class ExpectedAttention(CriticalScorer):
    """Attention that queries like the prompt's would pay from the positions to come, times the value's norm."""

    comparable = reads_turn = True
    papers = (("Expected Attention", "2510.00636"),)

    def score(self, view: LayerView) -> Tensor:
        mean, covariance = self._queries(view)
        seen = ~(self._sinks(view) | ~view.real())[:, None]  # [batch, 1, n]
        key = view.key.float()
        total = torch.zeros(key.shape[:3], device=key.device)
        group = mean.shape[2]
        for g in range(group):
            logits = view.scaling * (key @ mean[:, :, g, :, None])[..., 0]
            logits += 0.5 * view.scaling**2 * ((key @ covariance[:, :, g]) * key).sum(-1)
            total += logits.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
        scores = total / group
        if not self.critical:  # which has its own measure of a value
            scores = scores * view.value.float().norm(dim=-1)
        most = scores.masked_fill(~seen, 0.0).amax(-1, keepdim=True)
        return torch.where(self._sinks(view)[:, None], most, scores)[..., : view.length]

    def _sinks(self, view: LayerView) -> Tensor:
        """bool `[batch, n]`: the first real columns."""
        return view.real() & (view.real().cumsum(-1) <= SINKS)

    def _queries(self, view: LayerView) -> tuple[Tensor, Tensor]:
        """Mean and covariance of the queries to come: float32 `[batch, kv_heads, group, d]` and `[..., d, d]`."""
        query = turned(view.query.float(), view.turn, back=True)
        newest = query.shape[2]
        real = view.real()[:, -newest:]
        if newest == view.key.shape[2]:
            real = real & ~self._sinks(view)
        tokens = real.sum(-1)[:, None, None, None].clamp_min(1)
        mean = view.weighted_sum(query, real[:, None].float()) / tokens
        centred = (query - mean).masked_fill_(~real[:, None, :, None], 0)
        covariance = centred.mT @ centred / tokens
        if view.rotary is not None and view.position is not None:
            ahead = view.position[..., None] + torch.arange(1, FUTURE + 1, device=query.device)
            cos, sin = view.rotary(ahead)
            turn = cos.float().mean(1, keepdim=True), sin.float().mean(1, keepdim=True)
            mean = turned(mean, turn)
            covariance = turned(turned(covariance, turn).mT, turn)
        split = (view.key.shape[1], -1)
        return mean[:, :, 0].unflatten(1, split), covariance.unflatten(1, split)


def turned(x: Tensor, turn: tuple[Tensor, Tensor] | None, back: bool = False) -> Tensor:
    """The rotation of `x [batch, heads, t, d]`: of its first dimensions, halves against each other, or its inverse."""
    if turn is None:
        return x
    cos, sin = (part.float()[:, None] for part in turn)
    if back:
        size = cos.square() + sin.square()  # not 1 where a model scales its attention by them
        cos, sin = cos / size, -sin / size
    rotated, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = rotated.chunk(2, dim=-1)
    return torch.cat([rotated * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)
