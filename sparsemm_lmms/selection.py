"""From scores and counts to kept positions. The cache and the study functions below share this code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.budgets import sparsemm_capacities, visual_shares
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import LayerPrompt, Method, Model, find_method
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.scorers.base import LayerView, Scorer, best_first


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
    judged = _Judged(method, replace(view, whole=bool((held == np.array(seen)[:, None]).all())), held)
    prompt = LayerPrompt(view.layer_idx, judged.shares, lengths)
    if not method.allocator.cascades:
        outside = np.minimum(method.counts(prompt), room)
        return judged.ranking(outside).first(outside)
    *earlier, outside = method.cascade(judged.whole, prompt, [] if observed is None else observed)
    outside = np.minimum(outside, room)
    ranking = judged.ranking(outside)
    chosen = ranking.first(outside)
    return Selection(chosen.index, chosen.counts, ranking, earlier)


def select_newest(method: Method, scorer: Scorer, view: LayerView, held: np.ndarray, outside: np.ndarray) -> Selection:
    """Choose again what each kv head keeps of all it holds, each head judged alone, whatever the others hold.

    Args:
        view: the layer; its queries are those of the window, the newest tokens.
        held: int64 `[batch, kv_heads]` on the host: a head holds the last `held` columns of the keys.
        outside: int64 `[batch, kv_heads]`, tokens outside the window that it keeps at most.

    Returns:
        Columns of `view.key` and counts.
    """
    outside = np.minimum(outside, np.maximum(held - view.window, 0))
    return _Judged(method, replace(view, whole=False), held, scorer).ranking(outside).first(outside)


def scored(method: Method, view: LayerView, held: np.ndarray) -> Tensor:
    """float32 `[batch, kv_heads, L]`: the scorer's scores of the columns before the window; -inf in the padding."""
    judged = _Judged(method, view, held)
    return judged.laid_out(judged.scores)


class _Judged:
    """A layer as its scorer sees it.

    Where heads hold different numbers of tokens, each is a sequence of its own, whose padding is its own. With a scorer
    `newest` for a cache that is compacted, they always are: nothing depends on the others, nor on a batch.
    """

    def __init__(self, method: Method, view: LayerView, held: np.ndarray, newest: Scorer | None = None) -> None:
        scorer = method.scorer if newest is None else newest
        assert scorer is not None  # a method that compresses has one
        view = replace(view, base=method.config.base)
        self.scorer, self.held, self.whole = scorer, held, view
        pads = view.key.shape[2] - held
        if newest is not None or (pads != pads[:, :1]).any():
            view = view.by_head(torch.as_tensor(pads.ravel(), dtype=torch.int32, device=view.key.device))
        self.view = view
        hidden = torch.arange(view.length) < torch.as_tensor(pads)[..., None]
        self.hidden = hidden.to(view.key.device) if pads.any() else None
        self.scores = self.scorer.score(view)[..., : view.length]

    @property
    def shares(self) -> Tensor:
        """`Scorer.shares`, laid out."""
        return self.laid_out(self.scorer.shares(self.view, self.scores))

    def laid_out(self, x: Tensor) -> Tensor:
        """`[batch, kv_heads, L]`, -inf in the padding."""
        x = x[..., : self.view.length].reshape(*self.held.shape, -1)
        return x if self.hidden is None else x.masked_fill(self.hidden, float("-inf"))

    def ranked(self, outside: np.ndarray) -> Tensor:
        """`Scorer.ranked` where heads keep `outside` `[batch, kv_heads]`, laid out."""
        own = self.scores.shape
        counts = torch.as_tensor(outside, device=self.scores.device).reshape(own[:2])
        return self.laid_out(self.scorer.ranked(self.view, self.laid_out(self.scores).reshape(own), counts))

    def ranking(self, outside: np.ndarray) -> Ranking:
        """The best of each head, as many as the head that keeps most of `outside`."""
        best = best_first(self.ranked(outside), int(outside.max()))
        return Ranking(best, self.held, self.whole.key.shape[2], self.whole.window)


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


