"""Exact batches through the host's model: batch 8 is batch 1, in tokens and in kept positions, for every method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lmms_eval.models import get_model
from lmms_eval.models.model_utils import gen_metrics
from loguru import logger

from sparsemm_lmms.cache import RaggedCache
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers import engine as engines
from sparsemm_lmms.model_wrappers.lmms_eval.requests import by_size

from . import tiny
from .conftest import conversation, request

SIZES = [(84, 56), (56, 84), (28, 56), (112, 56), (84, 84), (56, 56)]
MIXED = [
    *(conversation(i, "What is it" + "?" * (3 * i), size=size) for i, size in enumerate(SIZES)),
    conversation(6, "Which of these?", images=3, size=(28, 56)),
    [{"role": "user", "content": [{"type": "text", "text": "No image at all, but many words to read."}]}],
    conversation(8, ""),
]


def load(name: str, model_args: str, size: int) -> Any:
    return get_model(name).create_from_arg_string(model_args, {"batch_size": size})


@pytest.fixture
def positions(monkeypatch: pytest.MonkeyPatch) -> list[list[Any]]:
    """For every batch that is answered: the kept positions of each of its sequences."""
    seen: list[list[Any]] = []

    def measured(cache: RaggedCache, *rest: Any) -> Any:
        layers = [cache.kept_positions(layer) for layer in range(tiny.LAYERS)]
        seen.append([[[h.tolist() for h in layer[b]] for layer in layers] for b in range(len(layers[0]))])
        return original(cache, *rest)

    original = engines.measured
    monkeypatch.setattr(engines, "measured", measured)
    return seen


@pytest.mark.parametrize(
    ("name", "agnostic"),
    [*((name, "false") for name in tiny.NAMES), ("llava_next_sparsemm", "true"), ("qwen2_vl_adakv", "true")],
)
def test_eight_together_are_eight_alone(
    name: str, agnostic: str, arguments: Callable[..., str], positions: list[list[Any]]
) -> None:
    """Images of different sizes, none and several; answers that end at a stop string or the end token early or late."""
    model = load(name, arguments(name, compress_before_question=agnostic), 1)
    stop = {"max_new_tokens": 9, "until": ["a", "e", "\n"]}
    asked = [request(model, messages, i, stop) for i, messages in enumerate(MIXED)]
    first = [request(model, messages, i, {"max_new_tokens": 7}) for i, messages in enumerate(MIXED[:2])]
    free = [result.text for result in model.generate_until(first)]
    ends = model.tokenizer("".join(text[len(text) // 2 :][:1] for text in free))["input_ids"]
    model.engine.eos = sorted({*model.engine.eos, *ends})  # so that some answers end at an end token, on the way
    positions.clear()
    alone = model.generate_until(asked)
    kept = [batch[0] for batch in positions]
    positions.clear()
    model.options = type(model.options)(**{**vars(model.options), "batch_size": 8})
    together = model.generate_until(asked)
    assert [result.text for result in together] == [result.text for result in alone]
    counts = [(result.token_counts.input_tokens, result.token_counts.output_tokens) for result in together]
    assert counts == [(result.token_counts.input_tokens, result.token_counts.output_tokens) for result in alone]
    assert len({output for _, output in counts}) > 1  # the answers end at different steps
    smaller = [result.token_counts.kept_tokens < result.token_counts.input_tokens for result in together]
    assert any(smaller) == METHODS[model.method].compresses
    assert [len(batch) for batch in positions] == [8, 1]
    sizes = [size for size, _ in counts]
    order = sorted(range(len(MIXED)), key=lambda i: -sizes[i])
    assert [sequence for batch in positions for sequence in batch] == [kept[i] for i in order]


def test_similar_sizes_share_a_batch_and_few_items_are_held() -> None:
    held = []
    sizes = [5, 1, 9, 2, 8, 7, 3, 3, 6, 4]

    def size(i: int, item: int) -> int:
        return abs(item)

    batches = [[i for i, _ in b] for b in by_size(range(10), lambda i: held.append(i) or sizes[i], size, 2, ahead=3)]
    assert batches == [[2, 4], [5, 0], [3, 1], [8, 9], [6, 7]]
    held.clear()
    next(iter(by_size(range(10), lambda i: held.append(i) or sizes[i], size, 2, ahead=3)))
    assert held == [0, 1, 2, 3, 4, 5]
    assert [i for batch in by_size([4, 2, 0], lambda i: i, size, 1) for i, _ in batch] == [4, 2, 0]


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Memory for so many prompt columns in a batch."""

    def limit(model: Any, columns: int) -> None:
        stock = model.model.generate

        def generate(**kwargs: Any) -> torch.Tensor:
            if kwargs["input_ids"].numel() > columns:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return stock(**kwargs)

        monkeypatch.setattr(model.model, "generate", generate)

    return limit


