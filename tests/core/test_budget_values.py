"""Allocation rules against exact fractions (see `slow.py`), at the places where rounding and clamping decide."""

from __future__ import annotations

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig, head_budgets
from sparsemm_lmms.budgets import pyramid_capacities_exact, pyramid_capacity, spend_exactly, visual_shares
from sparsemm_lmms.methods import LayerPrompt, Model
from sparsemm_lmms.selection import build_method

from . import slow

CLOSE = Fraction(1, 10**6)  # the fractions of `spend_exactly` are float64


def assert_settled(got: np.ndarray, exact: list[Fraction], total: int) -> None:
    """`got` is `exact` with its fractions settled by largest remainder."""
    flat = got.ravel().tolist()
    assert sum(flat) == total
    assert all(floor(x + CLOSE) <= n <= ceil(x - CLOSE) or abs(n - x) < CLOSE for n, x in zip(flat, exact, strict=True))
    up = [x - floor(x + CLOSE) for n, x in zip(flat, exact, strict=True) if n > x + CLOSE]
    down = [x - floor(x + CLOSE) for n, x in zip(flat, exact, strict=True) if n < x - CLOSE]
    assert not up or not down or min(up) >= max(down) - CLOSE


def test_halves_round_to_even() -> None:
    """Shares of 1/8, 3/8, 4/8 of a pool of 20: 2.5, 7.5 and 10."""
    table = np.array([[1.0, 3.0, 4.0, 0.0]])
    assert head_budgets(table, kv_heads=4, budget=37, ratio=0.0).tolist() == [[2, 8, 10, 0]]
    assert head_budgets(table, kv_heads=4, budget=39, ratio=0.0).tolist() == [[4, 10, 14, 0]]  # 3.5, 10.5, 14


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_sparsemm_is_the_rounded_fraction(data: st.DataObject) -> None:
    layers, kv_heads, group = (data.draw(st.integers(1, most)) for most in (4, 4, 3))
    parts = data.draw(
        st.lists(st.integers(0, 9), min_size=layers * kv_heads * group, max_size=layers * kv_heads * group)
    )
    whole = 1 << max(sum(parts), 1).bit_length()
    parts[0] += whole - sum(parts)  # shares are halves of halves, so that float64 holds them exactly
    table = np.array(parts, dtype=np.float64).reshape(layers, -1)
    base, ratio = data.draw(st.integers(1, 60)), data.draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.99, 1.0]))
    got = head_budgets(table, kv_heads=kv_heads, budget=base + 7, window_size=7, ratio=ratio)
    assert got.tolist() == slow.sparsemm(table, kv_heads, base, ratio)
    shares = visual_shares(table, kv_heads)
    assert shares.tolist() == (table.reshape(layers, kv_heads, group).sum(-1) / whole).tolist()


@settings(max_examples=150, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 30)), min_size=1, max_size=8),
    st.integers(0, 150),
)
def test_spending_is_one_level_for_all(cells: list[tuple[int, int, int]], total: int) -> None:
    floors, weights, limits = (list(column) for column in zip(*cells, strict=True))
    halves = [Fraction(f, 4) for f in floors]
    got = spend_exactly(np.array(halves, dtype=float), np.array(weights, dtype=float), np.array(limits), total)
    assert_settled(got, slow.spend(halves, weights, limits, total), min(total, sum(limits)))


