import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.kernels import append, ragged_decode
from sparsemm_lmms.kernels.ragged_decode import launch

from . import naive


def check(
    lengths,
    group,
    tokens,
    head_dim,
    dtype=torch.float32,
    count=None,
    device="cpu",
    store=None,
    softcap=None,
    sinks=None,
    **options,
):
    """`sinks`: their dtype, or None."""
    store = naive.make_store(lengths, head_dim, dtype) if store is None else store
    query = torch.randn(len(lengths), len(lengths[0]) * group, tokens, head_dim).to(dtype)
    there = store.to(device)
    if sinks is not None:
        sinks = (torch.randn(query.shape[1]) * 3).to(sinks)
    got = ragged_decode(
        query.to(device),
        there.keys,
        there.values,
        there.start,
        there.length,
        scaling=head_dim**-0.5,
        softcap=softcap,
        sinks=None if sinks is None else sinks.to(device),
        new_count=None if count is None else torch.tensor(count, dtype=torch.int32, device=device),
        **options,
    )
    assert got.dtype == dtype and got.shape == query.shape
    expected = naive.decode(query, store, head_dim**-0.5, count, softcap, sinks)
    tolerance = naive.TOLERANCE[dtype]
    torch.testing.assert_close(got.cpu().double(), expected, rtol=tolerance, atol=tolerance)


CASES = [
    dict(lengths=[[5, 50, 0]], group=1, tokens=1, head_dim=64),
    dict(lengths=[[1, 31, 33], [0, 64, 200]], group=4, tokens=1, head_dim=128),
    dict(lengths=[[3, 100], [129, 7]], group=7, tokens=3, head_dim=80),
    dict(lengths=[[4, 100], [70, 9]], group=1, tokens=3, head_dim=96, count=[3, 1], dtype=torch.float16),
    dict(lengths=[[40, 3], [33, 90]], group=2, tokens=20, head_dim=32, count=[20, 2]),  # an appended prompt
    dict(lengths=[[0, 0]], group=1, tokens=1, head_dim=64),
    dict(lengths=[[1000, 1, 2]], group=1, tokens=1, head_dim=128),  # one long head
    dict(lengths=[[1]], group=1, tokens=3, head_dim=64),  # fewer rows than queries: the first ones see nothing
]
LOGITS = [  # the values lie a few units apart, so the cap bites and each sink takes a share of its own
    dict(softcap=0.7),
    dict(sinks=torch.float32),
    dict(softcap=1.5, sinks=torch.float16),
]
LONG = [  # only compiled: the interpreter needs seconds for each
    dict(lengths=[[5000, 1, 700, 60], [0, 1025, 9, 4096]], group=1, tokens=1, head_dim=128),
    dict(lengths=[[5000, 1], [31, 3000]], group=7, tokens=2, head_dim=128),
    dict(lengths=[[5000, 8], [31, 3000]], group=4, tokens=8, head_dim=80, count=[8, 5]),
    dict(lengths=[[1500, 600]], group=4, tokens=300, head_dim=128),
    dict(lengths=[[20000]], group=8, tokens=1, head_dim=64),
]


@pytest.mark.parametrize("case", CASES)
def test_torch(case):
    check(**case, backend="torch")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("logits", LOGITS)
def test_torch_with_cap_and_sinks(case, logits):
    check(**case, **logits, backend="torch")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_length", [None, 1000])
def test_interpreter(case, max_length, interpreter):
    check_interpreted(case, max_length)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("max_length", [None, 1000])
def test_interpreter_with_cap_and_sinks(case, max_length, interpreter):
    """A sink counts once, however many programs share an item, and not for one without rows."""
    check_interpreted({**case, "softcap": 1.5, "sinks": torch.float16}, max_length)


@pytest.mark.parametrize("logits", LOGITS[:2])
def test_interpreter_with_cap_or_sinks(logits, interpreter):
    check_interpreted({**CASES[1], **logits}, None)


def check_interpreted(case, max_length):
    """max_length 1000: one program an item. None: equal runs over 8 programs, merged where they cut an item."""
    if max_length is None:
        store = naive.make_store(case["lengths"], case["head_dim"], case.get("dtype", torch.float32))
        spare = torch.full((2000, case["head_dim"]), float("nan"), dtype=store.keys.dtype)  # above DIRECT_LENGTH
        store.keys, store.values = torch.cat([store.keys, spare]), torch.cat([store.values, spare])
        check(**case, store=store, backend="triton")
    else:
        check(**case, max_length=max_length, backend="triton")


