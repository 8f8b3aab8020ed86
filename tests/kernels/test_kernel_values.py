"""Edges of the kernels: more columns than a program may split, counts above the index, windows inside the padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.kernels import evict, window_score
from sparsemm_lmms.kernels.window_score import MAX_SPLITS, split_columns

from . import naive

BACKENDS = ["torch", "interpreter"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "torch":
        return "torch"
    request.getfixturevalue("interpreter")
    return "triton"


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.integers(1, 300_000), st.integers(1, 5000), st.sampled_from([16, 32, 64, 128]), st.integers(1, 200))
def test_splits_cover_the_columns(n: int, programs: int, block: int, sms: int) -> None:
    chunk, splits = split_columns(n, programs, block, sms)
    assert 1 <= splits <= MAX_SPLITS  # the second pass reads no more
    assert chunk % block == 0 and (splits - 1) * chunk < n <= splits * chunk
    assert splits == 1 or chunk >= 4 * block
    assert (splits - 1) * programs < 4 * sms  # no more than keep the device busy


def test_a_long_row_on_an_idle_device_has_the_most_splits() -> None:
    assert split_columns(128 * 1024, programs=1, block_n=128, sms=132) == (4096, MAX_SPLITS)
    assert split_columns(128 * 1024, programs=66, block_n=128, sms=132) == (16384, 8)
    assert split_columns(128 * 1024, programs=100, block_n=128, sms=132) == (171 * 128, 6)  # 5.28 programs, rounded up
    assert split_columns(600, programs=1, block_n=128, sms=132) == (640, 1)


def test_a_count_above_the_index_copies_the_index(backend: str) -> None:
    """The next head's positions are not this one's."""
    key = torch.arange(1.0, 13).view(1, 2, 6, 1).expand(1, 2, 6, 8).contiguous()
    index = torch.tensor([[[0, 2, 3], [1, 4, 5]]], dtype=torch.int32)
    count = torch.tensor([[5, 2]], dtype=torch.int32)
    start = torch.tensor([[0, 6]], dtype=torch.int32)
    keys, values = torch.zeros(12, 8), torch.zeros(12, 8)
    evict(key, -key, index, count, start, keys, values, backend=backend)
    assert keys[:, 0].tolist() == [1, 3, 4, 0, 0, 0, 8, 11, 0, 0, 0, 0]
    assert torch.equal(values, -keys)


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
@pytest.mark.parametrize("gqa_func", ["mean", "max"])
def test_any_padding(pooling: str, gqa_func: str, backend: str) -> None:
    """A row for each number of padding columns, those whose window is padding itself included."""
    n, window = 11, 4
    pads = list(range(n + 1)) if backend == "torch" else [0, 6, 7, 9]
    query, key = torch.randn(len(pads), 2, window, 16), torch.randn(len(pads), 1, n, 16)
    got = window_score(
        query, key, scaling=0.25, kernel_size=3, pooling=pooling, gqa_func=gqa_func,
        pad=torch.tensor(pads, dtype=torch.int32), backend=backend,
    )  # fmt: skip
    inside = [min(pad, n - window) for pad in pads]  # nothing before the window is left: no score is real
    wanted = naive.window_score(query, key, 0.25, 3, pooling, gqa_func, inside)
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)


def test_gradients_and_inference_give_the_same_scores() -> None:
    query, key = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 12, 8)
    pad = torch.tensor([0, 5], dtype=torch.int32)
    plain = window_score(query, key, scaling=0.3, pad=pad, backend="torch")
    learning = window_score(query.clone().requires_grad_(), key, scaling=0.3, pad=pad, backend="torch")
    assert learning.requires_grad and torch.equal(plain, learning.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_inputs_are_scored_in_float32(dtype: torch.dtype) -> None:
    query, key = torch.randn(1, 2, 4, 16).to(dtype), (2 * torch.randn(1, 1, 60, 16)).to(dtype)
    got = window_score(query, key, scaling=0.25, backend="torch")
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), naive.window_score(query, key, 0.25, 5, "avgpool", "mean"), rtol=2e-5, atol=1e-9
    )