def test_a_floor_above_the_total_is_scaled_down() -> None:
    assert spend_exactly(np.array([6.0, 3.0, 3.0]), np.array([0.0, 0.0, 9.0]), np.full(3, 50), 4).tolist() == [2, 1, 1]


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(1, 90), st.integers(1, 30))
def test_pyramid_of_short_and_long_prompts(layers: int, base: int, length: int, beta: int) -> None:
    low, high = slow.pyramid_ends(base, length, beta)
    published = [pyramid_capacity(i, layers, base, length, beta) for i in range(layers)]
    assert published == [high - i * ((high - low) // (layers - 1)) for i in range(layers)]
    line = [Fraction(high) + Fraction(low - high) * i / (layers - 1) for i in range(layers)]
    exact = slow.spend([Fraction(0)] * layers, [max(x, Fraction(0)) for x in line], [length] * layers, base * layers)
    assert_settled(pyramid_capacities_exact(layers, base, length, beta), exact, min(base, length) * layers)
    assert pyramid_capacity(0, 1, base, length, beta) == base
    assert pyramid_capacities_exact(1, base, length, beta).tolist() == [min(base, length)]


def test_pyramid_whose_shallowest_layer_keeps_all() -> None:
    assert pyramid_capacities_exact(3, base=5, length=7, beta=20).tolist() == [7, 5, 3]
    assert [pyramid_capacity(i, 3, 5, 7, 20) for i in range(3)] == [7, 5, 3]
    assert [pyramid_capacity(i, 3, 5, 100, 20) for i in range(3)] == [10, 5, 0]
    assert [pyramid_capacity(i, 3, 5, 100, 2) for i in range(3)] == [8, 5, 2]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.data())
def test_adakv_counts_the_tokens_that_each_head_wins(data: st.DataObject) -> None:
    """Batches whose sequences differ in length, budgets below and above it, with ties and heads without mass."""
    heads, columns = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    base = data.draw(st.integers(1, 4) | st.integers(1, 12))
    lengths = [
        max(columns - less, 0) for less in data.draw(st.lists(st.integers(0, 3) | st.integers(0, 9), max_size=2))
    ]
    lengths.insert(0, columns)  # the longest has no padding
    ratio, normalize = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0])), data.draw(st.booleans())
    kinds = st.sampled_from([0.0, 0.125, 0.25, 0.3, 0.7])
    table = torch.tensor(
        data.draw(st.lists(kinds, min_size=len(lengths) * heads * columns, max_size=len(lengths) * heads * columns))
    ).view(len(lengths), heads, columns)
    for b, length in enumerate(lengths):
        table[b, :, : columns - length] = float("-inf")
    for redistribute in (False, True):
        config = CompressionConfig(
            method="adakv", budget=base + 4, window_size=4, floor_ratio=ratio, normalize=normalize,
            redistribute=redistribute,
        )  # fmt: skip
        method = build_method(config, Model(2, heads, heads))
        got = method.counts(LayerPrompt(1, table, tuple(lengths)))
        for b, length in enumerate(lengths):
            won = slow.tokens_won(table[b].tolist(), min(base, columns), normalize)
            if redistribute:
                floors = [Fraction(base * ratio)] * heads
                exact = slow.spend(floors, won, [length] * heads, min(base, length) * heads)
                assert_settled(got[b], exact, min(base, length) * heads)
            else:
                wanted = slow.capacities(config, method.model, None, 1, table[b].tolist(), length)
                assert got[b].tolist() == wanted


def test_the_floor_of_adakv_protects_the_losers() -> None:
    scores = torch.tensor([[[0.9] * 12, [0.1] * 12]])
    for redistribute, ratio, wanted in [(True, 0.5, [8, 2]), (True, 0.0, [10, 0]), (False, 0.5, [7, 2])]:
        config = CompressionConfig(
            method="adakv", budget=9, window_size=4, floor_ratio=ratio, redistribute=redistribute, normalize=False
        )
        found = build_method(config, Model(1, 2, 2)).counts(LayerPrompt(0, scores, (12,))).tolist()
        assert found == [wanted], (redistribute, ratio)


def test_a_head_of_adakv_is_weighed_by_what_its_best_tokens_hold() -> None:
    """Of the first head two tokens hold a third of the mass, of the second all of it, whatever the padding."""
    scores = torch.tensor([[[0.4] * 6, [0.2, 0.2, 0, 0, 0, 0]]])
    for rows, normalize, wanted in [
        (scores, True, [2, 2]),
        (torch.nn.functional.pad(scores, (3, 0), value=float("-inf")), True, [2, 2]),
        (scores, False, [4, 0]),
    ]:
        config = CompressionConfig(method="adakv", budget=6, window_size=4, floor_ratio=0.0, normalize=normalize)
        found = build_method(config, Model(1, 2, 2)).counts(LayerPrompt(0, rows, (6,)))
        assert found.tolist() == [wanted]


def test_skipped_layers_of_adakv_share_nothing() -> None:
    scores = torch.tensor([[[0.9] * 12, [0.1] * 12]])
    config = CompressionConfig(method="adakv", budget=9, window_size=4, floor_ratio=0.0, skip=2, normalize=False)
    method = build_method(config, Model(3, 2, 2))
    rows = [method.counts(LayerPrompt(layer, scores, (12,)))[0].tolist() for layer in range(3)]
    assert rows == [[5, 5], [5, 5], [10, 0]]


@pytest.mark.parametrize("redistribute", [False, True])
def test_shares_of_a_prompt_around_the_budget(redistribute: bool) -> None:
    """One token more or less than the budget decides whether a prompt is kept whole."""
    table = np.array([[1.0, 3.0], [0.0, 4.0]])
    config = CompressionConfig(method="sparsemm", budget=12, window_size=4, ratio=0.25, redistribute=redistribute)
    method = build_method(config, Model(2, 2, 2), table)
    for length in (0, 3, 7, 8, 9, 40):
        rows = [method.counts(LayerPrompt(layer, torch.empty(0), (length, 40)))[0].tolist() for layer in range(2)]
        if length < 8:
            assert rows == [[length, length]] * 2
        elif redistribute:
            exact = slow.spend([Fraction(2)] * 4, [1, 3, 0, 4], [length] * 4, 32)
            assert_settled(np.array(rows), exact, 32)
        else:
            assert rows == [[min(count, length) for count in row] for row in ([5, 11], [2, 14])]
