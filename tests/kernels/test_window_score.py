import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.kernels import window_score

from . import naive

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = next(
    (path for path in (ROOT / "tests/data/golden", ROOT.parent / "shared/golden") if (path / "cases.json").exists()),
    None,
)
# Scores are float32 whatever the inputs: products of 16-bit numbers are exact in float32, so only the order of the sums
# and the exponentials differ. An exponential of logits near 20 has a relative error of about 20 * 2^-24 = 1e-6.
RELATIVE = 2e-5


def compare(got, expected):
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.cpu().double(), expected.cpu().double(), rtol=RELATIVE, atol=1e-9)


def inputs(batch, q_heads, kv_heads, window, n, head_dim, dtype=torch.float32):
    query = torch.randn(batch, q_heads, window, head_dim)
    key = torch.randn(batch, kv_heads, n, head_dim) * 1.5
    return query.to(dtype), key.to(dtype)


CASES = [
    dict(shape=(1, 2, 2, 32, 97, 64)),  # one kv head a query head
    dict(shape=(2, 7, 1, 8, 133, 80), pad=[0, 13]),
    dict(shape=(2, 4, 1, 5, 40, 96), pad=[3, 0], dtype=torch.float16, kernel_size=7),
    dict(shape=(1, 4, 2, 33, 150, 128), kernel_size=1),  # two blocks of query rows
    dict(shape=(1, 1, 1, 1, 2, 128)),  # one position to score
    dict(shape=(1, 1, 1, 4, 1000, 32), kernel_size=3),  # several splits
]
POOLS = [("avgpool", "mean"), ("maxpool", "max")]
LOGITS = [dict(softcap=0.7), dict(sinks=torch.float32), dict(softcap=1.5, sinks=torch.float16)]