@pytest.mark.parametrize("sinks", [None, torch.float32])
def test_more_parts_than_one_merge_block_interpreter(sinks, interpreter, monkeypatch):
    """40 programs share one item, so its merge takes three blocks of 16 parts, the largest logit in the last."""
    monkeypatch.setattr(sys.modules[ragged_decode.__module__], "multiprocessors", lambda device: 20)
    store = naive.make_store([[2600, 3]], 16)
    store.keys[store.rows(0, 0)[-1]] *= 10
    check([[2600, 3]], 2, 1, 16, store=store, sinks=sinks, backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sinks_without_weight_or_with_all_interpreter(backend, interpreter):
    """A sink of -inf is none; a huge one leaves nothing to the rows."""
    store, query = naive.make_store([[40, 0]], 16), torch.randn(1, 4, 1, 16)
    place = (store.keys, store.values, store.start, store.length)
    want = ragged_decode(query, *place, scaling=0.25, backend="torch")
    for value, expected in ((float("-inf"), want), (1e30, torch.zeros_like(want))):
        got = ragged_decode(query, *place, scaling=0.25, sinks=torch.full((4,), value), backend=backend)
        torch.testing.assert_close(got, expected)


@settings(max_examples=15, deadline=None)
@given(st.data())
def interpreter_property(data):
    heads, group, tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
    row = st.lists(st.integers(0, 150), min_size=heads, max_size=heads)
    lengths = [data.draw(row)]
    max_length = data.draw(st.sampled_from([200, 5000]))
    store = naive.make_store(lengths, 16)
    spare = torch.full((5000, 16), float("nan"))
    store.keys, store.values = torch.cat([store.keys, spare]), torch.cat([store.values, spare])
    check(lengths, group, tokens, 16, store=store, max_length=max_length, backend="triton")


def test_interpreter_like_the_loop(interpreter):
    interpreter_property()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_torch_like_the_loop(data):
    batch, heads, group, tokens = (data.draw(st.integers(1, 3)) for _ in range(4))
    row = st.lists(st.integers(0, 40), min_size=heads, max_size=heads)
    lengths = data.draw(st.lists(row, min_size=batch, max_size=batch))
    count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    logits = data.draw(st.sampled_from([{}, *LOGITS]))
    check(lengths, group, tokens, 4, count=count, **logits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", [{k: v for k, v in case.items() if k != "dtype"} for case in CASES + LONG])
@pytest.mark.parametrize("max_length", [None, 20000])
@pytest.mark.parametrize("logits", [{}, LOGITS[-1]])
def test_gpu(case, dtype, max_length, logits):
    check(**case, dtype=dtype, max_length=max_length, device="cuda", **logits)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("logits", [{}, LOGITS[-1]])
def test_gpu_torch_backend(case, logits):
    check(**case, backend="torch", device="cuda", **logits)


def test_order_inside_a_segment_is_free():
    store = naive.make_store([[20, 7]], 16)
    query = torch.randn(1, 4, 1, 16)
    before = ragged_decode(query, store.keys, store.values, store.start, store.length, scaling=0.25)
    rows = list(store.rows(0, 0))
    shuffled = [rows[i] for i in torch.randperm(20).tolist()]
    store.keys[rows], store.values[rows] = store.keys[shuffled], store.values[shuffled]
    after = ragged_decode(query, store.keys, store.values, store.start, store.length, scaling=0.25)
    torch.testing.assert_close(before, after)


def test_segments_anywhere_and_queries_strided():
    """[batch, tokens, heads, head_dim] memory, as projections leave it."""
    store = naive.make_store([[20, 7]], 16)
    query = torch.randn(1, 2, 4, 16).transpose(1, 2)
    got = ragged_decode(query, store.keys, store.values, store.start, store.length, scaling=0.25)
    torch.testing.assert_close(got.double(), naive.decode(query, store, 0.25), rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite():
    store = naive.make_store([[20, 7]], 16)
    store.keys *= 1e3
    check([[20, 7]], 2, 1, 16, store=store, backend="torch")


def test_large_logits_interpreter(interpreter):
    store = naive.make_store([[200, 7]], 16)
    store.keys *= 1e2
    check([[200, 7]], 2, 1, 16, store=store, backend="triton", max_length=2000)


@given(
    segments=st.integers(1, 3000),
    rows=st.integers(1, 4000),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 256]),
    itemsize=st.sampled_from([2, 4]),
    max_length=st.integers(1, 200_000),
    sms=st.sampled_from([4, 108, 132]),
)
def test_launch(segments, rows, head_dim, itemsize, max_length, sms):
    cut = launch(segments, rows, head_dim, itemsize, max_length, sms)
    assert cut.items == segments * cut.row_blocks and cut.row_blocks * cut.block_m >= rows
    assert cut.programs == cut.items if cut.direct else 1 <= cut.programs <= 2 * sms
    assert cut.block_n >= 16 and cut.block_d >= head_dim
    if max_length <= 1024:  # small budgets: one launch, no merge
        assert cut.direct


@pytest.mark.gpu
def test_decode_steps_replay_in_a_graph():
    """Append and decode captured once, replayed while the lengths grow: no host synchronisation, static addresses."""
    lengths, head_dim, steps = [[2000, 3, 0, 700]], 128, 6
    store = naive.make_store(lengths, head_dim, torch.bfloat16, room=steps + 3)
    there = store.to("cuda")
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
    new = torch.zeros(2, 1, 4, 1, head_dim, dtype=torch.bfloat16, device="cuda")
    query = torch.zeros(1, 16, 1, head_dim, dtype=torch.bfloat16, device="cuda")

    def step():
        append(there.keys, there.values, there.start, there.length, there.capacity, new[0], new[1], overflow)
        return ragged_decode(
            query, there.keys, there.values, there.start, there.length, scaling=0.1, max_length=2000 + steps
        )

    torch.cuda.set_sync_debug_mode("error")
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # compiles
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    there.length.copy_(store.length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(steps):
        fresh = torch.randn(2, 1, 4, 1, head_dim).to(torch.bfloat16)
        asked = torch.randn(1, 16, 1, head_dim).to(torch.bfloat16)
        new.copy_(fresh)
        query.copy_(asked)
        graph.replay()
        assert not naive.append(store, fresh[0], fresh[1], None)
        expected = naive.decode(asked, store, 0.1)
        torch.testing.assert_close(out.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    assert there.length.cpu().equal(store.length) and not overflow.item()


@pytest.mark.gpu
def test_offsets_beyond_32_bits():
    """A store of more than 2^31 elements (4.3 GiB each): append, then read, at its end."""
    head_dim, slots = 128, 2**24 + 4096
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GiB of free GPU memory")
    keys, values = (torch.empty(slots, head_dim, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    start = torch.tensor([[slots - 2048]], dtype=torch.int32, device="cuda")
    length = torch.zeros(1, 1, dtype=torch.int32, device="cuda")
    capacity = torch.full_like(length, 2048)
    overflow = torch.zeros(1, dtype=torch.int32, device="cuda")
    new = torch.randn(2, 1, 1, 2048, head_dim, device="cuda").to(torch.bfloat16)
    append(keys, values, start, length, capacity, new[0], new[1], overflow)
    query = torch.randn(1, 4, 1, head_dim, device="cuda").to(torch.bfloat16)
    got = ragged_decode(query, keys, values, start, length, scaling=0.1)
    p = torch.softmax(query[0, :, 0].double() @ new[0, 0, 0].double().T * 0.1, -1)
    torch.testing.assert_close(got[0, :, 0].double(), p @ new[1, 0, 0].double(), rtol=2e-2, atol=2e-2)
    assert length.item() == 2048 and not overflow.item()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(length=torch.zeros(1, 2)), "length must be int32"),
        (dict(length=torch.zeros(1, 1, dtype=torch.int32)), "length must have shape"),
        (dict(start=torch.zeros(2, dtype=torch.int32)), "start must have shape"),
        (dict(start=torch.zeros(1, 3, dtype=torch.int32)), "length must have shape"),
        (dict(query=torch.zeros(1, 3, 1, 8)), "3 query heads are no multiple of 2"),
        (dict(query=torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16)), "must hold rows of 8 x torch.bfloat16"),
        (dict(keys=torch.zeros(8, 9).T), "contiguous"),
        (dict(new_count=torch.zeros(2, dtype=torch.int32)), "new_count must have shape"),
        (dict(max_length=-1), "max_length"),
        (dict(backend="flash"), "backend must be one of"),
        (dict(softcap=0.0), "softcap must be positive, got 0.0"),
        (dict(sinks=torch.zeros(2)), r"sinks must have shape \(4,\), got \(2,\)"),
        (dict(sinks=torch.zeros(4, dtype=torch.int64)), "sinks must be float16, bfloat16 or float32"),
        (dict(sinks=torch.zeros(8)[::2]), "sinks must be contiguous"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(
        query=torch.zeros(1, 4, 1, 8),
        keys=torch.zeros(9, 8),
        values=torch.zeros(9, 8),
        start=torch.zeros(1, 2, dtype=torch.int32),
        length=torch.zeros(1, 2, dtype=torch.int32),
        scaling=1.0,
    )
    with pytest.raises(ValueError, match=message):
        ragged_decode(**{**arguments, **change})
