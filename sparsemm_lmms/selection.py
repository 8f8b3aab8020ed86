"""From scores and counts to kept positions. The cache and the study functions below share this code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.budgets import sparsemm_capacities, visual_shares
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import LayerPrompt, Method, Model, find_method
from sparsemm_lmms.scorers.base import LayerView


@dataclass(frozen=True)
class Ranking:
    """The columns before the window, the best first, from which any number may be kept.

    Attributes:
        best: int64 `[batch, kv_heads, most]`.
        held: int64 `[batch, kv_heads]` on the host: real columns of each head, the window included.
        columns, window: of the prompt.
    """

    best: Tensor
    held: np.ndarray
    columns: int
    window: int

    def first(self, outside: np.ndarray) -> Selection:
        """Keep the best `outside` `[batch, kv_heads]` columns of each head, and the window."""
        return _gather_columns(self.best, outside, self.held, self.columns, self.window)


@dataclass(frozen=True)
class Selection:
    """The columns of a left-padded prompt that each head keeps.

    Attributes:
        index: int32 `[batch, kv_heads, most]` on the device of the keys, ascending columns; the first `counts` count.
        counts: int64 `[batch, kv_heads]` on the host, window included.
        ranking: for a method that may later keep less of it, else None.
        earlier: what a cascading allocator now gives the layers before: int64 `[batch, kv_heads]` of each, window
            not included.
    """

    index: Tensor
    counts: np.ndarray
    ranking: Ranking | None = None
    earlier: list[np.ndarray] = field(default_factory=list)


def select(
    method: Method, view: LayerView, held: np.ndarray, seen: tuple[int, ...], observed: list[Any] | None = None
) -> Selection:
    """Choose what each kv head of one layer keeps: of its prompt, or again of what it holds.

    Args:
        view: the layer; its queries are those of the prompt, or of the newest tokens, which judge.
        held: int64 `[batch, kv_heads]` on the host: head h of sequence b holds the last `held[b, h]` columns of the
            keys, all before is padding. Of a prompt all heads hold the same.
        seen: tokens of each sequence so far, evicted ones included; of a prompt that is its length.
        observed: what a cascading allocator saw of the layers before; this layer's number is added.

    Returns:
        Columns of `view.key` and counts. A sequence shorter than the budget is kept whole, and no head keeps more than
        it holds.
    """
    (batch, heads, columns), window = view.key.shape[:3], view.window
    room = np.maximum(held - window, 0)
    lengths = tuple(max(tokens - window, 0) for tokens in seen)
    if room.max() == 0 or all(map(method.keeps_whole, lengths)):
        newest_first = torch.arange(columns - window - 1, -1, -1, device=view.key.device)  # so that padding comes last
        return Ranking(newest_first.expand(batch, heads, -1), held, columns, window).first(room)
    scores = scored(method, view, held)
    prompt = LayerPrompt(view.layer_idx, scores, lengths)
    if not method.allocator.cascades:
        outside = np.minimum(method.counts(prompt), room)
        return Ranking(_best(scores, int(outside.max())), held, columns, window).first(outside)
    *earlier, outside = method.cascade(view, prompt, [] if observed is None else observed)
    outside = np.minimum(outside, room)
    ranking = Ranking(_best(scores, int(outside.max())), held, columns, window)
    chosen = ranking.first(outside)
    return Selection(chosen.index, chosen.counts, ranking, earlier)


def scored(method: Method, view: LayerView, held: np.ndarray) -> Tensor:
    """float32 `[batch, kv_heads, L]`: the scorer's scores of the columns before the window; -inf in the padding."""
    assert method.scorer is not None  # a method that compresses has one
    batch, heads, columns = view.key.shape[:3]
    pads = columns - held
    if (pads != pads[:, :1]).any():  # every head is a sequence of its own: its padding is its own
        own = view.by_head(torch.as_tensor(pads.ravel(), dtype=torch.int32, device=view.key.device))
        scores = method.scorer.score(own).unflatten(0, (batch, heads))[:, :, 0]
    else:
        scores = method.scorer.score(view)
    scores = scores[..., : view.length]
    if not pads.any():
        return scores
    hidden = torch.arange(view.length, device=scores.device) < torch.as_tensor(pads, device=scores.device)[..., None]
    return scores.masked_fill(hidden, float("-inf"))


