"""What a run measured, against sums and sorted lists: batches of several answers, padding, calls and processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.model_wrappers.engine import Answer, Batch, Engine, kept_tokens
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.lmms_eval import statistics
from sparsemm_lmms.model_wrappers.lmms_eval.statistics import CacheTokenCounts, RunStatistics

from .conftest import conversation

CPU = torch.device("cpu")
SHARED = ("kv_bytes", "kv_bytes_used", "kv_bytes_full")
times = st.floats(0.001, 9, allow_nan=False)


def batch(answers: list[Answer], **more: Any) -> Batch:
    given = dict(elapsed=2.0, ttft=0.5, tpot=0.125, kv_bytes=1000, kv_bytes_used=700, kv_bytes_full=4000)
    return Batch(answers, ["?"] * len(answers), **(given | {"nominal_budget": 24} | more))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Batch, list[bool]]:
    """A batch, and which of its answers are real requests."""
    count = draw(st.integers(1, 4))
    answers = [
        Answer("", draw(st.integers(1, 9)), draw(st.integers(1, 99)), draw(st.floats(0, 99))) for _ in range(count)
    ]
    made = batch(
        answers,
        elapsed=draw(times),
        ttft=draw(times),
        tpot=draw(st.none() | times),
        nominal_budget=draw(st.none() | st.integers(1, 64)),
        **{name: draw(st.integers(0, 3) | st.integers(1, 10**6)) for name in SHARED},
    )
    return made, draw(st.lists(st.booleans(), min_size=count, max_size=count))


def middle(values: list[float]) -> float:
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.lists(batches(), max_size=3), min_size=1, max_size=3))
def test_numbers_are_means_over_real_requests(calls: list[list[tuple[Batch, list[bool]]]]) -> None:
    parts = []
    for call in calls:
        parts.append(RunStatistics.start(CPU))
        for made, real in call:
            parts[-1].add(made, real)
    found = RunStatistics.merged(CPU, parts)
    measured = [(made, real) for call in calls for made, real in call if any(real)]
    requests = [(made, a) for made, real in measured for a, counted in zip(made.answers, real, strict=True) if counted]
    assert found.elapsed == pytest.approx(sum(made.elapsed for made, _ in measured))
    assert found.output_tokens == sum(a.output_tokens for _, a in requests)
    metrics = found.metrics()
    assert metrics.pop("num_requests") == len(requests)
    assert metrics.pop("peak_memory") == max(part.peak_bytes for part in parts)
    assert (found.peak_bytes > 0) == bool(measured)
    values: dict[str, list[float]] = {
        "ttft_ms": [1000 * made.ttft for made, _ in requests],
        "tpot_ms": [1000 * made.tpot for made, _ in requests if made.tpot is not None],
        "kept_tokens": [a.kept_tokens for _, a in requests],
        "prompt_tokens": [a.prompt_tokens for _, a in requests],
        "nominal_budget": [made.nominal_budget for made, _ in requests if made.nominal_budget is not None],
        **{name: [getattr(made, name) / len(made.answers) for made, _ in requests] for name in SHARED},
    }
    wanted = {name: sum(column) / len(column) for name, column in values.items() if column}
    wanted |= {f"{name}_median": middle(values[name]) for name in ("ttft_ms", "tpot_ms") if values[name]}
    assert metrics == pytest.approx(wanted)


def test_bytes_of_two_answers_and_a_padding_row() -> None:
    """Three rows share the store, one of them only fills the batch."""
    run = RunStatistics.start(CPU)
    run.add(batch([Answer("", 3, 40, 24.0), Answer("", 5, 20, 20.0), Answer("", 7, 40, 24.0)]), [True, True, False])
    assert run.output_tokens == 8 and len(run.rows) == 2
    assert [row["kept_tokens"] for row in run.rows] == [24.0, 20.0]
    assert [row["kv_bytes"] for row in run.rows] == pytest.approx([1000 / 3] * 2)
    assert run.metrics()["kv_bytes_full"] == pytest.approx(4000 / 3)
    run.add(batch([Answer("", 9, 9, 9.0)]), [False])
    assert (run.elapsed, run.output_tokens, len(run.rows)) == (2.0, 8, 2)  # nothing real: no time either


def test_calls_add_up_and_processes_run_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (
        RunStatistics(CPU, [{"ttft_ms": t}], n, e, p, s)
        for t, n, e, p, s in [(1.0, 3, 2.0, 70, 1), (3.0, 5, 7.0, 50, 2)]
    )
    both = RunStatistics.merged(CPU, [one, two])
    assert (both.elapsed, both.output_tokens, both.peak_bytes, both.skipped_oom) == (9.0, 8, 70, 3)
    assert both.metrics() == {"num_requests": 2, "ttft_ms": 2, "ttft_ms_median": 2, "skipped_oom": 3, "peak_memory": 70}
    monkeypatch.setattr(statistics, "gather", lambda part: [part, two])
    beside = one.gathered()
    assert (beside.elapsed, beside.output_tokens, beside.peak_bytes, beside.skipped_oom) == (7.0, 8, 70, 3)
    assert [row["ttft_ms"] for row in beside.rows] == [1.0, 3.0]
    assert one.elapsed == 2.0
    empty = RunStatistics.merged(CPU, [])
    assert (empty.elapsed, empty.peak_bytes, empty.rows) == (0, 0, [])


def test_the_host_is_told_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(statistics, "log_metrics", lambda *args, **more: told.append((args, more)))
    run = RunStatistics(CPU, [{"ttft_ms": 1.0}], 12, 4.0)
    run.log()
    assert told == [((4.0, 12, 3.0), {"additional_metrics": run.metrics()})]
    RunStatistics(CPU).log()
    assert len(told) == 1  # nothing was measured
    RunStatistics(CPU, skipped_oom=2).log()
    assert told[1] == ((0.0, 0, 0.0), {"additional_metrics": {"num_requests": 0, "skipped_oom": 2, "peak_memory": 0}})


def test_a_sample_tells_its_share_of_the_batch() -> None:
    answers = [Answer("", 3, 40, 24.00006), Answer("", 5, 20, 20.0), Answer("", 7, 40, 24.0)]
    counts = CacheTokenCounts.of(answers[0], batch(answers, ttft=0.0123456, tpot=0.0012345))
    assert (counts.input_tokens, counts.output_tokens, counts.kept_tokens) == (40, 3, 24.0001)
    assert (counts.kv_bytes, counts.ttft_ms, counts.tpot_ms) == (333.3, 12.346, 1.234)
    assert counts.to_dict().items() >= {"kept_tokens": 24.0001, "kv_bytes": 333.3, "ttft_ms": 12.346}.items()
    assert CacheTokenCounts.of(answers[0], batch(answers, tpot=None)).tpot_ms is None
    assert CacheTokenCounts.of(answers[1]).kv_bytes is None


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "question unseen"])
def test_kept_tokens_of_each_answer(engine: Engine, beams: int, split: bool) -> None:
    """Prompts below and above the budget in one batch; every beam of a prompt holds the same."""
    talks = [
        [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        conversation(1, "What is it, and where does it stand?"),
        [{"role": "user", "content": [{"type": "text", "text": "Yes?"}]}],
    ]
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": split}
    settings = GenerationSettings(max_new_tokens=3, num_beams=beams)
    with compress(engine.model, CompressionConfig(method="snapkv", budget=30, window_size=8)) as session:
        made = told.generate(session, talks, settings)
        rows = session.cache.kept_per_head()
    prompts = [engine.batch_inputs([engine.prompt(talk)])["input_ids"].shape[1] for talk in talks]
    questions = [1, len("What is it, and where does it stand?assistant: "), 1] if split else [0, 0, 0]
    wanted = [min(n - q, 30) + q for n, q in zip(prompts, questions, strict=True)]
    assert [a.prompt_tokens for a in made.answers] == prompts and prompts[0] < prompts[2] < 30 < prompts[1]
    assert [a.kept_tokens for a in made.answers] == wanted
    assert rows.shape[1] == 3 * beams
    assert kept_tokens(session.cache, prompts, beams) == wanted
