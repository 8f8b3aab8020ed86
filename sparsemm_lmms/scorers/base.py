"""What a scorer sees of a layer, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.settings import setting

BLOCKS = {"cpu": 2**20}  # attention weights at a time: 4 MiB stay in a CPU's caches (2.5 times as fast as 64 MiB)
BLOCK = 2**24  # the same elsewhere, where few large steps are best
FIRST, EPSILON = 0.5, 1e-4  # CriticalKV: share of the first step, and what is added to the scores in the second


@dataclass(frozen=True)
class LayerView:
    """One layer's prompt: post-RoPE, padded on the left.

    Attributes:
        layer_idx: index among the layers that are compressed.
        query: `[batch, q_heads, t, head_dim]`: of the whole prompt, or of its newest tokens where it is chosen from
            again.
        key: `[batch, kv_heads, n, head_dim]`.
        scaling: factor of q.k.
        window: the last columns, which every head keeps and whose queries judge; at most n.
        pad: int32 `[batch]` columns of padding on the left, None for none.
        softcap, sinks: of the attention, see `kernels.window_score`; sinks `[q_heads]` or `[batch, q_heads]`.
        vision: bool `[batch, n]`, the image and video tokens; None where that is not known.
        rotary: positions `[..., n]` -> (cos, sin) of the model's rotary embedding; None where it has none.
        state: what the scorer keeps from layer to layer of this prompt.
        backend: of the kernels.
        base: tokens per kv head outside the window that the budget allows on average, whatever the allocator does.
        whole: whether the columns are all tokens so far, and so the same ones in every head and layer: not where it is
            chosen again from what was kept.
        output: weight of the layer's output projection, `[hidden, q_heads * head_dim]` (or one a sequence before it).
        turn: cosine and sine `[batch or 1, t, rotated dims]` by which the queries were rotated; None for not at all.
        position: the newest token's, int64 `[batch or 1]` (or one an axis of positions before it); what comes next is
            rotated by the positions after it.
        memo: what is computed once for this view.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    scaling: float
    window: int
    pad: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    vision: Tensor | None = None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    values: Tensor | None = None
    base: int = 0
    whole: bool = True
    output: Tensor | None = None
    turn: tuple[Tensor, Tensor] | None = None
    position: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, compare=False)

    @property
    def value(self) -> Tensor:
        """`[batch, kv_heads, n, head_dim]`.

        Raises:
            ValueError: where nobody gave them (`kept_positions` without `value`).
        """
        if self.values is None:
            raise ValueError("This scorer reads the values of the tokens; pass value=[kv_heads, n, head_dim].")
        return self.values

    @property
    def length(self) -> int:
        """Columns before the window: a scorer ranks these."""
        return self.key.shape[2] - self.window

    def real(self) -> Tensor:
        """bool `[batch, n]`: the columns that are no padding."""
        columns = torch.arange(self.key.shape[2], device=self.key.device)
        if self.pad is None:
            return torch.ones(self.key.shape[0], len(columns), dtype=torch.bool, device=self.key.device)
        return columns >= self.pad[:, None]

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the real columns of each sequence: `[batch, heads, n, ...]` -> `[batch, heads, 1, ...]`.

        Padding does not count, so a sequence has the mean that it has alone. Sums are of float64, so that they do not
        depend on how many columns of padding they run over. With the columns before the window, `x[:, :, :length]`,
        it is their mean.
        """
        real = self.real()[:, : x.shape[2]].view(x.shape[0], 1, x.shape[2], *[1] * (x.ndim - 3))
        total = (x if self.pad is None else x.masked_fill(~real, 0)).sum(2, keepdim=True, dtype=torch.float64)
        return (total / real.sum(2, keepdim=True)).to(x.dtype)

    @property
    def hidden(self) -> Tensor:
        """bool `[batch, 1, L]`: the padding among the columns before the window."""
        return ~self.real()[:, None, : self.length]

    def weighted_sum(self, x: Tensor, weights: Tensor) -> Tensor:
        """Sum of `x [batch, heads, t, d]` with `weights [batch, heads or 1, t]` -> float32 `[batch, heads, 1, d]`.

        Of the padding, whose weights are 0, nothing is read.
        """
        if self.pad is not None:
            x = x.masked_fill(~self.real()[:, None, -x.shape[2] :, None], 0)
        return weights[..., None, :].expand(-1, x.shape[1], -1, -1) @ x

    def mean_direction(self) -> tuple[Tensor, Tensor, Tensor]:
        """Float32 keys `[batch, kv_heads, n, d]`, the mean of the normalised ones `[..., 1, d]`, norms `[..., n]`."""
        if "mean_direction" not in self.memo:
            keys, real = self.key.float(), self.real()
            norms = keys.norm(dim=-1).clamp_min(1e-12)
            weights = (1 / norms).masked_fill(~real[:, None], 0) / real.sum(-1)[:, None, None]
            self.memo["mean_direction"] = keys, self.weighted_sum(keys, weights), norms
        return self.memo["mean_direction"]

    def rescaled(self, x: Tensor, like: Tensor, epsilon: float = 0.0, precision: float = 0.0) -> Tensor:
        """Bring a score to the size of another, as MixKV does.

        Args:
            x, like: float32 `[batch, kv_heads, L]`.
            epsilon: added to the range.
            precision: of `x`, relative.

        Returns:
            `x` min-max scaled over the real columns of each head, times mean(like) / (mean + 1e-8); zeros where all
            are equal to that precision.
        """
        low = x.masked_fill(self.hidden, float("inf")).amin(-1, keepdim=True)
        high = x.masked_fill(self.hidden, float("-inf")).amax(-1, keepdim=True)
        scaled = ((x - low) / (high - low + epsilon)).masked_fill(high - low <= precision * high.abs(), 0.0)
        return scaled * (self.mean(like) / (self.mean(scaled) + 1e-8))

    def projected_norms(self) -> Tensor:
        """L1 norm of each value behind the output projection, mean over the query heads of a kv head.

        Returns:
            float32 `[batch, kv_heads, n]`.

        Raises:
            ValueError: where nobody gave the projection or the values.
        """
        if self.output is None:
            raise ValueError(
                "critical=true reads the weight of the layer's output projection: pass output=[hidden, q_heads * "
                "head_dim]; a model whose attention has no plain one (o_proj, out_proj) needs critical=false."
            )
        value, q_heads = self.value, self.query.shape[1]
        group = q_heads // value.shape[1]
        weight = self.output.unflatten(-1, (q_heads, -1)).to(value.dtype)  # [(batch,) hidden, q_heads, head_dim]
        norms = []
        for head in range(q_heads):  # one at a time: all together are `hidden` times the values
            own = weight[..., head, :].mT
            norms.append((value[:, head // group] @ own).float().abs().sum(-1))
        return torch.stack(norms, dim=1).unflatten(1, (-1, group)).mean(2)

    def attention_rows(self, rows: int) -> Tensor:
        """Attention weights of the newest `rows` queries: float32 `[batch, q_heads, rows, n]`, 0 in the padding.

        Made on demand: a whole matrix would be as large as the prompt squared.
        """
        (batch, kv_heads, columns), q_heads = self.key.shape[:3], self.query.shape[1]
        query = self.query[:, :, -rows:].float()
        groups = query.unflatten(1, (kv_heads, -1)).flatten(2, 3)  # one product for all query heads of a kv head
        logits = (groups @ self.key.float().mT).view(batch, q_heads, -1, columns).mul_(self.scaling)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        place = torch.arange(columns, device=query.device)
        hidden = place > place[columns - query.shape[2] :, None]
        if self.pad is not None:
            hidden = hidden | ~self.real()[:, None, None]
        logits.masked_fill_(hidden, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.float().expand(batch, q_heads)[..., None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        weights = logits.softmax(-1)[..., :columns]
        return weights if self.pad is None else weights.nan_to_num_(0.0)  # a query of the padding sees nothing

    def attention_blocks(self, rows: int) -> Iterator[tuple[int, Tensor]]:
        """`attention_rows(rows)` a block of rows at a time, for rules that look at many of them.

        Yields:
            (column of the block's first query, its float32 `[batch, q_heads, some rows, columns up to the last one]`,
            the caller's to overwrite), at most `BLOCKS` weights each, or one row.
        """
        new, columns = self.query.shape[2], self.key.shape[2]
        most = BLOCKS.get(self.key.device.type, BLOCK)
        step = max(1, most // (self.query.shape[0] * self.query.shape[1] * columns))
        for begin in range(new - rows, new, step):
            end = min(begin + step, new)
            before = columns - new
            part = replace(self, query=self.query[:, :, :end], key=self.key[:, :, : before + end])
            yield before + begin, part.attention_rows(end - begin)

    def pooled(self, x: Tensor, func: str = "mean") -> Tensor:
        """Query heads to their kv heads: `[batch, q_heads, ...]` -> `[batch, kv_heads, ...]` by `mean` or `max`."""
        groups = x.unflatten(1, (self.key.shape[1], -1))
        return groups.mean(2) if func == "mean" else groups.amax(2)

    def by_head(self, pads: Tensor) -> LayerView:
        """The same with every head as a sequence of its own, whose padding `pads` `[batch * kv_heads]` is its own."""
        batch, heads = self.key.shape[:2]
        return replace(
            self,
            query=self.query.unflatten(1, (heads, -1)).flatten(0, 1),
            key=self.key.flatten(0, 1)[:, None],
            values=None if self.values is None else self.values.flatten(0, 1)[:, None],
            sinks=None if self.sinks is None else self.sinks.expand(batch, -1).reshape(batch * heads, -1),
            vision=None if self.vision is None else self.vision.repeat_interleave(heads, 0),
            output=None if self.output is None else self._outputs_by_head(),
            turn=None
            if self.turn is None
            else (_repeated(self.turn[0], batch, heads), _repeated(self.turn[1], batch, heads)),
            position=None if self.position is None else self.position.repeat_interleave(heads, -1),
            pad=pads,
        )

    def _outputs_by_head(self) -> Tensor:
        """`[batch * kv_heads, hidden, group * head_dim]`."""
        assert self.output is not None
        batch, heads = self.key.shape[:2]
        own = self.output.unflatten(-1, (heads, -1)).movedim(-2, 0)
        return own.expand(batch, *own.shape).flatten(0, 1)


def _repeated(x: Tensor, batch: int, heads: int) -> Tensor:
    return x.expand(batch, *x.shape[1:]).repeat_interleave(heads, 0)


def best_first(scores: Tensor, most: int) -> Tensor:
    """Columns of the `most` best scores of each head, the best first: int64 `[batch, kv_heads, most]`.

    Of equal scores the newer column is better. Counted from the right, places do not depend on the padding, and a
    stable sort depends neither on the device nor on the instruction set. Ties are common: maxpool makes them.
    """
    last, newest_first = scores.shape[-1] - 1, scores.flip(-1)
    if scores.is_cuda:
        order = newest_first.sort(dim=-1, descending=True, stable=True).indices
    else:  # NumPy sorts a row in half the time that torch takes on a CPU
        order = torch.from_numpy(np.argsort(-newest_first.numpy(), axis=-1, kind="stable"))
    return last - order[..., :most]


@dataclass(frozen=True)
class Scorer:
    """Ranks the tokens before the window. A subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        comparable: whether scores of one head (those of `shares`) can be held against those of another, as shares of
            attention can: not negative, and of one scale in all heads. An allocator that does so refuses other scorers.
        reads_turn: whether it reads `turn` and `position` of a view.
        reads_vision: whether it tells image tokens apart (`vision` of a view).
        papers: (name, arXiv id) of what a user cites; nothing for none.
    """

    comparable: ClassVar[bool] = False
    reads_turn: ClassVar[bool] = False
    reads_vision: ClassVar[bool] = False
    papers: ClassVar[tuple[tuple[str, str], ...]] = ()

    def score(self, view: LayerView) -> Tensor:
        """The higher, the rather a token stays; of equal scores the newer token does.

        Returns:
            float32 `[batch, kv_heads, L]` for the L = `view.length` columns before the window. What stands in the
            padding does not matter.
        """
        raise NotImplementedError

    def check(self, num_layers: int, kv_heads: int) -> None:
        """Refuse settings that do not fit a model.

        Raises:
            ValueError: if they do not.
        """

    def shares(self, view: LayerView, scores: Tensor) -> Tensor:
        """By what an allocator holds heads against each other: the scores, unless the rule has others for that.

        Args:
            scores: what `score` gave for this view.

        Returns:
            float32 `[batch, kv_heads, L]`.
        """
        return scores

    def ranked(self, view: LayerView, scores: Tensor, counts: Tensor) -> Tensor:
        """In which order a head's tokens are picked: by the scores, unless the rule looks at how many there will be.

        Args:
            scores: what `score` gave, -inf in the padding.
            counts: int64 `[batch, kv_heads]`, what each head keeps outside the window.

        Returns:
            float32 `[batch, kv_heads, L]`.
        """
        return scores


@dataclass(frozen=True)
class CriticalScorer(Scorer):
    """A scorer that may pick in the two steps of CriticalKV (https://arxiv.org/abs/2502.03805).

    Half of what a head keeps has the best scores, the rest the best of (score + 1e-4) * |W_o v|_1. As in its
    own code, and unlike that of kvpress, the window counts in neither half.
    """

    critical: bool = setting(
        False,
        help="pick the second half of a head's tokens by score times the norm of the projected value (CriticalKV)",
        words={"critical": True},
        paper=("CriticalKV", "2502.03805"),
    )

    def ranked(self, view: LayerView, scores: Tensor, counts: Tensor) -> Tensor:
        if not self.critical:
            return scores
        weighted = (scores + EPSILON) * view.projected_norms()[..., : view.length]
        weighted = weighted.masked_fill(view.hidden, float("-inf"))
        first = (counts * FIRST).long()
        best = best_first(scores, int(first.max()))
        taken = torch.arange(best.shape[-1], device=best.device) < first[..., None]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, taken)
        above = weighted.amax(-1, keepdim=True).clamp_min(0) + 1  # more than any other, in the order of the scores
        return torch.where(chosen, scores + above, weighted)
