"""Which heads `mask` and `mask_random` silence. That they then contribute nothing: tests/core/test_session.py."""

import numpy as np
import pytest

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import Method, Model

SCORES = np.array([[0.0, 5.0, 1.0, 1.0], [4.0, 0.0, 0.0, 3.0]])


def masked(method, ratio, seed=0):
    config = CompressionConfig(method=method, mask_ratio=ratio, seed=seed)
    return Method(config, Model(2, 4, 2), SCORES).masked_heads()


@pytest.mark.parametrize("ratio, heads", [(0, []), (0.01, [1]), (0.25, [1, 4]), (0.5, [1, 2, 4, 7]), (1, range(8))])
def test_the_best_heads_of_the_whole_model(ratio, heads):
    assert np.flatnonzero(masked("mask", ratio)).tolist() == list(heads)


def test_as_many_others():
    for seed in range(5):
        drawn = masked("mask_random", 0.25, seed)
        assert drawn.sum() == 2 and not (drawn & masked("mask", 0.25)).any()
        assert np.array_equal(drawn, masked("mask_random", 0.25, seed))
    assert len({masked("mask_random", 0.25, seed).tobytes() for seed in range(5)}) > 1
    assert not masked("mask_random", 0).any()
    with pytest.raises(ValueError, match="mask_ratio=0.6 leaves 3 other heads, too few for 5; use at most 0.5"):
        masked("mask_random", 0.6)
