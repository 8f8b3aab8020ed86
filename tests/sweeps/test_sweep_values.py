"""Rows of a sweep against plain sums: means over draws and documents, what was kept of what was allowed, tests."""

from __future__ import annotations

from dataclasses import replace
from math import comb
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.reports import statistics
from sparsemm_lmms.reports.statistics import Interval, blocks, bootstrap_means, sign_test
from sparsemm_lmms.reports.store import CellRecord, Sample

from .records import PROMPT, cell


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize(
    ("low", "high", "excluded"),
    [
        (0.1, 0.2, True),
        (-0.2, -0.1, True),
        (-0.1, 0.1, False),
        (0.0, 0.2, False),
        (-0.2, 0.0, False),
        (0.0, 0.0, False),
    ],
)
def test_an_interval_that_ends_at_zero_holds_it(low: float, high: float, excluded: bool) -> None:
    assert Interval((low + high) / 2, low, high).excludes_zero == excluded


@st.composite
def sweeps(draw: st.DrawFn) -> list[CellRecord]:
    """Cells of one task with two metrics: some draws of a control, documents missing here and there."""
    documents = draw(st.integers(2, 6))
    kinds = st.sampled_from([0.0, 1.0]) if draw(st.booleans()) else st.floats(0, 1, width=16)
    made = []
    for method, budget in [("fullkv", None), ("snapkv", 48), ("sparsemm", 768), ("random#0", 48), ("random#1", 48)]:
        scores = {m: draw(st.lists(kinds, min_size=documents, max_size=documents)) for m in ("acc", "anls")}
        one = cell(method, budget, {"task": scores})
        samples = []
        for sample in one.samples:
            if sample.doc_id > 1 and draw(st.booleans()):
                continue
            prompt = draw(st.none() | st.integers(1, 900))
            samples.append(
                replace(sample, prompt_tokens=prompt, kept_tokens=draw(st.none() | st.floats(1, 900, width=16)))
            )
        names = ["ttft_ms", "ttft_ms_median", "tpot_ms", "tpot_ms_median", "kept_tokens", "kv_bytes"]
        told = {name: draw(st.floats(1, 99, width=16)) for name in draw(st.lists(st.sampled_from(names), unique=True))}
        measured = {"task": told} if draw(st.booleans()) else {}
        made.append(replace(one, samples=tuple(draw(st.permutations(samples))), statistics=measured))
    return made


@mock.patch.object(statistics, "RESAMPLES", 1000)
@settings(max_examples=40, derandomize=True, deadline=None)
@given(sweeps())
def test_rows_are_plain_means(records: list[CellRecord]) -> None:
    shared = sorted(set.intersection(*({s.doc_id for s in r.samples} for r in records)))
    for block in blocks(records):
        scores = {r.method: {s.doc_id: s.scores[block.metric] for s in r.samples} for r in records}
        binary = all(scores[r.method][d] in (0, 1) for r in records for d in shared)
        single = all(scores[r.method][d] in (0, 1) for r in records for d in shared if "#" not in r.method)
        assert (block.documents, block.binary) == (len(shared), single)
        assert [row.method for row in block.rows] == ["fullkv", "sparsemm", "snapkv", "random"]
        for column, row in enumerate(block.rows):
            group = [r for r in records if r.method.partition("#")[0] == row.method]
            wanted = [mean([scores[r.method][d] for r in group]) for d in shared]
            assert row.scores is not None and row.scores.tolist() == pytest.approx(wanted)
            assert row.draws == pytest.approx([mean([scores[r.method][d] for d in shared]) for r in group])
            assert row.host == pytest.approx(mean([r.metrics["task"][block.metric] for r in group]))
            assert row.mean is not None and row.value == pytest.approx(mean(wanted))
            ends = np.quantile(block.resampled[:, column], [0.025, 0.975])
            assert (row.mean.low, row.mean.high) == pytest.approx(tuple(ends))
            check_cost(row, group)
            if row.method == "fullkv":
                assert row.difference is None and row.lost is None
                continue
            full = block.rows[0]
            assert row.difference is not None and row.difference.value == pytest.approx(row.value - full.value)
            ends = np.quantile(block.resampled[:, column] - block.resampled[:, 0], [0.025, 0.975])
            assert (row.difference.low, row.difference.high) == pytest.approx(tuple(ends))
            pairs = [[(scores["fullkv"][d], scores[r.method][d]) for d in shared] for r in group]
            if binary:
                assert row.lost == mean([p.count((1, 0)) for p in pairs])
                assert row.gained == mean([p.count((0, 1)) for p in pairs])
            else:
                assert (row.lost, row.gained) == (None, None)


