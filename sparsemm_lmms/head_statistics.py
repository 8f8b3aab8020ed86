"""Numbers about head-score tables: how concentrated they are and how well two of them agree. NumPy only."""

from __future__ import annotations

import itertools
from typing import Any

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


def heads_holding(values: np.ndarray, share: float = 0.5) -> int:
    """How many of the best heads it takes to hold ``share`` of the total score.

    >>> heads_holding(np.array([[4.0, 3.0], [2.0, 1.0]]), 0.5)
    2
    """
    ordered = np.sort(values, axis=None)[::-1].cumsum()
    return int(np.searchsorted(ordered, share * ordered[-1] * (1 - 1e-12)) + 1)


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Rank correlation of two tables and overlap of their best heads."""
    return {
        "spearman": round(spearman(a, b), 6),
        "top_5_percent_overlap": round(top_overlap(a, b, 0.05), 6),
        "top_10_percent_overlap": round(top_overlap(a, b, 0.10), 6),
    }


def split_half(tables: np.ndarray) -> dict[str, float] | None:
    """Agreement of the even and the odd samples' means: what a second run on other images would look like.

    tables: float64 ``[samples, layers, q_heads]``. None for fewer than four samples or a half without any hit.
    """
    if len(tables) < 4:
        return None
    even, odd = tables[::2].mean(axis=0), tables[1::2].mean(axis=0)
    return agreement(even, odd) if even.any() and odd.any() else None


def group_agreement(tables: np.ndarray, size: int = 50) -> dict[str, float] | None:
    """How well disjoint groups of ``size`` samples agree, over all pairs of them: are so many images enough?

    tables: as for ``split_half``. None for fewer than two full groups or a group without any hit.
    """
    groups = [tables[start : start + size].mean(axis=0) for start in range(0, len(tables) - size + 1, size)]
    if len(groups) < 2 or not all(group.any() for group in groups):
        return None
    pairs = [agreement(a, b) for a, b in itertools.combinations(groups, 2)]
    facts: dict[str, float] = {"size": size, "groups": len(groups)}
    for key in ("spearman", "top_10_percent_overlap"):
        found = [pair[key] for pair in pairs]
        facts[f"{key}_mean"], facts[f"{key}_least"] = round(float(np.mean(found)), 6), min(found)
    return facts


def per_image_facts(tables: np.ndarray) -> dict[str, Any]:
    """What only single images tell, for the provenance: ``split_half`` and, with 100 images, ``group_agreement``."""
    return {"split_half": split_half(tables), "groups_of_50": group_agreement(tables, 50)}
