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
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from sparsemm_lmms.presets import METHODS
from sparsemm_lmms.reports.names import WORDS, split_name, without_draw
from sparsemm_lmms.reports.store import CellRecord

RESAMPLES, FEWEST_RESAMPLES, LEVEL = 10_000, 1_000, 0.95
TIE = 1e-9  # means of the same scores in another order
QUIET = 0.25
"""Cores that other work may keep busy on average during a run whose milliseconds are shown."""


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
        other_cores: cores that other work kept busy meanwhile; None where nobody looked.
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
    other_cores: float | None = None

    @property
    def is_control(self) -> bool:
        return split_name(self.method).is_control

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
class Column:
    """One budget of the main table.

    Attributes:
        rows: all of them.
        best: the row with the largest value, and those that share it.
        near: the others that the documents do not tell apart from a best row, corrected for all rows of the column.
    """

    rows: tuple[Row, ...]
    best: tuple[Row, ...]
    near: tuple[Row, ...]


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

    @cached_property
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

    @cached_property
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
        differences = row.scores - other.scores
        if self.binary:
            return sign_test(differences) < level
        if np.count_nonzero(np.abs(differences) > TIE) < fewest_documents(comparisons):
            return False
        columns = self.resampled[:, self.rows.index(row)] - self.resampled[:, self.rows.index(other)]
        return _interval(row.value - other.value, columns, level).excludes_zero

    def compared(self) -> list[Row]:
        """The rows of the main table: methods at budgets, variants left out."""
        return [row for row in self.rows if row.budget is not None and not row.variant]

    @cached_property
    def columns(self) -> dict[int, Column]:
        """The columns of the main table by their budgets."""
        return {budget: self._column(budget) for budget in sorted({row.budget or 0 for row in self.compared()})}

    def _column(self, budget: int) -> Column:
        rows = tuple(row for row in self.compared() if row.budget == budget)
        top = max(row.value for row in rows)
        best = tuple(row for row in rows if row.value > top - TIE)
        others = [row for row in rows if row not in best]
        near = [row for row in others if not all(self.told_apart(row, one, len(rows) - 1) for one in best)]
        return Column(rows, best, tuple(near))

    def all_alike(self, budget: int | None) -> bool:
        """Whether all rows at a budget have the same score on every document."""
        scores = [row.scores for row in self.compared() if row.budget == budget]
        return all(s is not None and scores[0] is not None and (s == scores[0]).all() for s in scores)

    @property
    def is_quiet(self) -> bool:
        """Whether the milliseconds of all rows were taken while next to nothing else ran."""
        timed = [row for row in self.rows if row.ms_per_token is not None]
        return bool(timed) and all(row.other_cores is not None and row.other_cores < QUIET for row in timed)


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


def fewest_documents(comparisons: int = 1) -> int:
    """How many documents must differ, all in favour of one row, before a sign test can tell two rows apart.

    >>> fewest_documents(), fewest_documents(19)
    (6, 10)
    """
    level = (1 - LEVEL) / max(comparisons, 1)
    return int(np.floor(1 - np.log2(level))) + 1


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
            rows.append(Row(without_draw(first.method), first.budget, first.variant, **values, **_cost(task, group)))
        means = resampled[:, index, :] if index is not None else np.full((1, len(rows)), np.nan)
        first = records[0]
        yield Block(first.model, first.family, task, metric, len(shared), tuple(rows), means)


def place(method: str) -> tuple[int, int, int, str]:
    """Where a method stands in tables: presets in their order, then pairs, then controls, those of sparsemm first."""
    name, order = split_name(method), list(METHODS)
    late = 2 * (name.of == "mask") + name.is_control
    known = order.index(name.of) if name.of in order else len(order)
    word = WORDS.index(name.word) if name.is_control else 0
    return (-1 if method == "fullkv" else late, known, word, method)


def _grouped(records: Sequence[CellRecord]) -> list[list[CellRecord]]:
    """Cells that are draws of one row, in the order of tables. `random` and `random#0` are the same draw."""
    groups: dict[tuple[Any, ...], dict[str, CellRecord]] = {}
    for record in records:
        method = without_draw(record.method)
        variant = tuple(sorted(record.variant.items()))
        key = (bool(variant), place(method), variant, record.budget or 0)
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
        "other_cores": mean("other_cores"),
    }