def _best(scores: Tensor, most: int) -> Tensor:
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


def _gather_columns(prefix: Tensor, outside: np.ndarray, held: np.ndarray, columns: int, window: int) -> Selection:
    """Join the best `outside[b, h]` of the ranked `prefix` columns with the window, ascending."""
    device, (batch, heads, most) = prefix.device, prefix.shape
    take = torch.tensor(outside, device=device)[..., None]
    first = torch.tensor(columns - held, device=device)[..., None]
    tail = torch.arange(columns - window, columns, device=device).expand(batch, heads, -1)
    dropped = torch.cat([torch.arange(most, device=device) >= take, tail < first], dim=-1)
    counts = outside + np.minimum(held, window)
    index = torch.cat([prefix, tail], dim=-1).to(torch.int32).masked_fill_(dropped, columns)
    index = index.sort(dim=-1).values if index.is_cuda else torch.from_numpy(np.sort(index.numpy(), axis=-1))
    return Selection(index[..., : int(counts.max())].contiguous(), counts)


def kept_positions(
    method: str,
    query: Tensor,
    key: Tensor,
    *,
    budget: int,
    num_layers: int = 1,
    layer_idx: int = 0,
    head_scores: np.ndarray | Tensor | None = None,
    value: Tensor | None = None,
    vision: Tensor | None = None,
    **settings: Any,
) -> list[Tensor]:
    """Positions that `method` keeps of one layer's prompt, with the very code that the cache runs.

    Args:
        query: post-RoPE queries `[q_heads, n, head_dim]`.
        key: post-RoPE keys `[kv_heads, n, head_dim]`.
        budget: tokens per kv head on average, window included.
        num_layers, layer_idx: depth of the model and which layer this is (pyramidkv, sparsemm, adakv's `skip`).
        head_scores: `[layers, q_heads]`, for sparsemm.
        value: `[kv_heads, n, head_dim]`, for scorers that read values.
        vision: bool `[n]`, the image tokens, for scorers that tell them apart.
        settings: the other settings of `CompressionConfig`.

    Returns:
        For each kv head an int64 tensor of ascending positions, window included.

    Raises:
        ValueError: for bad settings or shapes.
    """
    if query.ndim != 3 or key.ndim != 3 or query.shape[1:] != key.shape[1:] or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must be [q_heads, n, d] and [kv_heads, n, d] with "
            "kv_heads dividing q_heads."
        )
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx={layer_idx} must lie in 0..{num_layers - 1} (num_layers={num_layers}).")
    config = CompressionConfig(method=method, budget=budget, **settings)
    model = Model(num_layers, query.shape[0], key.shape[0])
    built = build_method(config, model, None if head_scores is None else np.asarray(head_scores, dtype=np.float64))
    tokens = key.shape[1]
    view = LayerView(
        layer_idx,
        query[None],
        key[None],
        query.shape[-1] ** -0.5,
        min(config.window_size, tokens),
        values=None if value is None else value[None],
        vision=None if vision is None else vision[None],
        backend=config.kernel_backend,
    )
    chosen = select(built, view, np.full((1, key.shape[0]), tokens), (tokens,))
    return [row[:count].long() for row, count in zip(chosen.index[0], chosen.counts[0].tolist(), strict=True)]


def head_budgets(
    head_scores: np.ndarray | Tensor, *, kv_heads: int, budget: int, window_size: int = 32, ratio: float = 0.1
) -> Tensor:
    """SparseMM's capacities for a table of head scores, before they are clamped to a prompt.

    Args:
        head_scores: `[layers, q_heads]`.

    Returns:
        int32 `[layers, kv_heads]`, window not included.
    """
    config = CompressionConfig(method="sparsemm", budget=budget, window_size=window_size, ratio=ratio)
    shares = visual_shares(np.asarray(head_scores, dtype=np.float64), kv_heads)
    return torch.from_numpy(sparsemm_capacities(shares, config.base, config.ratio)).to(torch.int32)


def build_method(config: CompressionConfig, model: Model, head_scores: np.ndarray | None = None) -> Method:
    """The method object for a configuration and a model's shape.

    Raises:
        ValueError: head scores that the method needs are missing or of another shape.
    """
    return Method(config, model, head_scores if find_method(config.method).needs_head_scores else None)
