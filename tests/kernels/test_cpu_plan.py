"""Decode plans: every way a CPU takes gives what the loops of `naive` give, and is taken where it is meant to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.cpu_kernels import decode, decode_plan
from sparsemm_lmms.cpu_kernels import plan as plans
from sparsemm_lmms.kernels import ReferencePlan, append, ragged_decode

from . import naive
from .test_ragged_decode import LOGITS, check


def plan_of(store, q_heads=4):
    """The plan of a store; where the whole store may be read, its rows become finite, though not small."""
    made = decode_plan(store.start, store.capacity, *store.keys.shape[:1], q_heads, store.keys.shape[1])
    if made.places is not None:
        for x in (store.keys, store.values):
            x.nan_to_num_(nan=1000.0)
    return made


def planned(lengths, group, tokens, head_dim, dtype=torch.float32, shuffle=True, **options):
    store = naive.make_store(lengths, head_dim, dtype, shuffle=shuffle)
    plan = plan_of(store, group * len(lengths[0]))
    check(lengths, group, tokens, head_dim, dtype, store=store, plan=plan, backend="torch", **options)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_like_the_loop(data):
    batch, heads, group, tokens = (data.draw(st.integers(1, 3)) for _ in range(4))
    row = st.lists(st.integers(0, 40), min_size=heads, max_size=heads)
    lengths = data.draw(st.lists(row, min_size=batch, max_size=batch))
    count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    logits = data.draw(st.sampled_from([{}, *LOGITS]))
    planned(lengths, group, tokens, 4, dtype, data.draw(st.booleans()), count=count, **logits)


@pytest.mark.parametrize("tokens, count", [(1, None), (3, [3, 2])])
@pytest.mark.parametrize("logits", [{}, LOGITS[-1]])
def test_long_and_short_segments_in_groups(tokens, count, logits, monkeypatch):
    """Many lengths: each group is padded to its own longest segment, so far less is copied than all to the longest."""
    monkeypatch.setattr(decode, "FEW", 0)
    lengths = [[300, 3, 150, 40], [5, 3, 90, 9]]
    copied, select = [], torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda *a: copied.append(len(a[2])) or select(*a))
    planned(lengths, 2, tokens, 8, count=count, **logits)
    assert len(copied) > 2 and sum(copied) < 8 * 300 * 2 / 2


@pytest.mark.parametrize("tokens, count", [(1, None), (3, None), (3, [2, 3])])
@pytest.mark.parametrize("logits", [{}, LOGITS[-1]])
def test_equal_segments_are_read_in_place(tokens, count, logits, monkeypatch):
    """Laid out regularly they are not gathered; the rows behind their lengths are NaN and must not show."""
    monkeypatch.setattr(torch.Tensor, "index_select", None)
    planned([[9, 9], [9, 9]], 2, tokens, 8, shuffle=False, count=count, **logits)


def test_equal_room_and_other_lengths():
    store = naive.make_store([[9, 9]], 8, shuffle=False)
    plan = plan_of(store)
    store.length[0, 1] = 5
    check([[9, 5]], 2, 1, 8, store=store, plan=plan, backend="torch")


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_small_store_is_read_as_it_is(data):
    """A decode step copies nothing, and what lies outside of the segments does not show."""
    heads, group = data.draw(st.integers(2, 4)), data.draw(st.integers(1, 3))
    lengths = [[*data.draw(st.lists(st.integers(0, 40), min_size=heads - 1, max_size=heads - 1)), 41]]
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    store = naive.make_store(lengths, 4, dtype)
    plan = plan_of(store, heads * group)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "index_select", None)
        logits = data.draw(st.sampled_from([{}, *LOGITS]))
        check(lengths, group, 1, 4, dtype, store=store, plan=plan, backend="torch", **logits)
    check(lengths, group, 2, 4, dtype, store=store, plan=plan, backend="torch")


def test_what_a_plan_knows_of_the_layout():
    def of(*lengths, q_heads=4, head_dim=8, shuffle=True):
        return plan_of(naive.make_store(list(lengths), head_dim, shuffle=shuffle), q_heads)

    small = of([3, 40])
    assert small.stride is None and small.places.shape == (2, 1 + (3 + 3 + 1) + (40 + 3 + 1))
    assert of([3, 40], [5, 6]).places is None
    assert of([4000, 40], q_heads=32, head_dim=128).places is None
    assert of([9, 9], [9, 9], shuffle=False).stride == 9 + 3 + 1 and of([9]).stride == 9 + 3
    assert of(*[[9] * 6] * 2).stride is None  # alike, but in random order


def test_new_stores_are_finite_where_all_of_them_is_read(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda shape, **options: torch.full(shape, float("nan"), **options))
    start, capacity = (torch.tensor([x], dtype=torch.int32) for x in ([0, 3], [3, 5]))
    for x in decode_plan(start, capacity, 8, 2, 4).new_store(torch.bfloat16):
        assert x.shape == (8, 4) and x.dtype == torch.bfloat16 and not x.any()
    kinds = [decode_plan(start, capacity, 8, 2, 4), decode_plan(start.to("meta"), capacity.to("meta"), 8, 2, 4)]
    assert [type(kind) for kind in kinds] == [plans.CpuPlan, ReferencePlan]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_appends_like_the_loop(data):
    batch, heads, tokens = (data.draw(st.integers(1, 3)) for _ in range(3))
    row = st.lists(st.integers(0, 9), min_size=heads, max_size=heads)
    lengths = data.draw(st.lists(row, min_size=batch, max_size=batch))
    count = data.draw(st.none() | st.lists(st.integers(0, tokens), min_size=batch, max_size=batch))
    store = naive.make_store(lengths, 4, room=data.draw(st.integers(0, 4)))
    expected, plan = store.clone(), decode_plan(store.start, store.capacity, len(store.keys), heads, 4)
    new, overflow = torch.randn(2, batch, heads, tokens, 4), torch.zeros(1, dtype=torch.int32)
    new_count = None if count is None else torch.tensor(count, dtype=torch.int32)
    place = (store.keys, store.values, store.start, store.length, store.capacity)
    append(*place, *new, overflow, new_count, plan=plan, backend="torch")
    assert naive.append(expected, *new, count) == bool(overflow)
    for name in ("keys", "values", "start", "length", "capacity"):
        torch.testing.assert_close(getattr(store, name), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


def test_arguments_are_checked_until_a_decode_step_has_passed(monkeypatch):
    store = naive.make_store([[20, 7]], 8, room=9)
    plan, overflow = plan_of(store), torch.zeros(1, dtype=torch.int32)
    place = (store.keys, store.values, store.start, store.length)
    with pytest.raises(ValueError, match="length must be int32"):
        ragged_decode(torch.zeros(1, 4, 1, 8), *place[:3], store.length.long(), scaling=1.0, plan=plan)
    checks = []
    for name in ("append", "ragged_decode"):
        module = __import__(f"sparsemm_lmms.kernels.{name}", fromlist=["_check"])
        monkeypatch.setattr(module, "_check", lambda *_, name=name: checks.append(name))

    def step(tokens):
        new = torch.zeros(1, 2, tokens, 8)
        checks.clear()
        append(*place, store.capacity, new, new, overflow, plan=plan)
        ragged_decode(torch.zeros(1, 4, tokens, 8), *place, scaling=1.0, plan=plan)
        return list(checks)

    both = ["append", "ragged_decode"]
    assert [step(tokens) for tokens in (1, 1, 2, 1, 1)] == [both, [], both, both, []]
