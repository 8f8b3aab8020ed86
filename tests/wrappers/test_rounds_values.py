"""The pieces of a conversation against loops over tokens: where questions start, how batches are cut, what is new."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.model_wrappers.engine import Engine
from sparsemm_lmms.model_wrappers.generation import GenerationSettings
from sparsemm_lmms.model_wrappers.prefill import cut, newest_vision, placeholders, question_starts, shared_prefix
from sparsemm_lmms.model_wrappers.rounds import Dialogue

from .conftest import conversation

IMAGE, VIDEO, END, PAD = 7, 8, 9, 0
SETTINGS = GenerationSettings(max_new_tokens=6)


def text(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": question}]}]


def model(**ids: int) -> Any:
    """What these functions ask of a model; positions count the real tokens from 100."""

    def positions(ids: torch.Tensor, others: dict[str, torch.Tensor]) -> torch.Tensor:
        return 100 + others["attention_mask"].cumsum(-1)

    return SimpleNamespace(
        config=PreTrainedConfig(num_hidden_layers=1, **ids),
        generation_config=SimpleNamespace(pad_token_id=PAD),
        _prepare_position_ids_for_generation=positions,
    )


@pytest.mark.parametrize("end", [None, END], ids=["image tokens", "image tokens and their end"])
@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.integers(1, 9).flatmap(lambda n: st.lists(st.lists(st.integers(1, 9), min_size=n, max_size=n), min_size=1)))
def test_a_question_starts_behind_the_last_image(end: int | None, rows: list[list[int]]) -> None:
    """And holds at least one token, also where the prompt ends with an image or has none."""
    media = {IMAGE, VIDEO} | ({END} if end else set())
    known = model(image_token_id=IMAGE, video_token_id=VIDEO, **({"vision_end_token_id": end} if end else {}))
    wanted = []
    for row in rows:
        behind = [i + 1 for i, token in enumerate(row) if token in media]
        wanted.append(min(behind[-1], len(row) - 1) if behind else len(row) - 1)
    assert question_starts(known, torch.tensor(rows)).tolist() == wanted
    assert placeholders(known) == {IMAGE, VIDEO}
    assert placeholders(model(image_token_id=IMAGE)) == {IMAGE} and placeholders(model()) == set()


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.data())
def test_a_batch_is_cut_row_by_row(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    columns, count = max(lengths), data.draw(st.integers(1, 3))
    ids = torch.arange(1, 1 + len(lengths) * columns).view(len(lengths), -1)
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    points = [sorted(data.draw(st.lists(st.integers(1, n), min_size=count, max_size=count))) for n in lengths]
    ends = [torch.tensor([columns - n + p[i] for n, p in zip(lengths, points, strict=True)]) for i in range(count)]
    pixels = torch.zeros(2)
    inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": ids, "pixel_values": pixels}
    parts = cut(model(), inputs, ends)
    assert list(parts.vision) == ["pixel_values"] and parts.vision["pixel_values"] is pixels
    assert parts.ids.shape == parts.mask.shape == parts.positions.shape == (len(lengths), parts.ends[-1])
    begin = 0
    for i, end in enumerate(parts.ends):
        pieces = [(0 if i == 0 else p[i - 1], p[i]) for p in points]
        assert end - begin == max(b - a for a, b in pieces)
        for row, (n, (a, b)) in enumerate(zip(lengths, pieces, strict=True)):
            pad, first = (end - begin) - (b - a), columns - n
            assert parts.ids[row, begin:end].tolist() == [PAD] * pad + ids[row, first + a : first + b].tolist()
            assert parts.mask[row, begin:end].tolist() == [0] * pad + [1] * (b - a)
            assert parts.positions[row, begin:end].tolist() == [0] * pad + [101 + k for k in range(a, b)]
        begin = end


@settings(max_examples=80, derandomize=True, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_a_shared_prefix_ends_at_the_first_difference(first: list[int], second: list[int]) -> None:
    n = shared_prefix(first, second)
    assert first[:n] == second[:n]
    assert n == min(len(first), len(second)) or first[n] != second[n]


def test_new_pictures_of_a_round() -> None:
    """Qwen2-VL keeps the patches of all pictures in one list, LLaVA-NeXT one tensor of tiles a picture."""
    grids, films = torch.tensor([[1, 2, 2], [1, 4, 2], [1, 2, 6]]), torch.tensor([[3, 2, 2], [1, 2, 4]])
    qwen = {
        "pixel_values": torch.arange(24), "image_grid_thw": grids,
        "pixel_values_videos": torch.arange(20), "video_grid_thw": films,
    }  # fmt: skip
    llava = {"pixel_values": torch.arange(3), "image_sizes": torch.arange(3) + 10}
    for images in range(4):
        for videos in range(3):
            kept = newest_vision(qwen, images, videos)
            assert list(kept) == ["pixel_values", "image_grid_thw"] * (images < 3) + [
                "pixel_values_videos",
                "video_grid_thw",
            ] * (videos < 2)
            if images < 3:
                assert kept["pixel_values"].tolist() == list(range([0, 4, 12][images], 24))
                assert torch.equal(kept["image_grid_thw"], grids[images:])
            if videos < 2:
                assert kept["pixel_values_videos"].tolist() == list(range([0, 12][videos], 20))
                assert torch.equal(kept["video_grid_thw"], films[videos:])
        kept = newest_vision(llava, images, 0)
        assert {name: x.tolist() for name, x in kept.items()} == (
            {} if images == 3 else {name: x.tolist()[images:] for name, x in llava.items()}
        )
    assert newest_vision({"input_ids": torch.ones(1, 3)}, 0, 0) == {}


def test_several_new_pictures_in_a_later_round(engine: Engine) -> None:
    """With everything kept, as the model answers when it reads the whole conversation afresh."""
    talk = [conversation(1, "What is it?"), conversation(2, "And these?", images=3, size=(28, 56)), text("Why?")]
    messages: list[Any] = []
    for config in (CompressionConfig(method="fullkv"), CompressionConfig(method="snapkv", budget=4096)):
        messages.clear()
        with compress(engine.model, config) as session:
            dialogue = Dialogue(engine, session)
            for turn in talk:
                found = dialogue.ask(turn, SETTINGS).answers[0]
                messages += turn
                inputs = engine.batch_inputs([engine.prompt(messages)])
                made = engine.model.generate(**inputs, do_sample=False, max_new_tokens=6)
                wanted = engine._answers(made[:, inputs["input_ids"].shape[1] :], [0], [0.0], SETTINGS)[0].text
                assert found.text == wanted
                assert found.kept_tokens == found.prompt_tokens == inputs["input_ids"].shape[1]
                messages.append({"role": "assistant", "content": [{"type": "text", "text": wanted}]})


@pytest.mark.parametrize("recompress", [False, True])
def test_a_prompt_that_the_cache_holds_already(
    engine: Engine, recompress: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that shows the first message only: the last token alone is read again, and the answer is the same."""
    template = engine.processor.chat_template.replace("in messages", "in messages[:1]")
    monkeypatch.setattr(engine.processor, "chat_template", template)
    question = conversation(1, "What is written here?")
    with compress(engine.model, CompressionConfig(method="snapkv", budget=4096, window_size=8)) as session:
        dialogue = Dialogue(engine, session, recompress)
        batches = [dialogue.ask(turn, SETTINGS) for turn in (question, text("Why?"), text("Really?"))]
    first = batches[0].answers[0]
    assert [batch.answers[0] for batch in batches] == [first] * 3
    assert len({batch.kv_bytes_used for batch in batches}) == 1
    assert dialogue.cache is not None
    assert dialogue.cache.get_seq_length() == first.prompt_tokens + first.output_tokens - 1


