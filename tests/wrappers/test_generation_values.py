"""Prompts and answers in numbers: sizes, padding, the order of pictures, lengths, rooms and bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig, compress, step_clock
from sparsemm_lmms.model_wrappers.arguments import RunOptions
from sparsemm_lmms.model_wrappers.engine import HEADROOM, Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings, StepClock
from sparsemm_lmms.model_wrappers.loading import load_checkpoint

from . import tiny
from .conftest import FAMILIES, conversation

BUDGET = 12
TALKS = [
    conversation(1, "What is it?"),
    conversation(2, "Which of these?", images=3, size=(28, 56)),
    [{"role": "user", "content": [{"type": "text", "text": "No image at all."}]}],
    conversation(4, "And here, please?", size=(112, 56)),
]


@pytest.mark.parametrize("family", sorted(tiny.MAKERS))
def test_a_prompt_is_as_long_as_it_says(family: str, checkpoints: dict[str, Path]) -> None:
    engine = Engine(load_checkpoint(FAMILIES[family], RunOptions(str(checkpoints[family])), torch.device("cpu")))
    prompts = [engine.prompt(talk) for talk in TALKS]
    alone = [engine.batch_inputs([prompt]) for prompt in prompts]
    lengths = [inputs["input_ids"].shape[1] for inputs in alone]
    assert [engine.size(prompt) for prompt in prompts] == lengths
    batch = engine.batch_inputs(prompts)
    for row, (inputs, length) in enumerate(zip(alone, lengths, strict=True)):
        pad = max(lengths) - length
        assert batch["input_ids"][row].tolist() == [engine.pad] * pad + inputs["input_ids"][0].tolist()
        assert batch["attention_mask"][row].tolist() == [0] * pad + [1] * length
    assert [len(prompt.images) for prompt in prompts] == [1, 3, 0, 1]
    sizes = "image_sizes" if family == "llava_next" else "image_grid_thw"
    assert torch.equal(batch[sizes], torch.cat([inputs[sizes] for inputs in alone if sizes in inputs]))


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.data())
def test_answers_end_with_their_first_end_token(data: st.DataObject) -> None:
    """Several ends, tokens behind them, stop strings, white space."""
    letters = {3: "a", 4: "b", 5: " ", 6: "c"}
    decode = lambda rows, **_: ["".join(letters.get(int(t), "") for t in row) for row in rows]  # noqa: E731
    engine: Any = Engine.__new__(Engine)
    engine.eos, engine.strip_answers, engine.thinks = [1, 2], data.draw(st.booleans()), False
    engine.processor = type(
        "Processor", (), {"tokenizer": type("Tokenizer", (), {"batch_decode": staticmethod(decode)})}
    )
    width, batch = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 3))
    row = st.lists(st.sampled_from([3, 4, 5, 6, 0, 3, 4, 6, 1, 2]), min_size=width, max_size=width)
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    until = tuple(data.draw(st.lists(st.sampled_from(["b", "ab", "c", "ca"]), max_size=3)))
    made = engine._answers(torch.tensor(rows), [9] * batch, [4.5] * batch, GenerationSettings(7, until=until))
    for found, tokens in zip(made, rows, strict=True):
        ends = [i for i, token in enumerate(tokens) if token in (1, 2)]
        length = ends[0] + 1 if ends else width
        text = "".join(letters.get(token, "") for token in tokens[:length])
        for n in range(len(text) + 1):  # the shortest beginning behind which a stop string stands
            if any(text[n:].startswith(stop) for stop in until):
                text = text[:n]
                break
        assert (found.text, found.output_tokens) == (text.strip() if engine.strip_answers else text, length)
        assert (found.prompt_tokens, found.kept_tokens) == (9, 4.5)


@pytest.mark.parametrize("split", [False, True], ids=["whole", "question unseen"])
@pytest.mark.parametrize("most", [5, 500])
def test_bytes_of_a_short_answer(engine: Engine, most: int, split: bool) -> None:
    """The room is what may be written, up to `HEADROOM`; the last token of an answer is never fed back."""
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": split}
    talks = [TALKS[0], TALKS[3]]
    with compress(engine.model, CompressionConfig(method="snapkv", budget=BUDGET, window_size=8)) as session:
        free = told.generate(session, talks, GenerationSettings(4))
        ids = [engine.processor.tokenizer(a.text)["input_ids"] for a in free.answers]
        told.eos = sorted({row[2] for row in ids if len(row) > 2})
        made = told.generate(session, talks, GenerationSettings(most))
        appended = session.cache.layers[0].appended
    written = max(a.output_tokens for a in made.answers)
    assert written < 5 <= most and len(told.eos) > 0
    heads = engine.model.config.get_text_config().num_key_value_heads
    row = 2 * 8 * 4 * heads * tiny.LAYERS
    lengths = [engine.batch_inputs([engine.prompt(talk)])["input_ids"].shape[1] for talk in talks]
    questions = [len(f"{q}assistant: ") if split else 0 for q in ("What is it?", "And here, please?")]
    room = min(most, HEADROOM) + max(questions)
    assert appended == written - 1 + max(questions)
    kept = [min(n - q, BUDGET) for n, q in zip(lengths, questions, strict=True)]
    assert made.kv_bytes == row * (sum(kept) + 2 * room)
    assert made.kv_bytes_used == row * (sum(kept) + 2 * (written - 1) + sum(questions))
    assert made.kv_bytes_full == row * (sum(lengths) + 2 * (written - 1))
    assert [a.kept_tokens for a in made.answers] == [k + q for k, q in zip(kept, questions, strict=True)]
    assert kept == [BUDGET, BUDGET]


def test_times_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefill until 3, tokens at 3, 5, 9, stopped at 10: 7 seconds for two steps."""
    ticks = iter([1.0, 3.0, 10.0])
    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: next(ticks))
    clock = StepClock(torch.device("cpu"))
    for _ in range(3):
        assert clock(torch.ones(2, 5), None).tolist() == [False, False]
    clock.stop()
    assert (clock.ttft, clock.tpot, clock.elapsed) == (2.0, 3.5, 9.0)
    ticks = iter([1.0, 3.0, 4.0])
    clock = StepClock(torch.device("cpu"))
    clock(torch.ones(1, 5), None)
    clock.stop()
    assert (clock.ttft, clock.tpot, clock.elapsed) == (2.0, None, 3.0)
    ticks = iter([1.0, 4.5])
    clock = StepClock(torch.device("cpu"))
    clock.stop()
    assert (clock.ttft, clock.tpot) == (3.5, None)  # nothing generated: likelihoods
