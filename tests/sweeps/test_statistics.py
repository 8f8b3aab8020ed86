"""Paired statistics against values worked out by hand, and laws that any bootstrap obeys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.reports import statistics, tables
from sparsemm_lmms.reports.statistics import Block, Row, blocks

from .records import cell

FULL = [1.0, 1.0, 1.0, 1.0, 0.0]
scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


def one(*cells: object) -> Block:
    [block] = blocks(cells)  # type: ignore[arg-type]
    return block


def row(block: Block, method: str) -> Row:
    return next(row for row in block.rows if row.method == method)


def test_flips_and_differences_by_hand() -> None:
    block = one(
        cell("sparsemm", 48, {"vqa": {"exact_match": [1.0, 0.0, 0.0, 1.0, 1.0]}}),
        cell("fullkv", None, {"vqa": {"exact_match": FULL}}),
    )
    assert [r.method for r in block.rows] == ["fullkv", "sparsemm"] and block.documents == 5 and block.unit == "%"
    found = row(block, "sparsemm")
    assert (found.lost, found.gained) == (2, 1)
    assert found.mean is not None and found.mean.value == pytest.approx(0.6)
    assert found.difference is not None and found.difference.value == pytest.approx(-0.2)
    assert found.difference.low == pytest.approx(-0.8) and found.difference.high == pytest.approx(0.4)
    assert found.kept_fraction == pytest.approx(0.9) and found.kept_tokens == pytest.approx(0.9 * 48)
    full = row(block, "fullkv")
    assert full.difference is None and full.lost is None


def test_flips_are_of_metrics_that_are_right_or_wrong() -> None:
    """A column of ones does not make character accuracy such a metric."""
    texts = [("fullkv", None, [1.0, 1.0]), ("sparsemm", 768, [1.0, 1.0]), ("snapkv", 48, [1.0, 0.4])]
    block = one(*(cell(method, budget, {"t": {"m": values}}) for method, budget, values in texts))
    assert all(row.lost is None for row in block.rows)


def test_pairing_narrows_the_interval() -> None:
    """The same document is harder for both: the difference is certain although both means are not."""
    hard = np.linspace(0, 0.9, 20)
    block = one(
        cell("fullkv", None, {"t": {"anls": list(hard + 0.1)}}), cell("snapkv", 64, {"t": {"anls": list(hard)}})
    )
    found = row(block, "snapkv")
    assert found.mean is not None and found.mean.high - found.mean.low > 0.2
    assert found.difference is not None and found.difference.low == pytest.approx(-0.1)
    assert found.difference.high == pytest.approx(-0.1) and found.lost is None


def test_a_tie_is_no_defeat() -> None:
    cells = [cell(name, 48, {"t": {"m": list(v)}}) for name, v in (("sparsemm", FULL), ("adakv", FULL[::-1]))]
    block = one(cell("fullkv", None, {"t": {"m": FULL}}), *cells)
    told = ["best: 48 sparsemm and adakv", "as good as the best other row at 48 (adakv)"]
    assert tables.sentences(block)[:2] == told
    assert [line[1].count("**") for line in tables.accuracy(block).rows] == [0, 2, 2]


def test_draws_are_one_row() -> None:
    draws = [cell(f"random#{i}", 48, {"t": {"m": values}}) for i, values in enumerate(([1.0, 0.0], [0.0, 0.0]))]
    again = replace(cell("random", 48, {"t": {"m": [1.0, 0.0]}}), settings=draws[0].settings)
    block = one(cell("fullkv", None, {"t": {"m": [1.0, 1.0]}}), again, *draws)
    found = row(block, "random")
    assert found.draws == (0.5, 0.0) and found.value == 0.25  # `random` is the draw `random#0`, counted once
    assert found.lost == 1.5 and found.scores is not None and found.scores.tolist() == [0.5, 0.0]
    grid = tables.spread(block)
    assert grid is not None and grid.rows[0] == ["*random* (2 draws)", "25.0 (0.0 to 50.0)"]
    assert tables.draws_text([replace(found, budget=96, draws=(1.0,)), found]) == "2 draws at 48"
    assert tables.draws_text([replace(found, budget=None, draws=(1.0,)), found]) == "up to 2 draws"


def test_what_only_the_host_scores_has_no_interval() -> None:
    made = cell("fullkv", None, {"caps": {"CIDEr": [0.0, 0.0]}})
    samples = tuple(replace(sample, scores={}) for sample in made.samples)
    full = replace(made, metrics={"caps": {"CIDEr": 1.2}}, samples=samples)
    other = replace(full, name="b", method="sparsemm", budget=48, metrics={"caps": {"CIDEr": 0.9}})
    block = one(full, other)
    assert [(r.value, r.mean, r.difference) for r in block.rows] == [(1.2, None, None), (0.9, None, None)]
    assert not block.difference(*block.rows).excludes_zero and block.scale == 1
    assert tables.accuracy(block).rows[1][1] == "**0.9**"


def test_documents_that_all_cells_share() -> None:
    block = one(cell("fullkv", None, {"t": {"m": FULL}}), cell("snapkv", 48, {"t": {"m": [1.0, 0.0]}}))
    assert block.documents == 2 and row(block, "fullkv").value == 1


def test_failed_cells_are_left_out() -> None:
    good = cell("fullkv", None, {"t": {"m": FULL}})
    assert one(good, replace(good, name="bad", method="adakv", metrics={}, error="out of memory")).rows[0].value == 0.8


def test_sentences_name_where_sparsemm_is_not_best() -> None:
    dice = np.random.default_rng(1)
    base = dice.random(40) * 0.2
    cells = [cell("fullkv", None, {"t": {"m": list(base + 0.8)}})]
    for budget, gap in ((48, 0.3), (96, -0.3), (160, 0.0), (256, 0.001)):
        noise = dice.normal(0, 0.1, 40) if budget == 256 else 0
        cells.append(cell("snapkv", budget, {"t": {"m": list(np.clip(base + 0.4 + noise, 0, 1))}}))
        cells.append(cell("sparsemm", budget, {"t": {"m": list(base + 0.4 + gap)}}))
    block = one(*cells)
    told = tables.sentences(block)
    assert "sparsemm is best, told apart from the next at 48 (+30.0)" in told
    assert "**worse than the best** at 96 (snapkv, -30.0)" in told
    assert "all rows answer alike at 160" in told
    assert any("not distinguishable" in line and "256" in line for line in told)
    assert "sparsemm is not distinguishable from fullkv at 96" not in told and len(told) == 5
    every = "(told apart from all others)"
    assert told[0] == f"best: 48 sparsemm {every}; 96 snapkv {every}; 256 sparsemm (≈ snapkv)"
    lines = {line[0]: line[1:] for line in tables.accuracy(block).rows}
    marks = {name: [(text[:2] == "**", text[-1] == "≈") for text in lines[name]] for name in ("sparsemm", "snapkv")}
    assert marks["sparsemm"] == [(True, False), (False, False), (True, False), (True, False)]
    assert marks["snapkv"] == [(False, False), (True, False), (True, False), (False, True)]


def test_marks_of_a_column_by_hand() -> None:
    """12 right-or-wrong answers; five rows, so 4 comparisons: p < .0125 needs 8 documents won and none lost."""
    right = {"sparsemm": 12, "snapkv": 12, "adakv": 5, "bacon": 4, "keydiff": 0}
    cells = [cell(m, 48, {"t": {"m": [1.0] * n + [0.0] * (12 - n)}}) for m, n in right.items()]
    block = one(*cells)
    column = block.columns[48]
    assert {row.method for row in column.best} == {"sparsemm", "snapkv"}
    assert [row.method for row in column.near] == ["adakv"]
    assert tables.accuracy(block).csv().count("≈") == 0
    assert "at least 8 of the 12 documents" in tables.note(block) and "over the 4 comparisons" in tables.note(block)
    few = one(*(cell(m, 48, {"t": {"m": [v] * 4}}) for m, v in (("sparsemm", 0.9), ("snapkv", 0.1))))
    assert [row.method for row in few.columns[48].near] == ["snapkv"]  # every resample agrees, but 4 documents are few
    assert "6 documents would have to differ, so these 4" in tables.note(few)


def test_the_order_of_tables() -> None:
    names = ["bacon+waterfill", "sparsemm_bacon@permuted", "permuted", "bacon", "random", "fullkv", "mask", "sparsemm"]
    told = ["fullkv", "sparsemm", "bacon", "bacon+waterfill", "random", "permuted", "sparsemm_bacon@permuted", "mask"]
    assert sorted(names, key=statistics.place) == told


@settings(max_examples=25, deadline=None)
@given(scores)
def test_an_interval_contains_its_mean(values: list[float]) -> None:
    found = row(one(cell("fullkv", None, {"t": {"m": values}})), "fullkv").mean
    assert found is not None and found.low <= found.value + 1e-9 and found.value <= found.high + 1e-9
    assert min(values) - 1e-9 <= found.low and found.high <= max(values) + 1e-9


@settings(max_examples=10, deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_order_of_records_and_documents_does_not_matter(dice: object) -> None:
    cells = [cell("fullkv", None, {"t": {"m": FULL}}), cell("snapkv", 48, {"t": {"m": FULL[::-1]}})]
    shuffled = [replace(c, samples=tuple(dice.sample(c.samples, len(c.samples)))) for c in cells]  # type: ignore
    dice.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [r.facts() for r in one(*cells).rows] == [r.facts() for r in one(*shuffled).rows]


def test_the_bootstrap_is_seeded_and_right() -> None:
    column = np.random.default_rng(3).normal(size=(400, 1))
    means = statistics.bootstrap_means(column)
    assert (means == statistics.bootstrap_means(column)).all() and (
        means != statistics.bootstrap_means(column, 1)
    ).any()
    assert means.shape == (statistics.RESAMPLES, 1)
    assert means.std() == pytest.approx(column.std() / 20, rel=0.03)  # standard error of a mean of 400
