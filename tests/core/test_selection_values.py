"""What is kept, first and again, against lists of positions made head by head (see `slow.py`)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method, scored

from . import slow, views

METHODS = ["snapkv", "local_window", "sparsemm", "pyramidkv", "adakv", "fullkv"]
DIM = 4


@st.composite
def methods(draw: st.DrawFn) -> tuple[CompressionConfig, Model, np.ndarray | None]:
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    model = Model(layers, kv_heads * draw(st.integers(1, 2)), kv_heads)
    window, base = draw(st.integers(1, 5)), draw(st.integers(1, 10))
    config = CompressionConfig(
        method=draw(st.sampled_from(METHODS)),
        budget=window + base,
        window_size=window,
        kernel_size=draw(st.sampled_from([1, 3, 5])),
        pooling=draw(st.sampled_from(["avgpool", "maxpool"])),
        gqa_func=draw(st.sampled_from(["mean", "max"])),
        ratio=draw(st.sampled_from([0.0, 0.1, 0.5])),
        floor_ratio=draw(st.sampled_from([0.0, 0.2, 1.0])),
        normalize=draw(st.booleans()),
        skip=draw(st.integers(0, 1)),
        beta=draw(st.integers(1, 5)),
        redistribute=draw(st.booleans()),
    )
    table = np.random.default_rng(draw(st.integers(0, 99))).random((layers, model.q_heads)) ** 2
    return config, model, table if config.method == "sparsemm" else None


def rows(kept: torch.Tensor, counts: np.ndarray) -> list[list[int]]:
    return [row[:count].tolist() for row, count in zip(kept, counts.tolist(), strict=True)]


@settings(max_examples=400, derandomize=True, deadline=None)
@given(methods(), st.data())
def test_a_padded_batch_of_prompts(
    made: tuple[CompressionConfig, Model, np.ndarray | None], data: st.DataObject
) -> None:
    config, model, table = made
    near = st.sampled_from([config.window_size, config.budget - 1, config.budget, config.budget + 1])
    lengths = tuple(data.draw(st.lists(st.integers(1, 40) | near, min_size=1, max_size=3)))
    layer = data.draw(st.integers(0, model.num_layers - 1))
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    columns = max(lengths)
    query = torch.randn(len(lengths), model.q_heads, columns, DIM, generator=dice)
    key = torch.randn(len(lengths), model.kv_heads, columns, DIM, generator=dice)
    chosen = views.of_prompt(build_method(config, model, table), layer, query, key, DIM**-0.5, lengths)
    for b, length in enumerate(lengths):
        pad = columns - length
        # the window of a batch is that of its longest prompt
        wanted = slow.keep(config, model, table, layer, query[b, :, pad:], list(key[b, :, pad:]), length)
        assert rows(chosen.index[b] - pad, chosen.counts[b]) == wanted


@settings(max_examples=400, derandomize=True, deadline=None)
@given(methods(), st.data())
def test_choosing_again_from_what_the_heads_hold(
    made: tuple[CompressionConfig, Model, np.ndarray | None], data: st.DataObject
) -> None:
    """Heads hold different numbers of tokens, some hardly more than the window."""
    config, model, table = made
    most = config.window_size + data.draw(st.integers(0, 2 * config.base))
    held = data.draw(st.lists(st.integers(1, most), min_size=model.kv_heads, max_size=model.kv_heads))
    seen = max(max(held), config.budget + data.draw(st.sampled_from([-1, 0, 1, 3, 30])))
    new = data.draw(st.integers(1, min(held)))
    layer = data.draw(st.integers(0, model.num_layers - 1))
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    query = torch.randn(1, model.q_heads, max(new, min(config.window_size, max(held))), DIM, generator=dice)
    keys = [torch.randn(count, DIM, generator=dice) for count in held]
    columns = max(held)
    key = torch.stack([torch.cat([torch.full((columns - len(k), DIM), 99.0), k]) for k in keys])[None]
    method = build_method(config, model, table)
    chosen = views.again(method, layer, query, key, DIM**-0.5, np.array(held), seen)
    wanted = slow.keep(config, model, table, layer, query[0], keys, seen)
    for h, count in enumerate(held):
        index = chosen.index[0, h, : chosen.counts[0, h]] - (columns - count)
        assert index.tolist() == wanted[h], (h, config)


def test_a_head_gives_no_more_than_it_holds_outside_the_window() -> None:
    config = CompressionConfig(method="snapkv", budget=10, window_size=4)
    key, query = torch.randn(1, 3, 20, DIM), torch.randn(1, 3, 5, DIM)
    held = np.array([20, 7, 3])
    chosen = views.again(build_method(config, Model(1, 3, 3)), 0, query, key, 0.5, held, 40)
    assert chosen.counts.tolist() == [[10, 7, 3]]
    assert rows(chosen.index[0, 1:], chosen.counts[0, 1:]) == [list(range(13, 20)), [17, 18, 19]]


@pytest.mark.parametrize("method", ["snapkv", "local_window"])
def test_scores_are_of_the_real_columns(method: str) -> None:
    config = CompressionConfig(method=method, budget=10, window_size=4)
    query, key = torch.randn(3, 2, 12, DIM), torch.randn(3, 2, 12, DIM)
    built, pads = build_method(config, Model(1, 2, 2)), torch.tensor([0, 3, 7], dtype=torch.int32)
    scores = scored(built, views.view(built, 0, query, key, 0.5, pad=pads), 12 - np.array([[0, 0], [3, 3], [7, 7]]))
    for b, pad in enumerate([0, 3, 7]):
        assert scores[b].isfinite().tolist() == [[column >= pad for column in range(8)]] * 2
    if method == "local_window":
        assert (scores[0].diff() > 0).all()