def test_a_document_that_does_not_fit_stops_the_run_by_name(arguments: Callable[..., str], small_memory: Any) -> None:
    model = load("qwen2_vl_snapkv", arguments("qwen2_vl_snapkv"), 4)
    asked = [request(model, messages, 10 + i, {"max_new_tokens": 3}) for i, messages in enumerate(MIXED[:7])]
    sizes = [model.engine.size(model.engine.prompt(messages)) for messages in MIXED[:7]]
    largest = sizes.index(max(sizes))
    small_memory(model, max(sizes) - 1)
    with pytest.raises(RuntimeError, match=f"^Document {10 + largest} of task task .* skip_oom=true") as caught:
        model.generate_until(asked)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert not model.model.config.get_text_config()._attn_implementation.startswith("ragged")


def test_such_documents_are_left_out_on_request(arguments: Callable[..., str], small_memory: Any) -> None:
    model = load("qwen2_vl_snapkv", arguments("qwen2_vl_snapkv", skip_oom="true"), 4)
    asked = [request(model, messages, i, {"max_new_tokens": 3}) for i, messages in enumerate(MIXED[:7])]
    wanted = [result.text for result in model.generate_until(asked)]
    sizes = [model.engine.size(model.engine.prompt(messages)) for messages in MIXED[:7]]
    largest = sizes.index(max(sizes))
    small_memory(model, max(sizes) - 1)  # so that batches do not fit either, and are tried one by one
    gen_metrics.reset_logged_metrics()
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    found = [result.text for result in model.generate_until(asked)]
    logger.remove(sink)
    assert found == [*wanted[:largest], "", *wanted[largest + 1 :]]
    numbers = gen_metrics.get_logged_metrics_history()[-1]
    assert (numbers["num_requests"], numbers["skipped_oom"]) == (6, 1)
    share = "1 of 7 requests did not fit into memory and count as empty answers"
    assert lines[-1] == f"{share}: Document {largest} of task task (test).\n"
    assert any(line.startswith(f"Document {largest} of task task (test) does not fit") for line in lines)


def test_other_errors_are_no_lack_of_memory(arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load("qwen2_vl_snapkv", arguments("qwen2_vl_snapkv", skip_oom="true"), 1)

    def fail(**kwargs: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(model.model, "generate", fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        model.generate_until([request(model, MIXED[0], 0, {})])


def test_a_likelihood_that_does_not_fit_stops_even_then(
    arguments: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is no loss that would not be a guess."""
    from lmms_eval.api.instance import Instance

    model = load("qwen2_vl_snapkv", arguments("qwen2_vl_snapkv", skip_oom="true"), 1)
    model.task_dict["t"] = {"test": {7: "document"}}
    asked = Instance(
        "loglikelihood", ("q", " a", lambda _: [], 7, "t", "test"), 0, {"task": "t", "doc_id": 7, "repeats": 1}
    )

    def fail(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("sparsemm_lmms.model_wrappers.likelihood.run", fail)
    with pytest.raises(RuntimeError, match="Document 7 of task t .test. does not fit"):
        model.loglikelihood([asked])