LayerTensors = tuple[Tensor, Tensor, Tensor | None]
"""Queries `[q_heads, n, head_dim]`, keys and values (or None) `[kv_heads, n, head_dim]` of a layer."""


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
    earlier: Sequence[LayerTensors] = (),
    output: Tensor | None = None,
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    retention: Retention | None = None,
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
        earlier: the layers before this one, for scorers that remember them (bacon) and allocators that share a budget
            out among layers (vlcache, tgvkv, cake), which need all of them and are asked for the last layer.
        output: weight of the output projection `[hidden, q_heads * head_dim]`, for `critical`.
        rotary: positions `[1, n]` -> cosine and sine `[1, n, head_dim]` by which queries and keys were rotated, for
            expected_attention; None for not at all.
        retention: measured curves, for waterfill.
        settings: the other settings of `CompressionConfig`.

    Returns:
        For each kv head an int64 tensor of ascending positions, window included.

    Raises:
        ValueError: for bad settings or shapes.
    """
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx={layer_idx} must lie in 0..{num_layers - 1} (num_layers={num_layers}).")
    if len(earlier) > layer_idx:
        raise ValueError(f"earlier has {len(earlier)} layers, but layer_idx={layer_idx} has {layer_idx} before it.")
    _check_shapes(query, key, value)
    config = CompressionConfig(method=method, budget=budget, **settings)
    model = Model(num_layers, query.shape[0], key.shape[0])
    scores = None if head_scores is None else np.asarray(head_scores, dtype=np.float64)
    built = build_method(config, model, scores, retention)
    if built.allocator.cascades and len(earlier) < num_layers - 1:
        raise ValueError(
            f"method={method!r} shares a budget out among layers once it has seen them all: ask for the last one "
            f"(layer_idx={num_layers - 1}) and pass the {num_layers - 1} before it as earlier."
        )
    state: dict[str, Any] = {}
    seen: list[np.ndarray] = []
    for number, layer in enumerate(earlier, layer_idx - len(earlier)):
        select(built, _study_view(config, number, layer, vision, output, rotary, state), *_held(layer[1]), seen)
    view = _study_view(config, layer_idx, (query, key, value), vision, output, rotary, state)
    chosen = select(built, view, *_held(key), seen)
    return [row[:count].long() for row, count in zip(chosen.index[0], chosen.counts[0].tolist(), strict=True)]


def token_scores(
    scorer: str,
    layers: Sequence[LayerTensors],
    *,
    budget: int,
    window_size: int = 32,
    kernel_size: int = 5,
    pooling: str = "avgpool",
    gqa_func: str = "mean",
    vision: Tensor | None = None,
    output: Tensor | Sequence[Tensor] | None = None,
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """What a scorer gives the tokens before the window of one prompt, with the very code that the cache runs.

    Args:
        scorer: name of a scorer; what ranks a head's tokens is what a uniform budget would pick by.
        layers: `(query, key, value)` of each layer, in order of depth: post-RoPE `[q_heads, n, head_dim]`, twice
            `[kv_heads, n, head_dim]`; the value may be None for scorers that read none.
        budget: tokens per kv head on average, window included.
        vision, rotary: see `kept_positions`.
        output: see there; or one a layer.
        settings: those of the scorer.

    Returns:
        float32 `[kv_heads, n - window_size]` for each layer; no columns where the window covers the prompt.

    Raises:
        ValueError: for bad settings or shapes.

    >>> q, k = torch.zeros(2, 4, 8), torch.zeros(1, 4, 8)
    >>> token_scores("window_attention", [(q, k, k)], budget=2, window_size=1, kernel_size=1)
    [tensor([[0.2500, 0.2500, 0.2500]])]
    """
    if not layers:
        raise ValueError("layers is empty; pass (query, key, value) of at least one layer.")
    for layer in layers:
        _check_shapes(*layer)
    own = {"window_size": window_size, "kernel_size": kernel_size, "pooling": pooling, "gqa_func": gqa_func}
    config = CompressionConfig(method=f"{scorer}+uniform", budget=budget, **own, **settings)
    built = build_method(config, Model(len(layers), layers[0][0].shape[0], layers[0][1].shape[0]))
    outputs = [output] * len(layers) if output is None or isinstance(output, Tensor) else output
    found = []
    state: dict[str, Any] = {}
    for number, (layer, weight) in enumerate(zip(layers, outputs, strict=True)):
        view = _study_view(config, number, layer, vision, weight, rotary, state)
        held, _ = _held(layer[1])
        if view.length:
            found.append(_Judged(built, view, held).ranked(np.full_like(held, min(config.base, view.length)))[0])
        else:
            found.append(torch.zeros(layer[1].shape[0], 0, device=layer[1].device))
    return found


def _check_shapes(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    if query.ndim != 3 or key.ndim != 3 or query.shape[1:] != key.shape[1:] or query.shape[0] % key.shape[0]:
        raise ValueError(
            f"query {list(query.shape)} and key {list(key.shape)} must be [q_heads, n, d] and [kv_heads, n, d] with "
            "kv_heads dividing q_heads."
        )
    if value is not None and (value.ndim != 3 or value.shape[:2] != key.shape[:2]):
        raise ValueError(f"value {list(value.shape)} must be [kv_heads, n, d], as key {list(key.shape)} is.")


def _held(key: Tensor) -> tuple[np.ndarray, tuple[int]]:
    """All of a prompt's tokens, as `select` takes them."""
    heads, tokens = key.shape[:2]
    return np.full((1, heads), tokens), (tokens,)


def _study_view(
    config: CompressionConfig,
    layer_idx: int,
    layer: LayerTensors,
    vision: Tensor | None,
    output: Tensor | None,
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None,
    state: dict[str, Any],
) -> LayerView:
    """One prompt's layer, whose tokens are at positions 0, 1, ..."""
    query, key, value = layer
    places = torch.arange(key.shape[1], device=key.device)[None]
    return LayerView(
        layer_idx,
        query[None],
        key[None],
        query.shape[-1] ** -0.5,
        min(config.window_size, key.shape[1]),
        values=None if value is None else value[None],
        vision=None if vision is None else vision[None],
        rotary=rotary,
        state=state,
        backend=config.kernel_backend,
        output=output,
        turn=None if rotary is None else rotary(places),
        position=None if rotary is None else places[:, -1],
    )


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


def build_method(
    config: CompressionConfig,
    model: Model,
    head_scores: np.ndarray | None = None,
    retention: Retention | None = None,
) -> Method:
    """The method object for a configuration and a model's shape.

    Raises:
        ValueError: head scores or retention curves that the method needs are missing or of another shape.
    """
    return Method(config, model, head_scores if find_method(config.method).needs_head_scores else None, retention)
