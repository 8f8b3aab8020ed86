"""Conversations on one cache: with everything kept the uncompressed conversation, otherwise exactly what was kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.protocol import ChatMessages
from lmms_eval.tasks import TaskManager

from sparsemm_lmms import CompressionConfig, HeadScores, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.likelihood import score
from sparsemm_lmms.model_wrappers.prefill import question_starts
from sparsemm_lmms.model_wrappers.rounds import Dialogue, converse

from . import tiny
from .conftest import conversation, png, request

SETTINGS = GenerationSettings(max_new_tokens=7)
TALK = [  # three rounds; images in the first and the second, of different sizes
    conversation(1, "What is it?"),
    conversation(2, "And this, please?", size=(56, 112)),
    [{"role": "user", "content": [{"type": "text", "text": "Which of the two was larger?"}]}],
]
COMPRESSING = [name for name in tiny.REPRESENTATIVE if METHODS[name].compresses]


def stock_conversation(engine: Engine, talk: list[Any], settings: GenerationSettings = SETTINGS) -> list[str]:
    """Stock transformers reads the whole conversation afresh in every round."""
    messages, answers = [], []
    for turn in talk:
        messages += turn
        chat = ChatMessages(messages=messages)
        text = engine.processor.apply_chat_template(chat.to_hf_messages(), tokenize=False, add_generation_prompt=True)
        images, videos, _ = chat.extract_media()
        media = {"videos": videos, "do_sample_frames": False} if videos else {}
        inputs = engine.processor(text=[text], images=images or None, return_tensors="pt", **media)
        out = engine.model.generate(**inputs, do_sample=False, max_new_tokens=settings.max_new_tokens)
        answers.append(engine._answers(out[:, inputs["input_ids"].shape[1] :], [0], [0.0], settings)[0].text)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[-1]}]})
    return answers


def hold(engine: Engine, talk: list[Any], recompress: bool = False, agnostic: bool = False, **config: Any) -> Any:
    """Answers, and what each round's cache reported."""
    scores = HeadScores.random(3, 4, seed=1) if METHODS[config["method"]].needs_head_scores else None
    told = Engine.__new__(Engine)
    told.__dict__ |= {**vars(engine), "compress_before_question": agnostic}
    with compress(engine.model, CompressionConfig(**config), scores) as session:
        dialogue = Dialogue(told, session, recompress)
        batches = [dialogue.ask(turn, SETTINGS) for turn in talk]
    return [batch.answers[0].text for batch in batches], batches, dialogue


def test_everything_kept_is_the_uncompressed_conversation(engine: Engine) -> None:
    wanted = stock_conversation(engine, TALK)
    assert len(set(wanted)) == 3
    for method, recompress, agnostic in [
        ("fullkv", False, False),
        ("snapkv", False, False),
        ("sparsemm", True, False),
        ("pyramidkv", False, True),
        ("adakv", True, True),
    ]:
        found, batches, _ = hold(engine, TALK, recompress, agnostic, method=method, budget=4096, window_size=8)
        assert found == wanted
        assert [b.answers[0].kept_tokens for b in batches] == [b.answers[0].prompt_tokens for b in batches]


def test_stop_strings_and_the_end_token_are_continued_as_text(engine: Engine) -> None:
    first = stock_conversation(engine, TALK[:1])[0]
    settings = GenerationSettings(max_new_tokens=7, until=(first[3],))
    wanted = stock_conversation(engine, TALK, settings)
    assert wanted[0] == first[:3].strip() or wanted[0] == first[: first.index(first[3])]
    with compress(engine.model, CompressionConfig(method="snapkv", budget=4096)) as session:
        dialogue = Dialogue(engine, session)
        assert [dialogue.ask(turn, settings).answers[0].text for turn in TALK] == wanted


@pytest.mark.parametrize("method", COMPRESSING)
def test_later_prompts_see_what_was_kept_and_themselves(engine: Engine, method: str) -> None:
    """A text-only round equals stock `generate` that is fed its tokens one by one on the first prompt's cache."""
    config = {"method": method, "budget": 24, "window_size": 8}
    found, batches, dialogue = hold(engine, [TALK[0], TALK[2]], **config)
    scores = HeadScores.random(3, 4, seed=1) if METHODS[method].needs_head_scores else None
    with compress(engine.model, CompressionConfig(**config), scores) as session:
        inputs = engine.batch_inputs([engine.prompt(TALK[0])])
        engine.model.generate(**inputs, max_new_tokens=1, **{CACHE_NAME: session.new_cache()}, do_sample=False)
        for column in range(inputs["input_ids"].shape[1], len(dialogue.ids)):
            whole = torch.tensor([dialogue.ids[: column + 1]])
            tokens = engine.model.generate(
                input_ids=whole,
                attention_mask=torch.ones_like(whole),
                **{CACHE_NAME: session.cache},
                do_sample=False,
                max_new_tokens=7 if column + 1 == len(dialogue.ids) else 1,
            )
        assert engine._answers(tokens[:, column + 1 :], [0], [0.0], SETTINGS)[0].text == found[1]
    first, second = (batch.answers[0] for batch in batches)
    assert first.kept_tokens < first.prompt_tokens
    assert second.kept_tokens - first.kept_tokens == pytest.approx(second.prompt_tokens - first.prompt_tokens)


