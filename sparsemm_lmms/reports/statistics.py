"""What a sweep shows, with intervals: means, paired differences from FullKV, documents flipped, tokens really kept.

All cells of a model and task answer the same documents, so one set of bootstrap resamples of these documents serves
them all, and differences between two cells are paired. Printed intervals are percentile intervals of 95 %. One of zero
width says that all documents agree, not that the value is certain. Whether two rows are told apart is decided by
`Block.told_apart`, which is corrected for the number of comparisons.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np

from sparsemm_lmms.reports.store import CellRecord

RESAMPLES, FEWEST_RESAMPLES, LEVEL = 10_000, 1_000, 0.95
METHOD_ORDER = (
    *("fullkv", "sparsemm", "snapkv", "pyramidkv", "adakv", "local_window"),
    *("random", "permuted", "layer_mean", "uniform", "mask", "mask_random"),
)
CONTROLS = ("random", "permuted", "layer_mean", "uniform", "mask_random")


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True, eq=False)
class Row:
    """One method, budget and variant on one task and metric; several draws of a control are one row.

    Attributes:
        scores: float64 `[documents]`, means over draws; None where the host scores no single document.
        draws: the value of every draw.
        host: the value that the host aggregated, mean over draws.
        mean: of `scores`, with its interval; None without them.
        difference: from FullKV, paired.
        lost, gained: documents that FullKV has right and this row wrong, and the reverse; for metrics that are 0 or 1.
            Means over draws.
        kept_fraction: tokens kept / tokens that the budget and the prompts allow.
    """

    method: str
    budget: int | None
    variant: dict[str, Any]
    host: float | None
    draws: tuple[float, ...]
    scores: np.ndarray | None = None
    mean: Interval | None = None
    difference: Interval | None = None
    lost: float | None = None
    gained: float | None = None
    prompt_tokens: float | None = None
    kept_tokens: float | None = None
    kept_fraction: float | None = None
    kv_bytes_used: float | None = None
    kv_bytes: float | None = None
    ttft_ms: float | None = None
    ms_per_token: float | None = None

    @property
    def value(self) -> float:
        """The mean of the documents' scores, or the host's aggregate where there are none."""
        if self.mean is not None:
            return self.mean.value
        assert self.host is not None  # a row has one of the two
        return self.host

    def facts(self) -> dict[str, Any]:
        """All but the scores, for JSON and CSV."""
        left_out = ("scores", "mean", "difference", "draws", "variant")
        values = {name: value for name, value in vars(self).items() if name not in left_out}
        for name, interval in (("mean", self.mean), ("difference", self.difference)):
            values |= {name: None, f"{name}_low": None, f"{name}_high": None}
            if interval is not None:
                values |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
        several = len(self.draws) > 1
        spread = {"draw_lowest": min(self.draws), "draw_highest": max(self.draws)} if several else {}
        return {**values, "variant": self.variant, "draws": len(self.draws), **spread}


@dataclass(frozen=True, eq=False)
class Block:
    """One model, task and metric.

    Attributes:
        documents: those that all cells answered.
        rows: FullKV first; variants of ablations behind the rest.
        resampled: float64 `[resamples, rows]`, means over each resample; nan where a row has no scores.
    """

    model: str
    family: str
    task: str
    metric: str
    documents: int
    rows: tuple[Row, ...]
    resampled: np.ndarray = field(repr=False)

    @property
    def fullkv(self) -> Row | None:
        return next((row for row in self.rows if row.method == "fullkv"), None)

    @property
    def scale(self) -> int:
        """100 for scores between 0 and 1, which are shown in percent."""
        scores = [row.scores for row in self.rows if row.scores is not None]
        return 100 if scores and all(s.min() >= 0 and s.max() <= 1 for s in scores) else 1

    @property
    def unit(self) -> str:
        return "%" if self.scale == 100 else ""

    def difference(self, row: Row, other: Row) -> Interval:
        """`row` - `other`, paired by document. Without document scores the interval is unbounded."""
        value = row.value - other.value
        if row.scores is None or other.scores is None:
            return Interval(value, -np.inf, np.inf)
        columns = self.resampled[:, self.rows.index(row)] - self.resampled[:, self.rows.index(other)]
        return _interval(value, columns)

    @property
    def binary(self) -> bool:
        """Whether every answer is right or wrong; a row of several draws is a mean of such answers."""
        single = [row.scores for row in self.rows if row.scores is not None and len(row.draws) == 1]
        return bool(single) and all(np.isin(scores, (0, 1)).all() for scores in single)

    def told_apart(self, row: Row, other: Row, comparisons: int = 1) -> bool:
        """Whether the documents tell two rows apart, at 5 % over all `comparisons` together (Bonferroni).

        Right-or-wrong metrics: the exact paired sign test (McNemar's exact test), because a bootstrap of few documents
        is too sure: of 4 won and none lost every resample is positive, and p = .125. Other metrics: the paired
        bootstrap interval at the corrected level.
        """
        if row.scores is None or other.scores is None:
            return False
        level = (1 - LEVEL) / max(comparisons, 1)
        if self.binary:
            return sign_test(row.scores - other.scores) < level
        columns = self.resampled[:, self.rows.index(row)] - self.resampled[:, self.rows.index(other)]
        return _interval(row.value - other.value, columns, level).excludes_zero

    def compared(self) -> list[Row]:
        """The rows of the main table: methods at budgets, variants left out."""
        return [row for row in self.rows if row.budget is not None and not row.variant]


def blocks(records: Iterable[CellRecord], seed: int = 0) -> Iterator[Block]:
    """All blocks of a sweep, by model, task and metric. Failed cells are left out; `seed` is of the resamples."""
    by_model: dict[str, list[CellRecord]] = {}
    for record in records:
        if record.error is None:
            by_model.setdefault(record.model, []).append(record)
    for model in sorted(by_model):
        for task in sorted({task for record in by_model[model] for task in record.metrics}):
            yield from _task_blocks(task, [r for r in by_model[model] if task in r.metrics], seed)


def bootstrap_means(scores: np.ndarray, seed: int = 0) -> np.ndarray:
    """Means over resampled documents.

    Args:
        scores: float64 `[documents, columns]`; columns are resampled together.

    Returns:
        float64 `[resamples, columns]`.
    """
    documents = len(scores)
    resamples = int(np.clip(40_000_000 // documents, FEWEST_RESAMPLES, RESAMPLES))  # VQAv2 has 214 354 documents
    dice, chunk = np.random.default_rng(seed), max(1, 4_000_000 // documents)
    shares = np.full(documents, 1 / documents)
    parts = [
        dice.multinomial(documents, shares, size=min(chunk, resamples - start)) @ scores / documents
        for start in range(0, resamples, chunk)
    ]
    return np.concatenate(parts)


def sign_test(differences: np.ndarray) -> float:
    """Two-sided exact sign test: how likely so uneven a split of won and lost documents is by chance. Ties drop out.

    >>> sign_test(np.array([1, 1, 1, 1, 0, 0]))
    0.125
    """
    from scipy.stats import binomtest  # half a second, which only tables need

    won, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _interval(value: float, resampled: np.ndarray, level: float = 1 - LEVEL) -> Interval:
    low, high = np.quantile(resampled, [level / 2, 1 - level / 2])
    return Interval(float(value), float(low), float(high))


def _task_blocks(task: str, records: Sequence[CellRecord], seed: int) -> Iterator[Block]:
    groups = _grouped(records)
    by_cell = {r.name: {s.doc_id: s.scores for s in r.samples if s.task == task} for r in records}
    shared = sorted(set.intersection(*(set(scores) for scores in by_cell.values())))
    metrics = sorted({metric for record in records for metric in record.metrics[task]})
    scored = [m for m in metrics if shared and all(m in by_cell[r.name][d] for r in records for d in shared)]
    table = np.array(  # [documents, metrics, groups]
        [[[fmean(by_cell[r.name][d][m] for r in g) for g in groups] for m in scored] for d in shared], dtype=np.float64
    ).reshape(len(shared), len(scored), len(groups))
    if scored:
        flat = table.reshape(len(shared), -1)
        resampled = bootstrap_means(flat, seed).reshape(-1, len(scored), len(groups))
    full = next((i for i, group in enumerate(groups) if group[0].method == "fullkv"), None)
    for metric in metrics:
        rows = []
        index = scored.index(metric) if metric in scored else None
        of_cell = (
            {} if index is None else {r.name: np.array([by_cell[r.name][d][metric] for d in shared]) for r in records}
        )
        binary = all(np.isin(scores, (0, 1)).all() for scores in of_cell.values())
        for column, group in enumerate(groups):
            hosts = [r.metrics[task][metric] for r in group if metric in r.metrics[task]]
            values: dict[str, Any] = {"host": fmean(hosts) if hosts else None}
            if index is None:
                if not hosts:
                    continue
                values["draws"] = tuple(hosts)
            else:
                scores, means = table[:, index, column], resampled[:, index, :]
                each = [of_cell[r.name] for r in group]
                values |= {"scores": scores, "draws": tuple(float(s.mean()) for s in each)}
                values["mean"] = _interval(scores.mean(), means[:, column])
                if full is not None and full != column:
                    base = table[:, index, full]
                    change = means[:, column] - means[:, full]
                    values["difference"] = _interval(scores.mean() - base.mean(), change)
                    values |= _flips(base, each) if binary else {}
            first = group[0]
            rows.append(Row(base_method(first.method), first.budget, first.variant, **values, **_cost(task, group)))
        means = resampled[:, index, :] if index is not None else np.full((1, len(rows)), np.nan)
        first = records[0]
        yield Block(first.model, first.family, task, metric, len(shared), tuple(rows), means)


def base_method(method: str) -> str:
    """The method without the number of its draw.

    >>> base_method("random#3")
    'random'
    """
    return method.partition("#")[0]


def _grouped(records: Sequence[CellRecord]) -> list[list[CellRecord]]:
    """Cells that are draws of one row, in the order of tables. `random` and `random#0` are the same draw."""
    groups: dict[tuple[Any, ...], dict[str, CellRecord]] = {}
    for record in records:
        method = base_method(record.method)
        place = METHOD_ORDER.index(method) if method in METHOD_ORDER else len(METHOD_ORDER)
        variant = tuple(sorted(record.variant.items()))
        key = (bool(variant), place, method, variant, record.budget or 0)
        groups.setdefault(key, {}).setdefault(json.dumps(record.settings, sort_keys=True), record)
    return [list(groups[key].values()) for key in sorted(groups)]


def _flips(base: np.ndarray, each: Sequence[np.ndarray]) -> dict[str, float]:
    return {
        "lost": fmean(float(((base == 1) & (scores == 0)).sum()) for scores in each),
        "gained": fmean(float(((base == 0) & (scores == 1)).sum()) for scores in each),
    }


def _cost(task: str, group: Sequence[CellRecord]) -> dict[str, Any]:
    measured = [record.statistics[task] for record in group if task in record.statistics]

    def mean(*names: str) -> float | None:
        """Of the first of these names that was measured."""
        for name in names:
            if values := [values[name] for values in measured if name in values]:
                return fmean(values)
        return None

    kept = allowed = 0.0
    for record in group:
        for sample in record.samples:
            if sample.task == task and sample.kept_tokens is not None and sample.prompt_tokens is not None:
                kept += sample.kept_tokens
                allowed += min(record.budget or sample.prompt_tokens, sample.prompt_tokens)
    return {
        "prompt_tokens": mean("prompt_tokens"),
        "kept_tokens": mean("kept_tokens"),
        "kept_fraction": kept / allowed if allowed else None,
        "kv_bytes_used": mean("kv_bytes_used"),
        "kv_bytes": mean("kv_bytes"),
        "ttft_ms": mean("ttft_ms_median", "ttft_ms"),
        "ms_per_token": mean("tpot_ms_median", "tpot_ms"),
    }
