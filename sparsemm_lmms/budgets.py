"""How many tokens each kv head keeps outside the window: the allocation rules, on plain numpy arrays.

Every rule works on `base = budget - window_size` tokens per kv head and does not know positions. The published rules
are reproduced exactly (SparseMM arXiv 2506.05344, PyramidKV arXiv 2406.02069, AdaKV arXiv 2407.11550, all as in the
SparseMM code); `spend_exactly` is our repair of what they lose to rounding and to heads that cannot use their share.
"""

from __future__ import annotations

import numpy as np

TINY = 1e-300


def visual_shares(head_scores: np.ndarray, kv_heads: int) -> np.ndarray:
    """Share of each kv head in the score of the whole model.

    Args:
        head_scores: float `[layers, q_heads]`, non-negative, not all zero.
        kv_heads: kv heads a layer; query head h belongs to kv head `h // (q_heads // kv_heads)`.

    Returns:
        float64 `[layers, kv_heads]` that sums to one.
    """
    scores = np.asarray(head_scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(f"head_scores must have shape [layers, q_heads], got {list(scores.shape)}.")
    layers, q_heads = scores.shape
    if kv_heads < 1 or q_heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} must divide the {q_heads} query heads of head_scores.")
    total = scores.sum()
    if not np.isfinite(total) or (scores < 0).any() or total <= 0:
        raise ValueError("head_scores must be finite and non-negative with a positive sum.")
    return (scores / total).reshape(layers, kv_heads, q_heads // kv_heads).sum(-1)


def sparsemm_capacities(shares: np.ndarray, base: int, ratio: float) -> np.ndarray:
    """SparseMM §3.3: a uniform floor of `int(base * ratio)`, the rest by visual share over the WHOLE model.

    Rounded half to even as the published code does; a capacity may exceed the prompt (the caller clamps it).

    Args:
        shares: float64 `[layers, kv_heads]`, sums to one.

    Returns:
        int64 `[layers, kv_heads]`, window not included.
    """
    floor = int(base * ratio)
    pool = (base - floor) * shares.size
    return np.rint(shares * pool + floor).astype(np.int64)


def pyramid_capacity(layer_idx: int, num_layers: int, base: int, length: int, beta: int) -> int:
    """PyramidKV: capacity of a layer outside the window, falling linearly with depth.

    Args:
        length: prompt tokens outside the window (L = n - W).
    """
    if num_layers == 1:
        return base
    low, high = _pyramid_ends(base, length, beta)
    return high - layer_idx * ((high - low) // (num_layers - 1))


def pyramid_capacities_exact(num_layers: int, base: int, length: int, beta: int) -> np.ndarray:
    """PyramidKV without the floor in the step: int64 `[layers]` that spends `min(base, length)` a layer on average."""
    if num_layers == 1:
        return np.array([min(base, length)], dtype=np.int64)
    low, high = _pyramid_ends(base, length, beta)
    wanted = np.linspace(high, low, num_layers)
    zeros = np.zeros(num_layers)
    return spend_exactly(zeros, wanted, np.full(num_layers, length), min(base, length) * num_layers)


def _pyramid_ends(base: int, length: int, beta: int) -> tuple[int, int]:
    low = base // beta
    high = 2 * base - low
    if high >= length:
        high, low = length, 2 * base - length
    return low, high


def spend_exactly(floor: np.ndarray, weights: np.ndarray, limit: np.ndarray, total: int) -> np.ndarray:
    """Hand out exactly `total` tokens: `floor` to each cell, the rest in proportion to `weights`, no cell over `limit`.

    What a full cell cannot use goes to the others in proportion to their weights (evenly once all weighted cells are
    full); fractions are settled by largest remainder.

    Args:
        floor, weights, limit: arrays of one shape; `limit` are whole numbers.
        total: tokens to spend, clipped to `limit.sum()`.

    Returns:
        int64 array of the same shape with sum `min(total, limit.sum())`.
    """
    shape = np.shape(limit)
    limit = np.asarray(limit, dtype=np.float64).ravel()
    weights = np.asarray(weights, dtype=np.float64).ravel().clip(min=0)
    total = int(min(total, limit.sum()))
    amount = np.minimum(np.asarray(floor, dtype=np.float64).ravel(), limit)
    if amount.sum() > total:  # a floor above the total (budget larger than the prompt of another cell) is scaled down
        amount *= total / amount.sum()
    for _ in range(limit.size + 1):
        rest = total - amount.sum()
        free = amount < limit
        if rest <= 1e-9 * max(total, 1) or not free.any():
            break
        share = np.where(free, weights, 0.0)
        if share.sum() <= 0:
            share = free.astype(np.float64)
        amount = np.minimum(limit, amount + rest * share / share.sum())
    whole = np.floor(amount + 1e-9)
    order = np.argsort(-(amount - whole), kind="stable")
    order = order[whole[order] < limit[order]]
    missing = total - int(whole.sum())
    while missing > 0:
        step = order[:missing]
        whole[step] += 1
        missing -= len(step)
        order = order[whole[order] < limit[order]]
    return whole.astype(np.int64).reshape(shape)


def with_floor(weights: np.ndarray, least: float, total: float) -> np.ndarray:
    """Share `total` out in proportion to `weights`, but at least `least` to each; those above pay for those below.

    A further cell never raises the share of another.

    Args:
        weights: float64 `[cells]`, not negative; all zero counts as all equal.
        least: at most `total / cells`.

    Returns:
        float64 `[cells]` that sums to `total`.
    """
    weights = weights if weights.sum() > 0 else np.ones_like(weights)
    low = np.zeros(len(weights), dtype=bool)
    while True:
        rest = np.where(low, 0.0, weights)
        shares = np.where(low, least, rest / max(rest.sum(), TINY) * (total - least * low.sum()))
        below = ~low & (shares < least)
        if not below.any():
            return shares
        low |= below


def highest_averages(weights: np.ndarray, limit: int, total: int) -> np.ndarray:
    """Hand out exactly `total` tokens in proportion to `weights`, no cell over `limit`, by D'Hondt's method.

    Token k of a cell is worth weight / k, and the best ones are handed out (ties: the earlier cell). So what a further
    cell gets is taken from the others, and none of them ever gains: layers may be seen one after the other.

    Args:
        weights: float64 `[cells]`, not negative. Cells of weight 0 get what the others cannot use.

    Returns:
        int64 `[cells]` with sum `min(total, limit * cells)`.
    """
    total = min(total, limit * len(weights))
    counts, free = np.zeros(len(weights), dtype=np.int64), np.ones(len(weights), dtype=bool)
    worth = weights
    while free.any():  # a cell whose exact share is above the limit is full
        worth = np.where(free, weights, 0.0)
        worth = worth if worth.sum() > 0 else free.astype(np.float64)
        shares = worth / worth.sum() * (total - counts[~free].sum())
        full = free & (shares >= limit)
        counts = np.where(free, np.minimum(np.floor(shares * (1 - 1e-9)), limit), counts).astype(np.int64)
        if not full.any():
            break
        counts, free = np.where(full, limit, counts), free & ~full
    while (counts.sum()) < total:
        room = counts < limit
        rest = worth if (worth * room).sum() > 0 else room.astype(np.float64)
        counts[np.argmax(np.where(room, rest / (counts + 1), -1.0))] += 1
    return counts
