"""Few documents: what the exact paired test says where the bootstrap is too sure."""

from __future__ import annotations

import numpy as np
import pytest

from sparsemm_lmms.reports import statistics, tables

from .test_statistics import cell, one, row


def pair(won: int, lost: int, tied: int, more_rows: int = 0):
    own = [1.0] * won + [0.0] * lost + [1.0] * tied
    other = [0.0] * won + [1.0] * lost + [1.0] * tied
    cells = [cell("fullkv", None, {"t": {"m": [1.0] * len(own)}}), cell("sparsemm", 48, {"t": {"m": own}})]
    names = ["snapkv", "pyramidkv", "adakv", "local_window"][: 1 + more_rows]
    return one(*cells, *(cell(name, 48, {"t": {"m": other}}) for name in names))


@pytest.mark.parametrize("tied", [20, 996])
def test_four_won_and_none_lost_tell_nothing(tied: int) -> None:
    block = pair(4, 0, tied)
    own, other = row(block, "sparsemm"), row(block, "snapkv")
    assert statistics.sign_test(own.scores - other.scores) == pytest.approx(0.125)
    assert not block.told_apart(own, other)
    assert "best, but not distinguishable from the next at 48" in "".join(tables.sentences(block))


def test_the_number_of_rows_counts() -> None:
    few, many = pair(7, 0, 17), pair(7, 0, 17, more_rows=3)  # p = 2 / 2**7 = .0156: below .05, above .05 / 4
    assert "told apart from the next at 48" in "".join(tables.sentences(few))
    assert "told apart" not in "".join(tables.sentences(many))


@pytest.mark.parametrize("won, lost, p", [(0, 0, 1.0), (1, 1, 1.0), (6, 0, 2 / 64), (9, 1, 22 / 1024)])
def test_the_sign_test_is_exact(won: int, lost: int, p: float) -> None:
    assert statistics.sign_test(np.array([1.0] * won + [-1.0] * lost + [0.0] * 3)) == pytest.approx(p)