def test_a_picture_whose_place_changed_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture came after the last compression, so the cache could forget it; its pixels would not come again."""
    counted = "{% if loop.index == 3 %}{{ messages | length }}{% endif %}{{ message.role }}: "
    template = engine.processor.chat_template.replace("{{ message.role }}: ", counted)
    assert template != engine.processor.chat_template
    monkeypatch.setattr(engine.processor, "chat_template", template)
    for picture in (True, False):
        second = conversation(2, "And this?", size=(28, 56)) if picture else text("And this?")
        with compress(engine.model, CompressionConfig(method="snapkv", budget=4096, window_size=8)) as session:
            dialogue = Dialogue(engine, session)
            dialogue.ask(conversation(1, "What is it?"), SETTINGS)
            dialogue.ask(second, SETTINGS)
            if picture:
                with pytest.raises(ValueError, match="rewrites earlier rounds"):
                    dialogue.ask(text("Why?"), SETTINGS)
                continue
            found = dialogue.ask(text("Why?"), SETTINGS).answers[0]  # text comes again as the template writes it
        inputs = engine.batch_inputs([engine.prompt(dialogue.messages[:-1])])
        made = engine.model.generate(**inputs, do_sample=False, max_new_tokens=6)
        assert engine._answers(made[:, inputs["input_ids"].shape[1] :], [0], [0.0], SETTINGS)[0].text == found.text
        assert found.prompt_tokens == inputs["input_ids"].shape[1]


def test_text_that_changed_before_the_window_is_refused(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.processor, "chat_template", "{{ messages | length }}" + engine.processor.chat_template)
    with compress(engine.model, CompressionConfig(method="snapkv", budget=4096, window_size=8)) as session:
        dialogue = Dialogue(engine, session)
        dialogue.ask(text("What is written in the second line?"), SETTINGS)
        with pytest.raises(ValueError, match="rewrites earlier rounds"):
            dialogue.ask(text("Why?"), SETTINGS)


def test_a_round_counts_its_room_and_its_pictures(engine: Engine) -> None:
    with compress(engine.model, CompressionConfig(method="snapkv", budget=24, window_size=8)) as session:
        dialogue = Dialogue(engine, session, recompress=True)
        for pictures, turn in [(2, conversation(1, images=2)), (2, text("Why?")), (3, conversation(4))]:
            assert dialogue.ask(turn, SETTINGS).answers[0].kept_tokens == 24
            assert (dialogue.images, dialogue.videos) == (pictures, 0)
            assert dialogue.cache is session.cache and dialogue.cache is not None
            assert set(dialogue.cache.kept_per_head().flatten().tolist()) == {24}
        assert dialogue.ids == engine.batch_inputs([engine.prompt(dialogue.messages[:-1])])["input_ids"][0].tolist()
        assert len(dialogue.messages) == 6
        with pytest.raises(ValueError, match="num_beams=2: rounds"):
            dialogue.ask(text("?"), GenerationSettings(6, num_beams=2))
