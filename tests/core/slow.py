"""Budgets and selection in their plainest form: exact fractions, and lists of positions, one head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import inf

import numpy as np
import torch

from sparsemm_lmms import CompressionConfig
from sparsemm_lmms.budgets import pyramid_capacities_exact, spend_exactly
from sparsemm_lmms.methods import Model
from tests.kernels import naive


def spend(floor: Sequence[Fraction], weights: Sequence[Fraction], limit: Sequence[int], total: int) -> list[Fraction]:
    """What each cell gets before fractions are settled: the level w at which `min(limit, floor + w * weight)` adds up.

    Cells without weight get theirs once all others are full.
    """
    rest = Fraction(min(total, sum(limit)))
    amount = [min(Fraction(low), Fraction(high)) for low, high in zip(floor, limit, strict=True)]
    if sum(amount) > rest:
        return [a * rest / sum(amount) for a in amount]
    for weighted in (weights, [1] * len(limit)):
        cells = [i for i, w in enumerate(weighted) if w > 0 and amount[i] < limit[i]]
        for full in sorted(cells, key=lambda i: (limit[i] - amount[i]) / Fraction(weighted[i])):
            open_ = [i for i in cells if amount[i] < limit[i]]
            if full not in open_:
                continue
            left = rest - sum(amount)
            step = min((limit[full] - amount[full]) / Fraction(weighted[full]), left / sum(weighted[i] for i in open_))
            for i in open_:
                amount[i] = min(Fraction(limit[i]), amount[i] + step * weighted[i])
    return amount


def sparsemm(table: np.ndarray, kv_heads: int, base: int, ratio: float) -> list[list[int]]:
    """Capacities `[layers][kv_heads]`; Python rounds a fraction half to even."""
    layers, q_heads = table.shape
    group, floor = q_heads // kv_heads, int(base * ratio)
    total = sum(Fraction(float(x)) for x in table.flatten())
    shares = [
        [sum(Fraction(float(x)) for x in table[i, h * group : (h + 1) * group]) / total for h in range(kv_heads)]
        for i in range(layers)
    ]
    return [[round(share * (base - floor) * layers * kv_heads + floor) for share in row] for row in shares]


def pyramid_ends(base: int, length: int, beta: int) -> tuple[int, int]:
    """Capacity of the deepest and of the shallowest layer; the shallowest has no more than the prompt."""
    low = base // beta
    high = 2 * base - low
    return (low, high) if high < length else (2 * base - length, length)


def tokens_won(scores: Sequence[Sequence[float]], base: int, normalize: bool) -> list[int]:
    """AdaKV: how many of a layer's best `base * heads` columns are each head's.

    Args:
        scores: `[heads][columns]`, -inf where a head has no token.
    """
    rows = [np.asarray(row, dtype=np.float32) for row in scores]
    if normalize:
        for h, row in enumerate(rows):
            mass = sorted((max(float(x), 0.0) for x in row), reverse=True)
            share = np.float32(sum(mass[:base]) / max(sum(mass), 1e-38))
            rows[h] = np.array([x if x == -inf else x * share for x in row], dtype=np.float32)
    entries = [(-x, len(row) - column, h) for h, row in enumerate(rows) for column, x in enumerate(row.tolist())]
    best = sorted(entries)[: base * len(rows)]
    return [sum(h == mine for *_, mine in best) for h in range(len(rows))]


def capacities(
    config: CompressionConfig,
    model: Model,
    table: np.ndarray | None,
    layer: int,
    scores: list[list[float]],
    length: int,
) -> list[int]:
    """Tokens outside the window for each head of one sequence with `length` tokens there."""
    base, heads, layers = config.base, model.kv_heads, model.num_layers
    if length < base:
        return [length] * heads
    if config.method in ("snapkv", "local_window") or (config.method == "adakv" and layer < config.skip):
        found = [base] * heads
    elif config.method == "sparsemm":
        assert table is not None
        if config.redistribute:
            mass = np.asarray(table, dtype=np.float64).reshape(layers * heads, -1).sum(1)
            cells = np.full(layers * heads, length)
            spent = spend_exactly(cells * 0 + base * config.ratio, mass / mass.sum(), cells, base * layers * heads)
            found = spent.reshape(layers, heads)[layer].tolist()
        else:
            found = sparsemm(table, heads, base, config.ratio)[layer]
    elif config.method == "pyramidkv":
        low, high = pyramid_ends(base, length, config.beta)
        capacity = base if layers == 1 else high - layer * ((high - low) // (layers - 1))
        if config.redistribute:
            capacity = int(pyramid_capacities_exact(layers, base, length, config.beta)[layer])
        found = [capacity] * heads
    else:
        assert config.method == "adakv"
        won = tokens_won(scores, base, config.normalize)
        if config.redistribute:
            floor = np.full(heads, base * config.floor_ratio)
            found = spend_exactly(floor, np.array(won), np.full(heads, length), base * heads).tolist()
        else:
            share = np.float32(1 - config.floor_ratio)
            found = [round(float(np.float32(w) * share + np.float32(int(base * config.floor_ratio)))) for w in won]
    return [min(max(count, 0), length) for count in found]


def keep(
    config: CompressionConfig,
    model: Model,
    table: np.ndarray | None,
    layer: int,
    query: torch.Tensor,
    keys: list[torch.Tensor],
    seen: int,
) -> list[list[int]]:
    """Which of the rows that it holds each head of one sequence keeps, ascending.

    Args:
        query: `[q_heads, t, d]`, of the newest tokens, which every head holds.
        keys: per kv head `[held, d]`.
        seen: tokens of the sequence so far, evicted ones included.
    """
    held = [len(rows) for rows in keys]
    window = min(config.window_size, max(held))
    room = [max(count - window, 0) for count in held]
    if config.method == "fullkv" or max(room) == 0 or seen < config.budget:
        return [list(range(count)) for count in held]
    width, group = max(room), model.q_heads // model.kv_heads
    scores = []
    for h, rows in enumerate(keys):
        if config.method == "local_window" or room[h] == 0:
            own = [float(i) for i in range(room[h])]
        else:
            judging = query[None, h * group : (h + 1) * group, -window:]
            own = naive.window_score(
                judging, rows[None, None], rows.shape[-1] ** -0.5, config.kernel_size, config.pooling, config.gqa_func
            )[0, 0].tolist()
        scores.append([-inf] * (width - room[h]) + own)
    counts = capacities(config, model, table, layer, scores, seen - window)
    kept = []
    for h, count in enumerate(counts):
        own = scores[h][width - room[h] :]
        best = sorted(range(room[h]), key=lambda i: (-np.float32(own[i]), -i))[:count]
        kept.append(sorted(best) + list(range(room[h], held[h])))
    return kept
