"""From scores and counts to kept positions. The cache and the study functions below share this code."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.budgets import sparsemm_capacities, visual_shares
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.kernels import window_score
from sparsemm_lmms.methods import METHODS, LayerPrompt, Method, Model


@dataclass(frozen=True)
class Selection:
    """The columns of a left-padded prompt that each head keeps.

    Attributes:
        index: int32 `[batch, kv_heads, most]` on the device of the keys, ascending columns; the first `counts` count.
        counts: int64 `[batch, kv_heads]` on the host, window included.
    """

    index: Tensor
    counts: np.ndarray


def select(
    method: Method,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    scaling: float,
    prompt_lengths: tuple[int, ...],
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Selection:
    """Choose what each kv head of one layer keeps of its prompt.

    Args:
        query: post-RoPE queries `[batch, q_heads, n, head_dim]`.
        key: post-RoPE keys `[batch, kv_heads, n, head_dim]`.
        scaling: factor of q.k (`head_dim ** -0.5`).
        prompt_lengths: real tokens of each sequence; the rest of the n columns is padding on the left.
        softcap, sinks: see `kernels.window_score`; sinks `[q_heads]`.
    """
    config, (batch, heads, columns) = method.config, key.shape[:3]
    window = min(config.window_size, columns)
    lengths = tuple(max(length - window, 0) for length in prompt_lengths)
    pads = [columns - length for length in prompt_lengths]
    if max(lengths) == 0 or not method.compresses or all(n < config.budget for n in prompt_lengths):
        outside = np.broadcast_to(np.asarray(lengths)[:, None], (batch, heads))
        newest_first = torch.arange(columns - window - 1, -1, -1, device=key.device)  # so that padding comes last
        prefix = newest_first.expand(batch, heads, -1)
    else:
        scores = _scores(method, query, key, scaling, pads, softcap, sinks)
        outside = method.counts(LayerPrompt(layer_idx, scores, lengths))
        prefix = _best(scores, int(outside.max()))
    return _gather_columns(prefix, outside, pads, columns, window)


def reselect(
    method: Method,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    scaling: float,
    held: np.ndarray,
    seen: int,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Selection:
    """Choose again from what the heads of ONE sequence hold, judged by its newest tokens.

    The rules are those of the prompt, with `seen` in the place of its length; a head cannot keep more than it holds.

    Args:
        query: post-RoPE queries of the newest tokens `[1, q_heads, t, head_dim]`; the last `window_size` of them judge.
        key: `[1, kv_heads, m, head_dim]`; head h holds the last `held[h]` columns, all before is padding.
        held: int64 `[kv_heads]` on the host.
        seen: tokens of the sequence so far, evicted ones included.
        softcap, sinks: see `select`.

    Returns:
        Columns of `key` and counts.
    """
    heads, columns = key.shape[1:3]
    window = min(method.config.window_size, columns)
    pads = [columns - int(count) for count in held]
    room = np.maximum(held - window, 0)[None]
    if not method.compresses or columns == window or seen < method.config.budget:
        outside = room
        prefix = torch.arange(columns - window - 1, -1, -1, device=key.device).expand(1, heads, -1)
    else:
        rows = query[0].unflatten(0, (heads, -1))  # every head is a sequence of its own: its padding is its own
        own = None if sinks is None else sinks.view(heads, -1)
        scores = _scores(method, rows, key.transpose(0, 1), scaling, pads, softcap, own)
        scores = scores[..., : columns - window].transpose(0, 1)
        outside = np.minimum(method.counts(LayerPrompt(layer_idx, scores, (seen - window,))), room)
        prefix = _best(scores, int(outside.max()))
    chosen = _gather_columns(prefix.transpose(0, 1), outside.T, pads, columns, window)
    return Selection(chosen.index.transpose(0, 1).contiguous(), chosen.counts.T)


def _scores(
    method: Method,
    query: Tensor,
    key: Tensor,
    scaling: float,
    pads: list[int],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """float32 `[batch, kv_heads, L]` over the columns before the window; -inf in the padding."""
    config, columns = method.config, key.shape[2]
    pad = torch.tensor(pads, dtype=torch.int32, device=key.device) if any(pads) else None
    if method.scorer == "window":
        return window_score(
            query[:, :, -config.window_size :],
            key,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            kernel_size=config.kernel_size,
            pooling=config.pooling,
            gqa_func=config.gqa_func,
            pad=pad,
            backend=config.kernel_backend,
        )
    recency = torch.arange(columns - config.window_size, dtype=torch.float32, device=key.device)
    scores = recency.expand(key.shape[0], key.shape[1], -1)
    return scores if pad is None else scores.masked_fill(recency < pad[:, None, None], float("-inf"))


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


def _gather_columns(prefix: Tensor, outside: np.ndarray, pads: list[int], columns: int, window: int) -> Selection:
    """Join the best `outside[b, h]` of the ranked `prefix` columns with the window, ascending."""
    device, (batch, heads, most) = prefix.device, prefix.shape
    take = torch.tensor(outside, device=device)[..., None]
    first = torch.tensor(pads, device=device)[:, None, None]
    tail = torch.arange(columns - window, columns, device=device).expand(batch, heads, -1)
    dropped = torch.cat([torch.arange(most, device=device) >= take, tail < first], dim=-1)
    counts = outside + np.minimum(columns - np.asarray(pads), window)[:, None]
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
    window_size: int = 32,
    kernel_size: int = 5,
    pooling: str = "avgpool",
    gqa_func: str = "mean",
    ratio: float = 0.1,
    floor_ratio: float = 0.2,
    normalize: bool = True,
    skip: int = 0,
    beta: int = 20,
    redistribute: bool = False,
    seed: int = 0,
) -> list[Tensor]:
    """Positions that `method` keeps of one layer's prompt, with the very code that the cache runs.

    Args:
        query: post-RoPE queries `[q_heads, n, head_dim]`.
        key: post-RoPE keys `[kv_heads, n, head_dim]`.
        budget: tokens per kv head on average, window included.
        num_layers, layer_idx: depth of the model and which layer this is (pyramidkv, sparsemm, adakv's `skip`).
        head_scores: `[layers, q_heads]`, for sparsemm.

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
    config = CompressionConfig(
        method=method, budget=budget, window_size=window_size, kernel_size=kernel_size, pooling=pooling,
        gqa_func=gqa_func, ratio=ratio, floor_ratio=floor_ratio, normalize=normalize, skip=skip, beta=beta,
        redistribute=redistribute, seed=seed,
    )  # fmt: skip
    model = Model(num_layers, query.shape[0], key.shape[0])
    built = build_method(config, model, None if head_scores is None else np.asarray(head_scores, dtype=np.float64))
    scaling = query.shape[-1] ** -0.5
    chosen = select(built, layer_idx, query[None], key[None], scaling, (key.shape[1],))
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
    cls = METHODS[config.method]
    return cls(config, model, head_scores if cls.needs_head_scores else None)