@pytest.mark.parametrize("method", COMPRESSING)
def test_compressing_again_keeps_the_budget(engine: Engine, method: str) -> None:
    _, batches, dialogue = hold(engine, TALK, recompress=True, method=method, budget=24, window_size=8)
    assert all(b.answers[0].kept_tokens <= 24 + 1 for b in batches)  # rounding of the published rules
    prompt = batches[-1].answers[0].prompt_tokens
    row = batches[-1].kv_bytes_full / (prompt + batches[-1].answers[0].output_tokens - 1)  # the last is not fed back
    assert row == engine.model.config.get_text_config().num_key_value_heads * 2 * 8 * 4 * tiny.LAYERS
    assert batches[-1].kv_bytes_used < 0.3 * batches[-1].kv_bytes_full
    for layer in range(tiny.LAYERS):
        for head in dialogue.cache.kept_positions(layer)[0]:
            assert head.tolist() == sorted(set(head.tolist()))
            assert head[-8:].tolist() == list(range(prompt - 8, prompt))  # the newest prompt's window
            assert len(head) < prompt and (method != "local_window" or head[0] == prompt - 24)


def test_compressing_again_before_the_question_leaves_the_question_whole(engine: Engine) -> None:
    _, batches, dialogue = hold(
        engine, TALK[:2], recompress=True, agnostic=True, method="snapkv", budget=24, window_size=8
    )
    question = len(dialogue.ids) - int(question_starts(engine.model, torch.tensor([dialogue.ids])))
    assert question >= len("And this, please?")
    assert batches[1].answers[0].kept_tokens == 24 + question


def test_a_template_that_rewrites_earlier_rounds_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    forgetful = "{{ messages | length }}" * 9 + engine.processor.chat_template
    monkeypatch.setattr(engine.processor, "chat_template", forgetful)
    with pytest.raises(ValueError, match="rewrites earlier rounds.*rounds=independent"):
        hold(engine, TALK, method="snapkv", budget=24, window_size=8)


def rounds(talk: list[Any]) -> Callable[..., Any]:
    """What the host's `doc_to_messages` does for a task of many rounds."""

    def doc_to_messages(doc: Any, round_idx: int | None = None, previous_output: Any = None, **info: Any) -> Any:
        if round_idx is None:
            return talk[0]
        assert len(previous_output) == round_idx and all(isinstance(text, str) for text in previous_output)
        done = round_idx == len(talk)
        return (None if done else talk[round_idx]), done, previous_output, info["previous_round_info"]

    return doc_to_messages


@pytest.mark.parametrize("mode", ["append", "recompress", "independent"])
def test_the_hosts_requests(mode: str, arguments: Callable[..., str]) -> None:
    model = get_model("qwen2_vl_snapkv").create_from_arg_string(arguments("qwen2_vl_snapkv", rounds=mode), {})
    talks = [TALK, TALK[:1], [TALK[2], TALK[1]]]
    asked = [request(model, [], i, {"max_new_tokens": 5, "until": ["\n\n"]}) for i in range(3)]
    for one, talk in zip(asked, talks, strict=True):
        one.arguments = (one.arguments[0], rounds(talk), *one.arguments[2:])
    found = model.generate_until_multi_round(asked)
    assert [len(row) for row in found] == [3, 1, 2] and found[0][0] == found[1][0]
    alone = [request(model, turn, 9, {"max_new_tokens": 5}) for turn in TALK]
    single = []
    for one, turn in zip(alone, TALK, strict=True):
        model.task_dict["task"]["test"][9] = turn
        single.append(model.generate_until([one])[0].text)
    assert (found[0] == single) == (mode == "independent")


TASK = """\
task: tiny_rounds
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {parquet}
test_split: test
output_type: generate_until_multi_round
doc_to_visual: !function utils.visual
doc_to_text: !function rounds.text
doc_to_target: answer
process_results: !function rounds.results
generation_kwargs:
  max_new_tokens: 6
metric_list:
  - metric: rounds
    aggregation: mean
    higher_is_better: true
"""
UTILS = """\
def text(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    if round_idx == 3:
        return None, None, True, previous_output, None
    images = [doc["image"].convert("RGB").rotate(90)] if round_idx == 1 else []
    return images, f"You said {previous_output[-1]!r}; why?", False, previous_output, {"round": round_idx}

def results(doc, results):
    return {"rounds": len(results[0])}
"""


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_a_task_of_the_host_with_rounds(
    family: str, arguments: Callable[..., str], task: Callable[..., Path], tmp_path: Path
) -> None:
    folder = task([png(0), png(1, (28, 56))])
    (folder / "tiny_rounds.yaml").write_text(TASK.format(parquet=folder / "test.parquet"))
    (folder / "rounds.py").write_text(UTILS)

    def run(method: str, **more: Any) -> tuple[list[list[str]], float]:
        name = f"{family}_{method}"
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=name)
        out = simple_evaluate(
            name, arguments(name, **more), tasks=["tiny_rounds"], task_manager=manager, bootstrap_iters=0
        )
        assert out["results"]["tiny_rounds"]["rounds,none"] == 3
        return [s["resps"][0] for s in out["samples"]["tiny_rounds"]], out["throughput"]["avg_kept_tokens"]

    full, everything = run("fullkv")
    assert run("snapkv", budget=4096) == (full, everything)
    small, kept = run("snapkv", budget=16)
    assert small != full and kept < everything
    assert run("snapkv", budget=16, rounds="recompress")[1] == 16


def test_max_cache_is_of_one_prompt(engine: Engine) -> None:
    """Rounds that go on with a cache refuse it, and so do likelihoods; rounds on their own have it."""

    def talk() -> Any:
        yield TALK[0]
        yield TALK[1]

    config = CompressionConfig(method="snapkv", budget=10, window_size=4, max_cache=12)
    with compress(engine.model, config) as session:
        assert len([*converse(engine, session, talk(), SETTINGS, "independent")]) == 2
        with pytest.raises(ValueError, match="which rounds=append goes on with; use rounds=independent"):
            next(converse(engine, session, talk(), SETTINGS, "append"))
        with pytest.raises(ValueError, match="a likelihood writes none; use max_cache=0"):
            score(engine, session, [])
