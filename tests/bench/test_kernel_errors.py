"""A kernel that fails stops the evaluation with its message; nobody gets an empty answer for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wrappers.conftest import arguments, checkpoints, conversation, png, request, scores, task
from tests.wrappers.test_evaluate import GREEDY, evaluate, load

__all__ = ["arguments", "checkpoints", "scores", "task"]  # fixtures


def broken(*args, **kwargs):
    raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


@pytest.mark.parametrize(
    "kernel",
    ["sparsemm_lmms.cache.append", "sparsemm_lmms.cache.evict", "sparsemm_lmms.cache.ragged_decode",
     "sparsemm_lmms.scorers.window_attention.window_score"],
)  # fmt: skip
def test_through_the_evaluator(
    kernel: str, arguments: Callable[..., str], task: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        evaluate("qwen2_vl_sparsemm", arguments("qwen2_vl_sparsemm"), task([png(0)]))


def test_in_the_middle_of_an_answer(arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifth token fails: the four before are no answer, and the model is the stock model again."""
    from sparsemm_lmms import cache

    model, calls, works = load("llava_next_snapkv", arguments("llava_next_snapkv")), [], cache.ragged_decode

    def breaks_later(*args, **kwargs):
        calls.append(1)
        return works(*args, **kwargs) if len(calls) <= 12 else broken()

    monkeypatch.setattr(cache, "ragged_decode", breaks_later)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        model.generate_until([request(model, conversation(0), 0, {**GREEDY, "max_new_tokens": 40})])
    assert len(calls) == 13
    assert model.model.config.get_text_config()._attn_implementation == "sdpa"


def test_a_full_segment(arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's overflow flag is read before an answer is handed out."""
    from sparsemm_lmms.cache import RaggedLayer

    model = load("llava_next_snapkv", arguments("llava_next_snapkv"))
    monkeypatch.setattr("sparsemm_lmms.model_wrappers.engine.HEADROOM", 2)
    monkeypatch.setattr(RaggedLayer, "reserve", lambda self, tokens: None)
    with pytest.raises(RuntimeError, match="ran out of room"):
        model.generate_until([request(model, conversation(0), 0, {**GREEDY, "max_new_tokens": 40})])


@pytest.mark.parametrize(
    "mode, message", [("on", "cuda_graph=on needs a CUDA device, but the model is on cpu"), ("yes", "cuda_graph")]
)
def test_a_graph_that_cannot_be_had(arguments: Callable[..., str], mode: str, message: str) -> None:
    """Refused when the model is made, before any prompt."""
    with pytest.raises(ValueError, match=message):
        load("llava_next_snapkv", arguments("llava_next_snapkv", cuda_graph=mode))


def test_the_stock_loop_answers_the_same(arguments: Callable[..., str]) -> None:
    answers = []
    for mode in ("auto", "off"):
        model = load("llava_next_snapkv", arguments("llava_next_snapkv", cuda_graph=mode))
        assert model.engine.cuda_graph == mode and model.settings()["cuda_graph"] == mode
        answers.append(model.generate_until([request(model, conversation(i), i, GREEDY) for i in range(3)]))
    assert [a.text for a in answers[0]] == [a.text for a in answers[1]]
