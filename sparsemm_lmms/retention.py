"""Retention: how much of the attention of later answer tokens a kv head still holds, by the number of tokens it keeps.

`sparsemm-lmms chase` measures the curves on calibration images; they lie in the provenance beside a score file, and the
allocator `waterfill` spends by them. NumPy only, neither torch nor transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

MEND = "measure them with `sparsemm-lmms chase --overwrite`"


@dataclass(frozen=True, eq=False)
class Retention:
    """A curve for each kv head, linear between its points and flat behind the last.

    Attributes:
        counts: float64 `[points]`, tokens kept outside the window: ascending from 0.
        held: float64 `[layers, kv_heads, points]`, share of an answer token's attention, between 0 and 1, that falls on
            those tokens; or of query heads, see `of_groups`.

    Raises:
        ValueError: for anything else.
    """

    counts: np.ndarray
    held: np.ndarray

    def __post_init__(self) -> None:
        counts, held = np.array(self.counts, dtype=np.float64), np.array(self.held, dtype=np.float64)
        if counts.ndim != 1 or held.ndim != 3 or held.shape[2] != len(counts) or not held.size:
            raise ValueError(
                f"retention curves have counts {list(counts.shape)} and held {list(held.shape)}, not [points] and "
                f"[layers, kv_heads, points]; {MEND}."
            )
        if len(counts) < 2 or counts[0] != 0 or not (np.diff(counts) > 0).all() or not np.isfinite(counts).all():
            raise ValueError(f"the counts of retention curves do not ascend from 0; {MEND}.")
        if not ((held >= 0) & (held <= 1 + 1e-6)).all():
            raise ValueError(f"retention curves hold a share of attention outside 0..1; {MEND}.")
        for table in (counts, held):
            table.setflags(write=False)
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "held", held)

    @classmethod
    def of(cls, provenance: Mapping[str, Any]) -> Retention | None:
        """The curves in the provenance of head scores; None where none were measured."""
        facts = provenance.get("retention")
        if facts is None:
            return None
        if not isinstance(facts, Mapping) or not {"counts", "held"} <= facts.keys():
            raise ValueError(f"the retention curves beside the head scores lack counts or held; {MEND}.")
        try:
            counts, held = (np.array(facts[name], dtype=np.float64) for name in ("counts", "held"))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the retention curves beside the head scores are no numbers ({error}); {MEND}.") from None
        return cls(counts, held)

    def facts(self) -> dict[str, Any]:
        """What `of` reads, for a JSON file: six digits."""
        return {"counts": self.counts.tolist(), "held": np.round(self.held, 6).tolist()}

    @classmethod
    def uniform(cls, layers: int, heads: int) -> Retention:
        """The same curve for every head."""
        return cls(*_saturating(np.full((layers, heads), 0.5), np.full((layers, heads), 128.0)))

    @classmethod
    def random(cls, layers: int, heads: int, seed: int = 0) -> Retention:
        """Drawn curves `m (1 - exp(-k / t))`: m evenly from 0..1, t from 8..2048, evenly in its logarithm."""
        dice = np.random.default_rng(seed)
        return cls(*_saturating(dice.random((layers, heads)), 2 ** dice.uniform(3, 11, (layers, heads))))

    def of_groups(self, kv_heads: int) -> Retention:
        """Curves of kv heads: the means of their query heads' where there are more."""
        layers, heads, points = self.held.shape
        if heads == kv_heads or heads % kv_heads:
            return self
        return Retention(self.counts, self.held.reshape(layers, kv_heads, -1, points).mean(2))

    def layer_mean(self) -> Retention:
        """Each head gets the mean of its layer's curves."""
        mean = self.held.mean(axis=1, keepdims=True)
        return Retention(self.counts, np.broadcast_to(mean, self.held.shape))

    def permuted(self, seed: int = 0) -> Retention:
        """The same curves dealt to other heads of the whole model."""
        flat = np.random.default_rng(seed).permutation(self.held.reshape(-1, len(self.counts)))
        return Retention(self.counts, flat.reshape(self.held.shape))

    @cached_property
    def segments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The straight pieces of every head's concave hull, the steepest first: head (of the flat table), from, to."""
        rows = []
        for head, curve in enumerate(self.held.reshape(-1, len(self.counts))):
            corners = _hull(self.counts, curve)
            rows += [
                (head, a, b, (curve[j] - curve[i]) / (b - a))
                for i, j in zip(corners, corners[1:], strict=False)
                for a, b in [(self.counts[i], self.counts[j])]
            ]
        table = np.array(rows)
        table = table[np.argsort(-table[:, 3], kind="stable")]
        return table[:, 0].astype(np.int64), table[:, 1], table[:, 2]

    def fill(self, total: float, most: float) -> np.ndarray:
        """Hand out `total` tokens so that the concave hulls of the curves hold the largest mass.

        Steepest pieces first, which is optimal for concave curves. What no curve can use (`total` beyond the last
        points) is not handed out.

        Args:
            most: tokens that a head has outside the window.

        Returns:
            float64 `[layers, kv_heads]`.
        """
        head, start, end = self.segments
        width = np.minimum(end, most) - np.minimum(start, most)
        before = np.cumsum(width) - width
        taken = np.clip(total - before, 0, width)
        shape = self.held.shape[:2]
        return np.bincount(head, weights=taken, minlength=shape[0] * shape[1]).reshape(shape)


def _saturating(mass: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points of the curves `mass (1 - exp(-k / scale))`; mass, scale: `[layers, heads]`."""
    counts = np.array([0, *2.0 ** np.arange(16)])
    return counts, mass[..., None] * (1 - np.exp(-counts / scale[..., None]))


def _hull(x: np.ndarray, y: np.ndarray) -> list[int]:
    """Indices of the corners of the upper concave hull of the points (x ascending)."""
    corners = [0]
    for i in range(1, len(x)):
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            if (y[b] - y[a]) * (x[i] - x[b]) > (y[i] - y[b]) * (x[b] - x[a]):
                break
            corners.pop()
        corners.append(i)
    return corners
