"""Batches through a real (tiny) model: the same text as stock transformers, alone or in a batch."""

from __future__ import annotations

from typing import Any

import torch
from lmms_eval.protocol import ChatMessages

from sparsemm_lmms import CompressionConfig, HeadScores, compress
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.prefill import question_starts

from .conftest import conversation

SETTINGS = GenerationSettings(max_new_tokens=10)
MIXED = [
    conversation(1, "What is it?"),
    conversation(2, "Read the text, please, from left to right.", size=(56, 84)),
    conversation(3, "Which of these?", images=3, size=(28, 56)),
    [{"role": "user", "content": [{"type": "text", "text": "No image at all."}]}],
]


def answers(engine: Engine, conversations: list[Any], size: int, **config: Any) -> list[str]:
    scores = HeadScores.random(3, 4, seed=1) if METHODS[config["method"]].needs_head_scores else None
    with compress(engine.model, CompressionConfig(**config), scores) as session:
        batches = [conversations[i : i + size] for i in range(0, len(conversations), size)]
        return [a.text for batch in batches for a in engine.generate(session, batch, SETTINGS).answers]


def stock(engine: Engine, messages: list[Any]) -> str:
    """What lmms-eval's own chat model does (`models/chat/huggingface.py`): its template call, one prompt, generate."""
    chat = ChatMessages(messages=messages)
    text = engine.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
    images = chat.extract_media()[0]
    inputs = engine.processor(text=[text], images=images or None, padding=True, return_tensors="pt")
    out = engine.model.generate(**inputs, do_sample=False, max_new_tokens=SETTINGS.max_new_tokens)
    return engine.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_fullkv_is_stock_transformers(engine: Engine) -> None:
    wanted = [stock(engine, messages) for messages in MIXED]
    assert len(set(wanted)) == len(wanted) and all(wanted)  # the images and questions matter
    assert answers(engine, MIXED, 1, method="fullkv") == wanted
    assert answers(engine, MIXED, 4, method="fullkv") == wanted
    assert [stock(engine, messages) for messages in MIXED] == wanted  # and the model is stock again


def test_the_question_unseen(engine: Engine) -> None:
    """What ends with the last image is compressed on its own, and the question stays whole; stock with all kept."""
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": True}
    beams = GenerationSettings(max_new_tokens=10, num_beams=2)
    with compress(engine.model, CompressionConfig(method="fullkv")) as session:
        wanted = [answer.text for answer in told.generate(session, MIXED, SETTINGS).answers]
        searched = [answer.text for answer in told.generate(session, MIXED, beams).answers]
    assert wanted == [stock(engine, messages) for messages in MIXED]
    for method in ("snapkv", "sparsemm", "pyramidkv", "adakv", "random", "local_window"):
        assert answers(told, MIXED, 4, method=method, budget=4096, window_size=8) == wanted
    with compress(engine.model, CompressionConfig(method="snapkv", budget=4096)) as session:
        assert [answer.text for answer in told.generate(session, MIXED, beams).answers] == searched
    with compress(engine.model, CompressionConfig(method="snapkv", budget=24, window_size=8)) as session:
        small = told.generate(session, MIXED, SETTINGS)
        first = MIXED[2]
        ids = engine.batch_inputs([engine.prompt(first)])["input_ids"]
        begin = int(question_starts(engine.model, ids))
        told.generate(session, [first], SETTINGS)
        kept = session.cache.kept_positions(0)[0][0]
    assert begin == ids.shape[1] - len("Which of these?assistant: ")
    assert len(kept) == 24 and kept[-8:].tolist() == list(range(begin - 8, begin))
    assert small.answers[2].kept_tokens == 24 + ids.shape[1] - begin
    assert small.answers[3].kept_tokens == 24 + 1  # without an image: all but the last token


def test_statistics_of_a_batch(engine: Engine) -> None:
    with compress(engine.model, CompressionConfig(method="snapkv", budget=24, window_size=8)) as session:
        batch = engine.generate(session, MIXED, SETTINGS)
    prompts = [engine.batch_inputs([engine.prompt(messages)])["input_ids"].shape[1] for messages in MIXED]
    assert [answer.prompt_tokens for answer in batch.answers] == prompts
    assert [answer.kept_tokens for answer in batch.answers] == [24.0 if n > 24 else n for n in prompts]
    text = engine.model.config.get_text_config()
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * 4 if hasattr(text, "head_dim") else 0
    row = row or 2 * text.num_hidden_layers * text.num_key_value_heads * 8 * 4
    assert batch.kv_bytes == row * sum(answer.kept_tokens + 10 for answer in batch.answers)  # room for 10 new tokens
    assert batch.kv_bytes_used <= batch.kv_bytes
    assert batch.kv_bytes_full - batch.kv_bytes_used == row * sum(
        n - a.kept_tokens for n, a in zip(prompts, batch.answers, strict=True)
    )
    assert batch.nominal_budget == 24
    assert 0 < batch.ttft < batch.elapsed and 0 < batch.tpot < batch.elapsed


def test_output_tokens_count_the_end_token_but_no_padding(engine: Engine) -> None:
    end, pad = engine.processor.tokenizer.eos_token_id, engine.pad
    letters = engine.processor.tokenizer("abc")["input_ids"]
    generated = torch.tensor([[*letters, end, pad], [letters[0], letters[0], letters[1], letters[2], letters[2]]])
    rows = engine._answers(generated, [9, 9], [9.0, 9.0], GenerationSettings(5, until=("b",)))
    assert [(row.text, row.output_tokens) for row in rows] == [("a", 4), ("aa", 5)]


def test_a_system_prompt_comes_first_and_only_once(engine: Engine) -> None:
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "system_prompt": "Be brief."}
    text, images, _ = told.prompt(MIXED[0])
    assert text.startswith("system: Be brief.user: ") and len(images) == 1
    own = [{"role": "system", "content": [{"type": "text", "text": "Mine."}]}, *MIXED[0]]
    assert told.prompt(own)[0].count("system:") == 1
    assert MIXED[0][0]["role"] == "user"  # the task's messages are left alone
