"""Allocation rules: what must hold for any scores, budgets and prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import head_budgets, kept_positions
from sparsemm_lmms.budgets import pyramid_capacities_exact, spend_exactly, visual_shares
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.retention import Retention

tables = st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31)).map(
    lambda t: (np.random.default_rng(t[3]).random((t[0], t[1] * t[2])) ** 4, t[1])
)


@given(tables)
def test_shares_sum_to_one_over_the_model(table):
    scores, kv_heads = table
    shares = visual_shares(scores, kv_heads)
    assert shares.shape == (scores.shape[0], kv_heads)
    assert shares.sum() == pytest.approx(1)


@given(tables, st.integers(33, 600), st.floats(0, 1))
def test_head_budgets_stay_near_the_budget(table, budget, ratio):
    scores, kv_heads = table
    got = head_budgets(scores, kv_heads=kv_heads, budget=budget, ratio=ratio)
    assert got.dtype == torch.int32 and got.shape == (scores.shape[0], kv_heads)
    assert got.min() >= int((budget - 32) * ratio) - 1
    assert abs(int(got.sum()) - (budget - 32) * got.numel()) <= got.numel() / 2  # half a token a head of rounding
    assert torch.equal(got, head_budgets(scores * 7.5, kv_heads=kv_heads, budget=budget, ratio=ratio))


@given(
    st.lists(st.tuples(st.floats(0, 50), st.floats(0, 10), st.integers(0, 60)), min_size=1, max_size=30),
    st.integers(0, 2000),
)
@settings(max_examples=300)
def test_spend_exactly(cells, total):
    floor, weights, limit = (np.array(column) for column in zip(*cells, strict=True))
    got = spend_exactly(floor, weights, limit, total)
    assert got.sum() == min(total, limit.sum())
    assert (got >= 0).all() and (got <= limit).all()
    if floor.sum() <= total:  # then every cell gets its floor, to the token, unless its limit is lower
        assert (got >= np.floor(np.minimum(floor, limit) + 1e-9)).all()


def test_surplus_goes_in_proportion_to_the_weights():
    got = spend_exactly(np.zeros(4), np.array([8.0, 2.0, 1.0, 0.0]), np.full(4, 50), 80)
    assert got.tolist() == [50, 20, 10, 0]
    assert spend_exactly(np.zeros(3), np.array([1.0, 0, 0]), np.full(3, 10), 16).tolist() == [10, 3, 3]


@given(st.integers(1, 40), st.integers(1, 400), st.integers(1, 900), st.integers(1, 40))
def test_exact_pyramid(layers, base, length, beta):
    got = pyramid_capacities_exact(layers, base, length, beta)
    assert got.sum() == min(base, length) * layers
    assert (got <= length).all()
    if base <= length:
        assert (np.diff(got) <= 0).all()


qk = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 90), st.integers(0, 2**31))


@given(qk, st.sampled_from(sorted(METHODS)), st.integers(5, 70), st.booleans())
@settings(max_examples=200, deadline=None)
def test_kept_positions_hold_for_any_prompt(shape, method, budget, redistribute):
    kv_heads, groups, n, seed = shape
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(kv_heads * groups, n, 8, generator=generator)
    key = torch.randn(kv_heads, n, 8, generator=generator)
    scores = np.random.default_rng(seed).random((2, kv_heads * groups))
    rows = kept_positions(
        method, query, key, budget=budget, num_layers=2, layer_idx=1, window_size=4, kernel_size=3,
        head_scores=scores if METHODS[method].needs_head_scores else None, redistribute=redistribute,
        retention=Retention.random(2, kv_heads * groups, seed), earlier=[(query, key, key)],
        value=torch.randn(kv_heads, n, 8, generator=generator),
    )  # fmt: skip
    assert len(rows) == kv_heads
    for row in rows:
        assert torch.equal(row, row.unique()) and row.min() >= 0 and row.max() < n
        assert set(range(max(n - 4, 0), n)) <= set(row.tolist())
        if n < budget or not METHODS[method].compresses:
            assert len(row) == n
    if method in ("snapkv", "local_window"):
        assert {len(row) for row in rows} == {min(budget, n)}
    if redistribute and method == "adakv":
        assert sum(map(len, rows)) == min(budget, n) * kv_heads


def test_higher_scored_heads_never_get_less():
    scores = np.arange(12.0).reshape(3, 4)
    got = head_budgets(scores, kv_heads=2, budget=256).flatten()
    assert (got.diff() >= 0).all() and got[-1] > got[0]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.zeros((2, 2)), "positive sum"),
        (np.full((2, 2), np.nan), "finite"),
        (-np.ones((2, 2)), "non-negative"),
        (np.ones(4), r"\[layers, q_heads\]"),
        (np.ones((2, 3)), "divide"),
    ],
)
def test_bad_scores(scores, message):
    with pytest.raises(ValueError, match=message):
        head_budgets(scores, kv_heads=2, budget=64)


def test_bad_study_arguments():
    query, key = torch.zeros(4, 10, 8), torch.zeros(3, 10, 8)
    with pytest.raises(ValueError, match="dividing"):
        kept_positions("snapkv", query, key, budget=64)
    with pytest.raises(ValueError, match="layer_idx=2"):
        kept_positions("snapkv", query, key[:2], budget=64, layer_idx=2)
    with pytest.raises(ValueError, match="needs head_scores"):
        kept_positions("sparsemm", query, key[:2], budget=64)
    with pytest.raises(ValueError, match="1 layers x 4 query heads"):
        kept_positions("sparsemm", query, key[:2], budget=64, head_scores=np.ones((1, 8)))
