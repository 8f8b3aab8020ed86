"""Numbers about head-score tables: how concentrated they are and how well two of them agree. NumPy only."""

from __future__ import annotations

import numpy as np


def top_count(size: int, share: float) -> int:
    """How many heads "the top 5 %" are: rounded, at least one (51 of 1024)."""
    return max(1, round(share * size))


def top_share(values: np.ndarray, share: float = 0.05) -> float:
    """Part of the total score that the best ``share`` of the heads hold.

    >>> top_share(np.array([[8.0, 1.0], [1.0, 0.0]]), 0.25)
    0.8
    """
    ordered = np.sort(values, axis=None)[::-1]
    return float(ordered[: top_count(ordered.size, share)].sum() / ordered.sum())


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, float64 [n]; equal values share their mean rank.

    >>> ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [1.5, 0.0, 1.5]
    """
    flat = values.reshape(-1)
    _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    return (last - (counts + 1) / 2)[inverse]


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Rank correlation of two tables of one shape; nan when one of them is constant."""
    if a.shape != b.shape:
        raise ValueError(f"Rank correlation needs tables of one shape, got {a.shape} and {b.shape}.")
    x, y = (r - r.mean() for r in (ranks(a), ranks(b)))
    norm = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / norm) if norm else float("nan")


def top_overlap(a: np.ndarray, b: np.ndarray, share: float = 0.05) -> float:
    """Part of a's best ``share`` of heads that are among b's as well.

    >>> top_overlap(np.array([3.0, 2.0, 1.0, 0.0]), np.array([3.0, 0.0, 2.0, 1.0]), 0.5)
    0.5
    """
    if a.shape != b.shape:
        raise ValueError(f"Overlap needs tables of one shape, got {a.shape} and {b.shape}.")
    count = top_count(a.size, share)
    best = [set(np.argsort(-table.reshape(-1), kind="stable")[:count].tolist()) for table in (a, b)]
    return len(best[0] & best[1]) / count


def split_half(tables: np.ndarray) -> dict[str, float] | None:
    """Agreement of the even and the odd samples' means: what a second run on other images would look like.

    tables: float64 ``[samples, layers, q_heads]``. None for fewer than four samples or a half without any hit.
    """
    if len(tables) < 4:
        return None
    even, odd = tables[::2].mean(axis=0), tables[1::2].mean(axis=0)
    if not even.any() or not odd.any():
        return None
    return {
        "spearman": round(spearman(even, odd), 6),
        "top_5_percent_overlap": round(top_overlap(even, odd, 0.05), 6),
        "top_10_percent_overlap": round(top_overlap(even, odd, 0.10), 6),
    }