def check(
    shape,
    pooling,
    gqa_func,
    pad=None,
    dtype=torch.float32,
    kernel_size=5,
    reference=None,
    device="cpu",
    softcap=None,
    sinks=None,
    **where,
):
    """`sinks`: their dtype, or None."""
    query, key = inputs(*shape, dtype)
    scaling = shape[-1] ** -0.5
    settings = dict(kernel_size=kernel_size, pooling=pooling, gqa_func=gqa_func)
    tensor_pad = None if pad is None else torch.tensor(pad, dtype=torch.int32, device=device)
    query, key = query.to(device), key.to(device)
    settings["softcap"] = softcap
    if sinks is not None:
        settings["sinks"] = (torch.randn(shape[:2]) * 3).to(device, sinks)
    got = window_score(query, key, scaling=scaling, pad=tensor_pad, **settings, **where)
    if reference is None:
        expected = naive.window_score(query, key, scaling, pad=pad, **settings)
    else:
        expected = window_score(query, key, scaling=scaling, pad=tensor_pad, **settings, backend=reference)
    compare(got, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pooling, gqa_func", [*POOLS, ("avgpool", "max"), ("maxpool", "mean")])
def test_torch(case, pooling, gqa_func):
    check(**case, pooling=pooling, gqa_func=gqa_func, backend="torch")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("logits", LOGITS)
def test_torch_with_cap_and_sinks(case, logits):
    check(**case, **logits, pooling="avgpool", gqa_func="mean", backend="torch")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("logits", LOGITS)
def test_interpreter_with_cap_and_sinks(case, logits, interpreter):
    check(**case, **logits, pooling="maxpool", gqa_func="max", reference="torch", backend="triton")


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_interpreter_one_sink_a_head_for_all_sequences(backend, interpreter):
    query, key = inputs(2, 4, 2, 6, 50, 16)
    sinks = torch.randn(4)
    got = window_score(query, key, scaling=0.25, sinks=sinks, backend=backend)
    compare(got, naive.window_score(query, key, 0.25, 5, "avgpool", "mean", sinks=sinks.expand(2, -1)))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("pooling, gqa_func", POOLS)
def test_interpreter(case, pooling, gqa_func, interpreter):
    check(**case, pooling=pooling, gqa_func=gqa_func, reference="torch", backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [
        *({k: v for k, v in case.items() if k != "dtype"} for case in CASES),
        dict(shape=(1, 28, 4, 32, 5000, 128)),
        dict(shape=(2, 32, 32, 32, 3001, 128), pad=[0, 2990]),
    ],
)
@pytest.mark.parametrize("pooling, gqa_func", POOLS)
@pytest.mark.parametrize("logits", [{}, LOGITS[-1]])
def test_gpu(case, dtype, pooling, gqa_func, logits):
    """float32 within 2e-5 also shows that it does not go through tf32 (2^-11 relative in each factor)."""
    check(**case, **logits, dtype=dtype, pooling=pooling, gqa_func=gqa_func, reference="torch", device="cuda")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_torch_like_the_loop(data):
    kv_heads, group, window = (data.draw(st.integers(1, 3)) for _ in range(3))
    length = data.draw(st.integers(1, 9))
    pad = data.draw(st.none() | st.lists(st.integers(0, length - 1), min_size=2, max_size=2))
    check(
        (2, kv_heads * group, kv_heads, window, length + window, 4),
        data.draw(st.sampled_from(["avgpool", "maxpool"])),
        data.draw(st.sampled_from(["mean", "max"])),
        pad=pad,
        kernel_size=data.draw(st.sampled_from([1, 3, 5, 7])),
    )


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
def test_left_padding_equals_the_sequence_alone(pooling):
    query, key = inputs(1, 4, 2, 6, 50, 16)
    padded = torch.cat([torch.full((1, 2, 9, 16), 1e4), key], 2)  # large keys: they would draw all attention
    alone = window_score(query, key, scaling=0.25, pooling=pooling)
    pad = torch.tensor([9], dtype=torch.int32)
    got = window_score(query, padded, scaling=0.25, pooling=pooling, pad=pad)
    assert got[..., :9].eq(float("-inf")).all()
    compare(got[..., 9:], alone)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("pad", [45, 47, 50])
@pytest.mark.parametrize("sinks", [None, torch.tensor([-500.0, 500.0])])
def test_interpreter_sequences_inside_the_window_have_no_nan(backend, pad, sinks, interpreter):
    query, key = inputs(1, 2, 1, 5, 50, 16)
    pad = torch.tensor([pad], dtype=torch.int32)
    score = window_score(query, key, scaling=0.25, pad=pad, sinks=sinks, backend=backend)
    assert not score.isnan().any()


def test_probabilities_add_up():
    """Unpooled mean scores and the window's own columns are one probability distribution."""
    query, key = inputs(1, 1, 1, 1, 30, 16)
    score = window_score(query, key, scaling=0.25, kernel_size=1)
    own = torch.softmax(key[0, 0] @ query[0, 0, 0] * 0.25, 0)[-1]
    torch.testing.assert_close(score.sum() + own, torch.tensor(1.0))


def test_nothing_before_the_window():
    query, key = inputs(1, 2, 1, 5, 5, 16)
    assert window_score(query, key, scaling=1.0).shape == (1, 1, 0)


def golden_cases():
    if GOLDEN is None:
        return []
    cases = json.loads((GOLDEN / "cases.json").read_text())["cases"]
    return [case for case in cases if case["method"] == "snapkv" and case["compressed"]]


def check_golden(case, **where):
    arrays = np.load(GOLDEN / "selection.npz")
    query, key = (torch.from_numpy(arrays[case["arrays"][name]]).float()[None] for name in "qk")
    window = case["window_size"]
    score = window_score(
        query[:, :, -window:].to(where.get("device", "cpu")),
        key.to(where.get("device", "cpu")),
        scaling=case["head_dim"] ** -0.5,
        kernel_size=case["kernel_size"],
        pooling=case["pooling"],
        gqa_func=case["gqa_func"],
        backend=where.get("backend", "auto"),
    )
    kept = score.topk(case["budget"] - window, -1).indices.sort(-1).values[0].cpu()
    own = torch.arange(case["length"] - window, case["length"]).expand(kept.shape[0], -1)
    expected = arrays[case["arrays"]["kept"]]
    assert torch.cat([kept, own], -1).flatten().tolist() == expected.tolist()


@pytest.mark.skipif(GOLDEN is None, reason="golden selections neither in tests/data/golden nor in ../shared/golden")
def test_golden_cases_are_all_here():
    assert len(golden_cases()) == 23


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["id"])
def test_golden_snapkv(case):
    check_golden(case)


@pytest.mark.parametrize("case", [c for c in golden_cases() if c["length"] <= 300][::2], ids=lambda case: case["id"])
def test_golden_snapkv_interpreter(case, interpreter):
    check_golden(case, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["id"])
def test_golden_snapkv_gpu(case):
    check_golden(case, device="cuda")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(key=torch.zeros(1, 2, 9, 4)), "must agree in batch, head_dim and dtype"),
        (dict(key=torch.zeros(1, 2, 9, 8, dtype=torch.float16)), "must agree in batch, head_dim and dtype"),
        (dict(key=torch.zeros(1, 3, 9, 8)), "4 query heads are no multiple of 3"),
        (dict(key=torch.zeros(1, 2, 2, 8)), "window of 3 queries"),
        (dict(kernel_size=4), "odd"),
        (dict(pooling="max"), "pooling must be one of"),
        (dict(gqa_func="sum"), "gqa_func must be one of"),
        (dict(pad=torch.zeros(2, dtype=torch.int32)), "pad must have shape"),
        (dict(query=torch.zeros(1, 4, 8, 3).transpose(2, 3)), "contiguous in its last dimension"),
        (dict(backend="cuda"), "backend must be one of"),
        (dict(softcap=-1.0), "softcap must be positive, got -1.0"),
        (dict(sinks=torch.zeros(3)), r"sinks must have shape \(4,\) or \(1, 4\), got \(3,\)"),
    ],
)
def test_wrong_arguments(change, message):
    arguments = dict(query=torch.zeros(1, 4, 3, 8), key=torch.zeros(1, 2, 9, 8), scaling=1.0)
    with pytest.raises(ValueError, match=message):
        window_score(**{**arguments, **change})