def check_cost(row: object, group: list[CellRecord]) -> None:
    told = [r.statistics["task"] for r in group if "task" in r.statistics]

    def first(*names: str) -> float | None:
        found = [[t[name] for t in told if name in t] for name in names]
        return next((pytest.approx(mean(values)) for values in found if values), None)

    assert row.ttft_ms == first("ttft_ms_median", "ttft_ms")
    assert row.ms_per_token == first("tpot_ms_median", "tpot_ms")
    assert row.kept_tokens == first("kept_tokens") and row.kv_bytes == first("kv_bytes")
    assert row.prompt_tokens is None and row.kv_bytes_used is None
    kept = allowed = 0.0
    for r in group:
        for s in r.samples:
            if s.kept_tokens is not None and s.prompt_tokens is not None:
                kept += s.kept_tokens
                allowed += s.prompt_tokens if r.budget is None else min(r.budget, s.prompt_tokens)
    assert row.kept_fraction == (pytest.approx(kept / allowed) if allowed else None)


def test_a_budget_above_the_prompt_allows_the_prompt() -> None:
    [block] = blocks(
        [cell(m, b, {"t": {"m": [1.0, 0.0]}}) for m, b in [("fullkv", None), ("snapkv", 768), ("adakv", 48)]]
    )
    assert PROMPT < 768 and [row.kept_fraction for row in block.rows] == pytest.approx([0.9] * 3)
    assert [row.ttft_ms for row in block.rows] == [300.0] * 3  # only the median was measured


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 3))
def test_the_sign_test_counts_coins(won: int, lost: int, tied: int) -> None:
    n, more = won + lost, max(won, lost)
    tail = sum(comb(n, k) for k in range(more, n + 1)) / 2**n
    differences = np.array([1.0] * won + [-1.0] * lost + [0.0] * tied)
    assert sign_test(differences) == pytest.approx(min(1.0, 2 * tail))


def test_what_is_told_apart_depends_on_the_number_of_comparisons() -> None:
    """Six won and none lost: p = .03125, below .05 for one comparison and above .025 for two."""
    [block] = blocks([cell("fullkv", None, {"t": {"m": [1.0] * 6}}), cell("snapkv", 48, {"t": {"m": [0.0] * 6}})])
    full, small = block.rows
    assert [block.told_apart(full, small, n) for n in (0, 1, 2)] == [True, True, False]
    assert not block.told_apart(full, full)
    graded = [("fullkv", None, [0.9, 0.7, 0.6, 0.7]), ("snapkv", 48, [0.8, 0.7, 0.5, 0.6])]
    [block] = blocks([cell(m, b, {"t": {"m": 3 * v}}) for m, b, v in graded])
    full, small = block.rows
    change = block.resampled[:, 0] - block.resampled[:, 1]
    for n in (1, 5, 40):
        low = float(np.quantile(change, 0.025 / n))
        enough = 2 * 0.5**9 < 0.05 / n  # 9 of the 12 documents differ: as rare as 9 coins alike
        assert block.told_apart(full, small, n) == block.told_apart(small, full, n) == (low > 0 and enough) == (n < 40)
    found = block.difference(small, full)
    assert found.value == pytest.approx(-0.075) and found.high == pytest.approx(-float(np.quantile(change, 0.025)))


def test_resamples_draw_documents_for_all_columns_at_once() -> None:
    scores = np.array([[0.0, 1.0, 5.0], [1.0, 3.0, 5.0], [0.0, 1.0, 5.0]])
    means = bootstrap_means(scores)
    assert len(means) == statistics.RESAMPLES
    assert means[:, 1] == pytest.approx(1 + 2 * means[:, 0]) and means[:, 2] == pytest.approx(5)
    drawn = (3 * means[:, 0]).round().astype(int)
    shares = [(drawn == k).mean() for k in range(4)]  # one document of three, three times
    assert shares == pytest.approx([comb(3, k) * 2 ** (3 - k) / 27 for k in range(4)], abs=0.02)


def test_samples_of_other_tasks_and_failed_cells_count_nowhere() -> None:
    one = cell("snapkv", 48, {"a": {"m": [1.0, 0.0]}, "b": {"m": [0.0, 0.0]}})
    samples = [*one.samples, Sample("b", 7, {"m": 1.0}, "", "", 10, 1, 10.0)]
    found = {block.task: block for block in blocks([replace(one, samples=tuple(samples))])}
    assert [(found[t].documents, found[t].rows[0].value) for t in "ab"] == [(2, 0.5), (3, pytest.approx(1 / 3))]
    assert found["a"].rows[0].kept_fraction == pytest.approx(0.9)
    assert found["b"].rows[0].kept_fraction == pytest.approx((2 * 0.9 * 48 + 10) / (2 * 48 + 10))
