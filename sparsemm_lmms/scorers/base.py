"""What a scorer sees of a layer, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


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

        Padding does not count, so a sequence has the mean that it has alone.
        """
        if self.pad is None:
            return x.mean(2, keepdim=True)
        real = self.real().view(x.shape[0], 1, x.shape[2], *[1] * (x.ndim - 3))
        return x.masked_fill(~real, 0).sum(2, keepdim=True) / real.sum(2, keepdim=True)

    def attention_rows(self, rows: int) -> Tensor:
        """Attention weights of the newest `rows` queries: float32 `[batch, q_heads, rows, n]`, 0 in the padding.

        Made on demand: a whole matrix would be as large as the prompt squared.
        """
        batch, q_heads, columns = self.key.shape[0], self.query.shape[1], self.key.shape[2]
        query = self.query[:, :, -rows:].float()
        key = self.key.float().repeat_interleave(q_heads // self.key.shape[1], dim=1)
        logits = query @ key.mT * self.scaling
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        place = torch.arange(columns, device=key.device)
        hidden = place > place[columns - query.shape[2] :, None]
        hidden = hidden | ~self.real()[:, None, None]
        logits = logits.masked_fill(hidden, float("-inf"))
        if self.sinks is not None:
            sinks = self.sinks.float().expand(batch, q_heads)[..., None, None].expand(*logits.shape[:3], 1)
            logits = torch.cat([logits, sinks], dim=-1)
        return logits.softmax(-1)[..., :columns].nan_to_num(0.0)

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
            pad=pads,
        )


@dataclass(frozen=True)
class Scorer:
    """Ranks the tokens before the window. A subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        comparable: whether scores of one head can be held against those of another, as shares of attention can: not
            negative, and of one scale in all heads. An allocator that does so refuses other scorers.
    """

    comparable = False

    def score(self, view: LayerView) -> Tensor:
        """The higher, the rather a token stays; of equal scores the newer token does.

        Returns:
            float32 `[batch, kv_heads, L]` for the L = `view.length` columns before the window. What stands in the
            padding does not matter.
        """
        raise NotImplementedError
