"""Equal scores: which columns are kept depends on their distance from the end alone, never on the padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemm_lmms import CompressionConfig
from sparsemm_lmms.methods import METHODS, LayerPrompt, Model
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.scorers.base import best_first
from sparsemm_lmms.selection import build_method

from .views import of_prompt

COMPRESSING = [name for name, method in METHODS.items() if method.compresses]


def test_of_equal_scores_the_newer_columns_are_kept() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, 0.0, 2.0, 1.0]]])
    assert best_first(scores, 5).tolist() == [[[4, 2, 1, 5, 0]]]


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
@pytest.mark.parametrize("method", COMPRESSING)
@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["soft", "sharp"])
def test_a_padded_batch_keeps_what_one_prompt_keeps(method: str, pooling: str, scale: float) -> None:
    config = CompressionConfig(method=method, budget=24, window_size=4, pooling=pooling)
    table = np.arange(1.0, 9.0).reshape(2, 4) if METHODS[method].needs_head_scores else None
    built = build_method(config, Model(2, 4, 2), table, Retention.random(2, 4))
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        n, pad, d = 90, 5 + 3 * seed, 8
        q, k, v = (torch.randn(1, h, n, d, generator=g) * s for h, s in ((4, scale), (2, 1.0), (2, 1.0)))
        other = [torch.randn(1, h, n + pad, d, generator=g) for h in (4, 2, 2)]
        left = [torch.cat([torch.zeros(1, x.shape[1], pad, d), x], 2) for x in (q, k, v)]
        alone = of_prompt(built, 1, q, k, d**-0.5, (n,), values=v)
        *rows, values = [torch.cat(pair) for pair in zip(left, other, strict=True)]
        batch = of_prompt(built, 1, *rows, d**-0.5, (n, n + pad), values=values)
        assert alone.counts[0].tolist() == batch.counts[0].tolist()
        for h, count in enumerate(alone.counts[0]):
            assert alone.index[0, h, :count].tolist() == (batch.index[0, h, :count] - pad).tolist()


def test_adakv_a_head_without_attention_outside_the_window_wins_nothing() -> None:
    config = CompressionConfig(method="adakv", budget=7, window_size=4, floor_ratio=0.0)
    built = build_method(config, Model(1, 2, 2))
    scores = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.4, 0.3, 0.2, 0.1]]])
    padded = torch.cat([torch.full((1, 2, 3), float("-inf")), scores], -1)
    for rows, length in ((scores, 4), (padded, 7)):
        # 3 * 2 places: all four tokens of the second head, and two that are worth nothing
        assert built.capacities(LayerPrompt(0, rows, (length,))).tolist() == [[2, 4]]
