import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.kernels import append

from . import naive

FIELDS = ("keys", "values", "start", "length", "capacity")


def run(store, new_keys, new_values, count=None, backend="torch", device="cpu"):
    """`append` on a copy of `store`; returns the copy on the CPU and whether it overflowed."""
    there = store.to(device) if device != "cpu" else store.clone()
    overflow = torch.zeros(1, dtype=torch.int32, device=device)
    count = None if count is None else torch.tensor(count, dtype=torch.int32, device=device)
    append(
        *(getattr(there, name) for name in FIELDS),
        new_keys.to(device),
        new_values.to(device),
        overflow,
        count,
        backend=backend,
    )
    return there.to("cpu"), bool(overflow)


def check(lengths, tokens, head_dim, dtype=torch.float32, room=3, count=None, **where):
    store = naive.make_store(lengths, head_dim, dtype, room)
    shape = (len(lengths), len(lengths[0]), tokens, head_dim)
    new_keys, new_values = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    got, overflowed = run(store, new_keys, new_values, count, **where)
    expected = store.clone()
    assert naive.append(expected, new_keys, new_values, count) == overflowed
    for name in FIELDS:  # the whole store: nothing else may have been touched
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)
    return overflowed


CASES = [
    dict(lengths=[[5, 0, 31]], tokens=1, head_dim=64),
    dict(lengths=[[5, 0, 31], [1, 33, 2]], tokens=3, head_dim=80),  # exactly full afterwards
    dict(lengths=[[5, 0], [1, 33]], tokens=3, head_dim=96, count=[1, 3]),
    dict(lengths=[[5, 0], [1, 33]], tokens=3, head_dim=128, count=[0, 2], dtype=torch.bfloat16),
    dict(lengths=[[5, 7, 9]], tokens=40, head_dim=32, room=41, dtype=torch.float16),
]


@pytest.mark.parametrize("case", CASES)
def test_torch(case):
    assert not check(**case)


@pytest.mark.parametrize("case", CASES)
def test_interpreter(case, interpreter):
    assert not check(**case, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gpu(case, backend):
    assert not check(**case, backend=backend, device="cuda")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_torch_like_the_loop(data):
    batch, heads, tokens = (data.draw(st.integers(1, 3)) for _ in range(3))
    lengths = data.draw(
        st.lists(st.lists(st.integers(0, 9), min_size=heads, max_size=heads), min_size=batch, max_size=batch)
    )
    count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    check(lengths, tokens, 4, room=data.draw(st.integers(0, 4)), count=count)


def mixed_overflow(**where):
    """Only the full segments of a batch refuse; the others take their tokens, and no foreign row changes."""
    store = naive.make_store([[4, 6], [2, 0]], 8, room=2)
    store.length[0, 1] += 1
    store.keys[store.rows(0, 1)[-1]] = 1.0
    new = torch.randn(2, 2, 2, 8)
    got, overflowed = run(store, new, new, **where)
    assert overflowed
    assert got.length.tolist() == [[6, 7], [4, 2]]
    expected = store.clone()
    assert naive.append(expected, new, new, None)
    torch.testing.assert_close(got.keys, expected.keys, rtol=0, atol=0, equal_nan=True)


def test_overflow_is_reported_and_writes_nothing():
    mixed_overflow()


def test_overflow_interpreter(interpreter):
    mixed_overflow(backend="triton")


@pytest.mark.gpu
def test_overflow_gpu():
    mixed_overflow(device="cuda")


@pytest.mark.parametrize("count", [[-1], [3]])
def test_impossible_counts_are_overflows(count):
    store = naive.make_store([[4]], 8, room=9)
    got, overflowed = run(store, torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), count)
    assert overflowed
    assert got.length.tolist() == [[4]]


def test_impossible_counts_interpreter(interpreter):
    store = naive.make_store([[4], [4], [4]], 8, room=9)
    new = torch.zeros(3, 1, 2, 8)
    got, overflowed = run(store, new, new, [-1, 3, 1], backend="triton")
    assert overflowed
    assert got.length.tolist() == [[4], [4], [5]]


def strided(**where):
    """[batch, tokens, heads, head_dim] memory, as projections leave it; keys and values strided differently."""
    store = naive.make_store([[4, 6], [2, 0]], 8, room=5)
    new_keys = torch.randn(2, 5, 2, 8).transpose(1, 2)
    new_values = torch.randn(2, 2, 5, 24)[..., 8:16]
    got, _ = run(store, new_keys, new_values, **where)
    expected = store.clone()
    naive.append(expected, new_keys, new_values, None)
    torch.testing.assert_close(got.keys, expected.keys, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got.values, expected.values, rtol=0, atol=0, equal_nan=True)


def test_strided_input():
    strided()


def test_strided_interpreter(interpreter):
    strided(backend="triton")


def test_nothing_to_append():
    check([[3, 4]], 0, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(length=torch.zeros(1, 2, dtype=torch.int64)), "length must be int32"),
        (dict(start=torch.zeros(2, 1, dtype=torch.int32)), "start must have shape"),
        (dict(keys=torch.zeros(9, 8, dtype=torch.float16)), "must hold rows of 8 x torch.float32"),
        (dict(keys=torch.zeros(9, 16)[:, ::2]), "contiguous"),
        (dict(values=torch.zeros(8, 8)), "differ in shape"),
        (dict(new_keys=torch.zeros(1, 2, 8, 3).transpose(2, 3)), "contiguous in its last dimension"),
        (dict(new_values=torch.zeros(1, 2, 1, 8)), "must agree"),
        (dict(overflow=torch.zeros(2, dtype=torch.int32)), "overflow must have shape"),
        (dict(new_count=torch.zeros(2, dtype=torch.int32)), "new_count must have shape"),
        (dict(new_keys=torch.zeros(1, 2, 3, 8, dtype=torch.int32)), "must be float16"),
        (dict(length=torch.zeros(1, 2, dtype=torch.int32, device="meta")), "one device"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(
        keys=torch.zeros(9, 8),
        values=torch.zeros(9, 8),
        start=torch.zeros(1, 2, dtype=torch.int32),
        length=torch.zeros(1, 2, dtype=torch.int32),
        capacity=torch.zeros(1, 2, dtype=torch.int32),
        new_keys=torch.zeros(1, 2, 3, 8),
        new_values=torch.zeros(1, 2, 3, 8),
        overflow=torch.zeros(1, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=message):
        append(**{**arguments, **change})
