"""What a method is: which tokens matter (scorer) times how many each head keeps (allocator)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from torch import Tensor

from sparsemm_lmms.budgets import sparsemm_capacities, spend_exactly, visual_shares
from sparsemm_lmms.config import CompressionConfig


@dataclass(frozen=True)
class Model:
    """The shape of the attention that a method works on."""

    num_layers: int
    q_heads: int
    kv_heads: int


@dataclass(frozen=True)
class LayerPrompt:
    """One layer's prompt as a method sees it.

    Attributes:
        layer_idx: index of the layer.
        scores: float32 `[batch, kv_heads, L]` for the L columns before the window, -inf in left padding.
        lengths: prompt tokens of each sequence outside the window (`max(n - W, 0)`), on the host.
    """

    layer_idx: int
    scores: Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Method:
    """A method of compression. Subclasses say how many tokens each head keeps; all else is shared.

    Attributes:
        config: the settings.
        model: shape of the model.
        head_scores: float64 `[layers, q_heads]` for methods with `needs_head_scores`, else None.
    """

    config: CompressionConfig
    model: Model
    head_scores: np.ndarray | None = None

    compresses = True
    needs_head_scores = False
    scorer = "window"  # "window": attention of the last queries; "recency": the newest tokens; "none"
    arguments: tuple[str, ...] = ()  # the settings of CompressionConfig that only some methods know

    def __post_init__(self) -> None:
        if self.needs_head_scores:
            if self.head_scores is None:
                raise ValueError(f"method {self.config.method!r} needs head_scores.")
            wanted = (self.model.num_layers, self.model.q_heads)
            if tuple(np.shape(self.head_scores)) != wanted:
                raise ValueError(
                    f"head_scores have shape {list(np.shape(self.head_scores))} but the model has "
                    f"{wanted[0]} layers x {wanted[1]} query heads; use scores made for this model."
                )

    def capacities(self, prompt: LayerPrompt) -> np.ndarray:
        """Tokens that each head keeps outside the window.

        Returns:
            int64 `[batch, kv_heads]`; values above the prompt are clamped by the caller.
        """
        rows = [self.sequence_capacities(prompt, b, length) for b, length in enumerate(prompt.lengths)]
        return np.stack([np.broadcast_to(row, self.model.kv_heads) for row in rows])

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> np.ndarray | int:
        """The same for sequence b of the batch, whose prompt has `length` tokens outside the window (`[kv_heads]`)."""
        raise NotImplementedError

    def masked_heads(self) -> np.ndarray | None:
        """Query heads that contribute nothing to the output: bool `[layers, q_heads]`, or None for none."""
        return None

    def counts(self, prompt: LayerPrompt) -> np.ndarray:
        """`capacities` clamped to what exists; a prompt shorter than the budget is kept whole (int64)."""
        lengths = np.asarray(prompt.lengths, dtype=np.int64)[:, None]
        counts = np.clip(self.capacities(prompt), 0, lengths)
        return np.where(lengths < self.config.base, lengths, counts)


@dataclass(frozen=True)
class VisualShares(Method):
    """Base of the methods that share the budget of the whole model out by head scores."""

    def table(self) -> np.ndarray:
        """Head scores `[layers, q_heads]`."""
        raise NotImplementedError

    @cached_property
    def shares(self) -> np.ndarray:
        return visual_shares(self.table(), self.model.kv_heads)

    @cached_property
    def _by_length(self) -> dict[int, np.ndarray]:
        return {}

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> np.ndarray:
        config = self.config
        if not config.redistribute:
            length = -1  # the published rule does not look at the prompt
        if length not in self._by_length:
            if config.redistribute:
                limit = np.full(self.shares.shape, length)
                floor = np.full(self.shares.shape, config.base * config.ratio)
                total = min(config.base, length) * self.shares.size
                self._by_length[length] = spend_exactly(floor, self.shares, limit, total)
            else:
                self._by_length[length] = sparsemm_capacities(self.shares, config.base, config.ratio)
        return self._by_length[length][prompt.layer_idx]
