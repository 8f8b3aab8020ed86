"""Ranks, correlations and overlaps against scipy where it is there, and by hand."""

import doctest
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsemm_lmms import head_statistics as statistics
from sparsemm_lmms.head_statistics import (
    group_agreement,
    heads_holding,
    spearman,
    split_half,
    top_count,
    top_overlap,
    top_share,
)
from sparsemm_lmms.visual_heads import budget_table

TABLES = hnp.arrays(np.float64, (3, 5), elements=st.integers(0, 6).map(float))


@settings(max_examples=50, deadline=None)
@given(a=TABLES, b=TABLES)
def test_spearman_is_scipys(a, b):
    stats = pytest.importorskip("scipy.stats")
    mine = spearman(a, b)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        assert math.isnan(mine)
    else:
        assert mine == pytest.approx(stats.spearmanr(a.reshape(-1), b.reshape(-1)).statistic)


def test_top_of_1024_heads():
    assert top_count(1024, 0.05) == 51 and top_count(4, 0.05) == 1
    table = np.zeros((32, 32))
    table[3, :30] = 1
    assert top_share(table) == 1.0 and top_share(table, 15 / 1024) == 0.5
    other = np.zeros((32, 32))
    other[3, 15:45] = 1
    assert top_overlap(table, other, 30 / 1024) == 0.5
    with pytest.raises(ValueError, match="one shape"):
        spearman(table, table[:2])
    with pytest.raises(ValueError, match="one shape"):
        top_overlap(table, table[:2])


def test_split_half():
    tables = np.random.default_rng(0).random((40, 4, 8)) * np.arange(32).reshape(4, 8)
    same = split_half(np.concatenate([tables[:1]] * 4))
    assert same == {"spearman": 1.0, "top_5_percent_overlap": 1.0, "top_10_percent_overlap": 1.0}
    assert split_half(tables)["spearman"] == pytest.approx(
        spearman(tables[::2].mean(0), tables[1::2].mean(0)), abs=1e-6
    )
    assert split_half(tables[:3]) is None
    assert split_half(np.zeros((8, 2, 2))) is None


def test_groups_of_images():
    rng = np.random.default_rng(0)
    tables = rng.random((130, 3, 4)) * np.arange(12).reshape(3, 4)
    first, second = tables[:50].mean(0), tables[50:100].mean(0)
    found = group_agreement(tables, 50)
    assert found["size"] == 50 and found["groups"] == 2
    assert found["spearman_mean"] == found["spearman_least"] == pytest.approx(spearman(first, second), abs=1e-6)
    many = group_agreement(tables, 10)
    assert many["groups"] == 13 and many["spearman_least"] < many["spearman_mean"] < 1
    assert group_agreement(tables[:99], 50) is None
    assert group_agreement(np.concatenate([tables[:50], 0 * tables[:50]]), 50) is None


@pytest.mark.parametrize("share, heads", [(0.5, 2), (0.7, 2), (0.71, 3), (1.0, 4)])
def test_heads_that_hold_a_share(share, heads):
    assert heads_holding(np.array([[1.0, 4.0], [3.0, 2.0]]), share) == heads


@pytest.mark.parametrize("module", [statistics, budget_table])
def test_examples(module):
    assert doctest.testmod(module).failed == 0
