"""What an allocator is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from sparsemm_lmms.budgets import visual_shares
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.scorers.base import LayerView


@dataclass(frozen=True)
class Model:
    """The shape of the attention that a method works on: the layers that are compressed."""

    num_layers: int
    q_heads: int
    kv_heads: int


@dataclass(frozen=True)
class LayerPrompt:
    """One layer's prompt as an allocator sees it.

    Attributes:
        layer_idx: index of the layer.
        scores: float32 `[batch, kv_heads, L]` for the L columns before the window, -inf in left padding: what the
            scorer says that heads share by (`Scorer.shares`).
        lengths: prompt tokens of each sequence outside the window (`max(n - W, 0)`), on the host.
    """

    layer_idx: int
    scores: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Shape:
    """What is shared out, and among whom.

    Attributes:
        num_layers, q_heads, kv_heads: of the model.
        base: tokens per kv head outside the window, on average (`budget - window_size`).
        redistribute: whether to spend exactly `min(budget, prompt)` tokens per head on average.
        seed: for what is drawn.
        head_scores: float64 `[layers, q_heads]` of an allocator with `needs_head_scores`, else None.
        retention: measured curves `[layers, kv_heads]` of an allocator with `needs_retention`, else None.
        memo: for what an allocator computes once.
    """

    num_layers: int
    q_heads: int
    kv_heads: int
    base: int
    redistribute: bool = False
    seed: int = 0
    head_scores: np.ndarray | None = None
    retention: Retention | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    @property
    def table(self) -> np.ndarray:
        """The head scores of an allocator that needs them."""
        assert self.head_scores is not None  # checked when the method was made
        return self.head_scores

    @cached_property
    def shares(self) -> np.ndarray:
        """Share of each kv head in the head scores of the whole model, float64 `[layers, kv_heads]`."""
        return visual_shares(self.table, self.kv_heads)


@dataclass(frozen=True)
class Allocator:
    """Shares the budget out. A subclass is a frozen dataclass whose fields are its settings.

    Attributes:
        compresses: whether anything is evicted at all.
        needs_head_scores: whether it reads measured scores of the heads.
        needs_retention: whether it also reads the retention curves that were measured with them.
        draws: whether it draws with `seed`.
        compares_heads: whether it holds the scores of heads against each other.
        reads_vision: whether it tells image tokens apart (`vision` of a view).
        papers: (name, arXiv id) of what a user cites; nothing for none.
        cascades: whether it looks at a number of each layer, and shrinks the layers before it when a later one is
            known: it then has `observe` and `counts_so_far` in place of `counts`.
    """

    compresses = True
    needs_head_scores = False
    needs_retention = False
    draws = False
    compares_heads = False
    reads_vision = False
    cascades = False
    papers: ClassVar[tuple[tuple[str, str], ...]] = ()

    def counts(self, shape: Shape, prompt: LayerPrompt) -> np.ndarray | Tensor:
        """Tokens that each head of the layer keeps outside the window.

        Returns:
            whole numbers `[batch, kv_heads]`; the caller cuts what a prompt does not have, and keeps a prompt whole
            that is shorter than the budget.
        """
        rows = [self.of_sequence(shape, prompt.layer_idx, length) for length in prompt.lengths]
        return np.stack([np.broadcast_to(row, shape.kv_heads) for row in rows])

    def of_sequence(self, shape: Shape, layer_idx: int, length: int) -> np.ndarray | int:
        """The same for one sequence with `length` tokens outside the window, for rules that need no scores.

        Returns:
            a number, or whole numbers `[kv_heads]`.
        """
        raise NotImplementedError

    def observe(self, view: LayerView, scores: Tensor) -> np.ndarray | Tensor:
        """A cascading allocator's number of this layer: `[batch]`; `scores` are those of `LayerPrompt`."""
        raise NotImplementedError

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[np.ndarray]:
        """A cascading allocator's counts for the layers seen so far, of which there are `len(seen)`.

        Args:
            seen: what `observe` gave for each layer, float64 `[batch]`.
            lengths: see `LayerPrompt`.

        Returns:
            for each layer whole numbers that broadcast to `[batch, kv_heads]`; of an earlier layer never more than it
            was given before.
        """
        raise NotImplementedError

    def masked_heads(self, shape: Shape) -> np.ndarray | None:
        """Query heads that contribute nothing to the output: bool `[layers, q_heads]`, or None for none."""
        return None
