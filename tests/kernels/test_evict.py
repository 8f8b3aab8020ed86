import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.kernels import evict

from .naive import make_store


def check(counts, n, head_dim, dtype=torch.float32, layout="plain", backend="torch", device="cpu"):
    batch, heads = len(counts), len(counts[0])
    store = make_store([[0] * heads] * batch, head_dim, dtype, room=max(map(max, counts)))
    key = torch.randn(batch, heads, n, head_dim).to(dtype)
    value = torch.randn(batch, heads, n, head_dim).to(dtype)
    if layout == "transposed":  # as projections leave it
        key, value = key.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([value, value], -1)[..., :head_dim]
    m = max(map(max, counts)) + 2
    index = torch.zeros(batch, heads, m, dtype=torch.int32)  # behind count: a position, but not to be copied
    for b in range(batch):
        for h in range(heads):
            index[b, h, : counts[b][h]] = torch.randperm(n)[: counts[b][h]].sort().values
    count = torch.tensor(counts, dtype=torch.int32)
    arguments = [
        x.to(device) for x in (key, value, index, count, store.start, store.keys.clone(), store.values.clone())
    ]
    evict(*arguments, backend=backend)
    expected_keys, expected_values = store.keys.clone(), store.values.clone()
    for b in range(batch):
        for h in range(heads):
            for j in range(counts[b][h]):
                expected_keys[int(store.start[b, h]) + j] = key[b, h, int(index[b, h, j])]
                expected_values[int(store.start[b, h]) + j] = value[b, h, int(index[b, h, j])]
    torch.testing.assert_close(arguments[-2].cpu(), expected_keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(arguments[-1].cpu(), expected_values, rtol=0, atol=0, equal_nan=True)


CASES = [
    dict(counts=[[1, 0, 31, 33]], n=40, head_dim=64),
    dict(counts=[[100, 3], [0, 64]], n=101, head_dim=80, layout="transposed", dtype=torch.float16),
    dict(counts=[[5, 5], [5, 5]], n=5, head_dim=96, dtype=torch.bfloat16),  # everything kept
    dict(counts=[[32]], n=70, head_dim=128, layout="transposed"),
    dict(counts=[[0, 0]], n=7, head_dim=32),
]


@pytest.mark.parametrize("case", CASES)
def test_torch(case):
    check(**case)


@pytest.mark.parametrize("case", CASES)
def test_interpreter(case, interpreter):
    check(**case, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, dict(counts=[[1000, 1, 700]], n=5000, head_dim=128, dtype=torch.bfloat16)])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gpu(case, backend):
    check(**case, backend=backend, device="cuda")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_torch_like_the_loop(data):
    batch, heads, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    row = st.lists(st.integers(0, n), min_size=heads, max_size=heads)
    check(data.draw(st.lists(row, min_size=batch, max_size=batch)), n, 4)


def test_positions_outside_the_input_raise():
    rows, one = torch.zeros(1, 1, 4, 8), torch.ones(1, 1, dtype=torch.int32)
    for position in (-1, 4):
        index = torch.full((1, 1, 1), position, dtype=torch.int32)
        with pytest.raises(IndexError, match="outside 0..3"):
            evict(rows, rows, index, one, 0 * one, torch.zeros(2, 8), torch.zeros(2, 8))


def test_kernel_never_leaves_its_tensors_interpreter(interpreter):
    """Wrong positions and starts copy nothing; a compiled kernel cannot raise, so it must at least not corrupt."""
    rows, count = torch.ones(1, 2, 4, 8), torch.tensor([[3, 3]], dtype=torch.int32)
    keys, values = torch.zeros(5, 8), torch.zeros(5, 8)
    index = torch.tensor([[[-1, 2, 4], [0, 1, 2]]], dtype=torch.int32)
    evict(rows, rows, index, count, torch.tensor([[0, 4]], dtype=torch.int32), keys, values, backend="triton")
    assert keys[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]
    assert values[:, 0].tolist() == [0.0, 1.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(index=torch.zeros(1, 2, 3, dtype=torch.int64)), "index must be int32"),
        (dict(index=torch.zeros(1, 3, dtype=torch.int32)), "index must have shape"),
        (dict(index=torch.zeros(2, 2, 3, dtype=torch.int32)), "index must have shape"),
        (dict(count=torch.zeros(2, dtype=torch.int32)), "count must have shape"),
        (dict(value=torch.zeros(1, 2, 6, 8)), "must agree"),
        (dict(out_keys=torch.zeros(9, 4)), "must hold rows of 8"),
        (dict(out_values=torch.zeros(9, 8, dtype=torch.float64)), "must be float16"),
        (dict(key=torch.zeros(1, 2, 8, 5).transpose(2, 3)), "contiguous in its last dimension"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(
        key=torch.zeros(1, 2, 5, 8),
        value=torch.zeros(1, 2, 5, 8),
        index=torch.zeros(1, 2, 3, dtype=torch.int32),
        count=torch.zeros(1, 2, dtype=torch.int32),
        start=torch.zeros(1, 2, dtype=torch.int32),
        out_keys=torch.zeros(9, 8),
        out_values=torch.zeros(9, 8),
    )
    with pytest.raises(ValueError, match=message):
        evict(**{**arguments, **change})
