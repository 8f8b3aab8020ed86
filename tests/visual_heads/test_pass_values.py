"""What heads are credited with, token by token: ends, hidden words, padding, 16-bit models, limits and resumption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from sparsemm_lmms.head_statistics import agreement, group_agreement, ranks, spearman, split_half, top_overlap
from sparsemm_lmms.visual_heads import attention, passes
from sparsemm_lmms.visual_heads.attention import Logits, Watcher, step_weights
from sparsemm_lmms.visual_heads.chase import ChaseSettings, reduce_records, score_heads
from sparsemm_lmms.visual_heads.inputs import Batch, make_batch, with_answers
from sparsemm_lmms.visual_heads.matching import TokenTexts
from sparsemm_lmms.visual_heads.passes import Tally, _Listener, end_tokens, free_running, pad_token, teacher_forced
from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample, Skipped
from sparsemm_lmms.visual_heads.token_grid import grid_for

from . import tiny
from .test_chase import make_samples, noise, quarters, reference_score

LAYERS, HEADS, PROMPT = 2, 3, 7


def a_batch(words: torch.Tensor, samples: Any = ()) -> Batch:
    return Batch(samples, {}, words.shape[-1], words, words.sum(-1))


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 999))
def test_credit_is_one_share_of_the_word_for_each_hit(batch: int, count: int, rows: int, seed: int) -> None:
    """Attention behind the prompt hits nothing; a word without image tokens is worth nothing."""
    dice = torch.Generator().manual_seed(seed)
    words = torch.rand(batch, count, PROMPT, generator=dice) < 0.4
    argmax = torch.randint(0, PROMPT + 3, (LAYERS, batch, HEADS, rows), generator=dice)
    mass = torch.rand(LAYERS, batch, HEADS, rows, generator=dice)
    targets = torch.randint(-1, count, (batch, rows), generator=dice)
    tally = Tally.empty(batch, LAYERS, HEADS, torch.device("cpu"))
    for _ in range(2):  # it adds up
        tally.add(a_batch(words), argmax, mass, targets)
    score, on_word = torch.zeros(2, batch, LAYERS, HEADS, dtype=torch.float64)
    for b in range(batch):
        for r in range(rows):
            word = int(targets[b, r])
            shown = words[b, word].nonzero().flatten().tolist() if word >= 0 else []
            for layer in range(LAYERS):
                for head in range(HEADS):
                    score[b, layer, head] += 2 * (int(argmax[layer, b, head, r]) in shown) / max(len(shown), 1)
                    on_word[b, layer, head] += 2 * float(mass[layer, b, head, r]) * (word >= 0)
    torch.testing.assert_close(tally.score, score)
    torch.testing.assert_close(tally.mass, on_word)


class Replayed:
    """A watcher that saw what it is given."""

    def __init__(self, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.coming, self.cleared = list(seen), 0

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.coming[self.cleared]

    def clear(self) -> None:
        self.cleared += 1


def letters(rows: int) -> st.SearchStrategy[list[list[str]]]:
    return st.lists(st.lists(st.sampled_from("abcde"), min_size=rows, max_size=rows), min_size=1, max_size=9)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.integers(1, 3).flatmap(letters), st.integers(0, 99), st.sampled_from([1, 2, 64]))
def test_what_a_row_writes_behind_its_end_counts_nothing(steps: list[list[str]], seed: int, held: int) -> None:
    """`d` and `e` end an answer; a row that ended goes on with other tokens, ends included, while the others write."""
    tokenizer = tiny.tokenizer()
    ids = [[tokenizer.convert_tokens_to_ids(letter) for letter in step] for step in steps]
    size, dice = len(steps[0]), torch.Generator().manual_seed(seed)
    boxes = (Box("a", (0, 0, 9, 9)), Box("b", (9, 0, 18, 9)), Box("de", (9, 9, 18, 18)))
    orders = [boxes[b % 3 :] + boxes[: b % 3] for b in range(size)]  # every row has words of its own
    samples = [CalibrationSample(noise(20, 20, 0), "?", "", order) for order in orders]
    words = torch.rand(size, 3, PROMPT, generator=dice) < 0.5
    words[0, 1] = False  # no image token shows "b" in the first row
    seen = [
        (
            torch.randint(0, PROMPT + 1, (LAYERS, size, HEADS, 1), generator=dice),
            torch.rand(LAYERS, size, HEADS, 1, 3, generator=dice),
        )
        for _ in steps
    ]
    tally, watcher = Tally.empty(size, LAYERS, HEADS, torch.device("cpu")), Replayed(seen)
    ends = {tokenizer.convert_tokens_to_ids(letter) for letter in "de"}
    batch = a_batch(words, samples)
    listener = _Listener(batch, TokenTexts(tokenizer), watcher, tally, ends)  # type: ignore[arg-type]
    before, passes.HELD = passes.HELD, held
    try:
        for i in range(len(steps)):
            stop = listener(torch.tensor(ids[: i + 1]).T, None)
            assert stop.tolist() == [False] * size
        listener.credit()
    finally:
        passes.HELD = before
    assert watcher.cleared == len(steps)
    wanted = Tally.empty(size, LAYERS, HEADS, torch.device("cpu"))
    for b in range(size):
        whole = "".join(step[b] for step in steps)
        written = whole[: next((i for i, letter in enumerate(whole) if letter in "de"), len(whole))]
        wanted.tokens[b] = len(written)
        for i, letter in enumerate(written):
            word = [box.text for box in orders[b]].index(letter) if letter in "ab" else -1
            if word < 0 or not words[b, word].any():
                continue
            wanted.counted[b] += 1
            argmax, mass = seen[i]
            for layer in range(LAYERS):
                for head in range(HEADS):
                    place = int(argmax[layer, b, head, 0])
                    hit = place < PROMPT and bool(words[b, word, place])
                    wanted.score[b, layer, head] += hit / int(words[b, word].sum())
                    wanted.mass[b, layer, head] += mass[layer, b, head, 0, word].double()
    assert (tally.tokens, tally.counted) == (wanted.tokens, wanted.counted)
    torch.testing.assert_close(tally.score, wanted.score)
    torch.testing.assert_close(tally.mass, wanted.mass)


def test_free_running_counts_up_to_each_rows_own_end() -> None:
    model, processor = tiny.llava_next(), tiny.llava_processor()
    samples = list(make_samples(3))
    batch = make_batch(samples, processor, grid_for(model.config), "high", model)
    texts = TokenTexts(processor.tokenizer)
    free = model.generate(**batch.inputs, max_new_tokens=9, do_sample=False, pad_token_id=0)[:, batch.prompt :]
    assert not (free == 2).any()  # nobody ended
    whole = free_running(model, batch, texts, 0, (3, 4), 9)
    for b, sample in enumerate(samples):
        score, counted = reference_score(model, processor, sample, "free", max_new_tokens=9)
        np.testing.assert_allclose(whole.score[b], score, rtol=1e-9, atol=1e-12)
        assert (whole.tokens[b], whole.counted[b]) == (9, counted)
    ends = [2, int(free[0, 3]), int(free[1, 6])]
    model.generation_config.eos_token_id = ends
    tally = free_running(model, batch, texts, 0, (3, 4), 9)
    lengths = [next((i for i, token in enumerate(row) if token in ends), 9) for row in free.tolist()]
    assert len(set(lengths)) > 1 and min(lengths) < 9
    assert tally.tokens == lengths
    assert end_tokens(model, processor.tokenizer) == set(ends)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, processor.tokenizer) == {2}


@pytest.mark.parametrize(("pad", "eos", "found"), [(5, 2, 5), (0, 2, 0), (None, 2, 2), (None, None, 0)])
def test_the_token_to_fill_with(pad: int | None, eos: int | None, found: int) -> None:
    assert pad_token(SimpleNamespace(pad_token_id=pad, eos_token_id=eos)) == found


def test_a_word_that_no_image_token_shows_counts_nothing() -> None:
    model, processor = tiny.qwen2_vl(), tiny.qwen_processor()
    samples = list(make_samples(3))
    batch = make_batch(samples, processor, grid_for(model.config), "high", model)
    texts = TokenTexts(processor.tokenizer)
    everything = teacher_forced(model, batch, texts, 0, (3, 4))
    alone = []
    for word in range(4):  # the others are not visible
        shown = batch.words & (torch.arange(4) == word)[:, None]
        alone.append(teacher_forced(model, replace(batch, words=shown, sizes=shown.sum(-1)), texts, 0, (3, 4)))
    for b, sample in enumerate(samples):
        score, _ = reference_score(model, processor, sample, "teacher")
        np.testing.assert_allclose(everything.score[b], score, rtol=1e-9, atol=1e-12)
        having = [
            [box.text for box in sample.boxes if letter.strip() and letter in box.text] for letter in sample.answer
        ]
        for word, part in enumerate(alone):
            assert part.counted[b] == having.count([sample.boxes[word].text]) and part.tokens[b] == len(sample.answer)
        assert everything.counted[b] == sum(len(found) == 1 for found in having)
    torch.testing.assert_close(sum(part.score for part in alone), everything.score)
    torch.testing.assert_close(sum(part.mass for part in alone), everything.mass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["causal", "bool", "float"])
@pytest.mark.parametrize("rows", [1, 4])
def test_weights_of_16_bit_models_are_float32(
    dtype: torch.dtype, kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of 16-bit numbers tie where they are rounded to 16 bits; the reference is float64 on the same inputs."""
    dice = torch.Generator().manual_seed(1)
    batch, heads, group, q_length, k_length, dim, prompt = 2, 2, 2, 5, 40, 16, 30
    query = torch.randn(batch, heads * group, q_length, dim, generator=dice).to(dtype)
    key = torch.randn(batch, heads, k_length, dim, generator=dice).to(dtype)
    words = torch.rand(batch, 3, prompt, generator=dice) < 0.3
    targets = torch.randint(-1, 3, (batch, rows), generator=dice)
    visible = torch.arange(k_length)[None, :] <= torch.arange(q_length)[:, None] + k_length - q_length
    visible = visible.expand(batch, 1, -1, -1).clone()
    mask = None
    if kind != "causal":
        visible[1, :, :, :6] = False  # left padding
        mask = visible if kind == "bool" else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -3e4)
    logits = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double().repeat_interleave(group, 1)) * 0.3
    weights = logits.masked_fill(~visible, float("-inf")).softmax(-1)[:, :, -rows:]
    for known, elements in ((targets, 1 << 24), (targets, 2 * batch * heads * group * k_length), (None, 1)):
        monkeypatch.setattr(attention, "CHUNK_ELEMENTS", elements)  # all rows at once, two, one
        watcher = Watcher(words, rows, known)
        watcher.look(1, query, key, mask, Logits(0.3))
        watcher.look(0, query, key, mask, Logits(0.3))
        argmax, mass = watcher.seen()
        assert mass.dtype == torch.float32 and torch.equal(argmax[0], argmax[1])
        assert torch.equal(argmax[0], weights.argmax(-1))
        every = torch.einsum("bhrk,bwk->bhrw", weights[..., :prompt], words.double())
        if known is not None:
            every = every.gather(-1, known.clamp(min=0)[:, None, :, None].expand(-1, heads * group, -1, 1)).squeeze(-1)
            every, mass = (x.masked_fill(known[:, None] < 0, 0.0) for x in (every, mass[0]))
        else:
            mass = mass[0]
        torch.testing.assert_close(mass.double(), every, rtol=1e-5, atol=1e-7)
        watcher.clear()
        assert not watcher.argmax and not watcher.mass
    last = step_weights(query, key, mask, Logits(0.3))
    torch.testing.assert_close(last.double(), weights[:, :, -1:], rtol=1e-5, atol=1e-7)


def test_answers_of_different_length_stand_behind_padded_prompts() -> None:
    for model, processor in ((tiny.llava_next(), tiny.llava_processor()), (tiny.qwen2_vl(), tiny.qwen_processor())):
        samples = list(make_samples(3))
        batch = make_batch(samples, processor, grid_for(model.config), "high", model)
        before = {name: value.clone() for name, value in batch.inputs.items()}
        answers = [[11, 12, 13], [14], []]
        inputs = with_answers(batch, answers, 5, model)
        assert all(torch.equal(batch.inputs[name], value) for name, value in before.items())
        for row, answer in enumerate(answers):
            real = before["attention_mask"][row].tolist()
            mask = real + [1] * len(answer) + [0] * (3 - len(answer))
            assert inputs["input_ids"][row].tolist() == before["input_ids"][row].tolist() + answer + [5] * (
                3 - len(answer)
            )
            assert inputs["attention_mask"][row].tolist() == mask
            if "mm_token_type_ids" in before:
                assert inputs["mm_token_type_ids"][row].tolist() == before["mm_token_type_ids"][row].tolist() + [0] * 3
            if model.config.model_type == "llava_next":  # as `generate` counts
                counted = [max(sum(mask[: i + 1]) - 1, 0) for i in range(len(mask))]
                assert inputs["position_ids"][row].tolist() == counted
        assert ("position_ids" in inputs) == (model.config.model_type == "llava_next")
        assert len({int(row.sum()) for row in before["attention_mask"]}) > 1  # there is padding


@pytest.mark.parametrize("written", [True, False], ids=["by the template", "by the tokenizer"])
def test_a_prompt_begins_with_one_bos(written: bool) -> None:
    """The tokenizer of LLaVA adds one to every text, and so do the templates of some of its checkpoints."""
    model, processor = tiny.llava_next(), tiny.llava_processor()
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    assert processor.tokenizer("a")["input_ids"][0] == 1
    template = processor.chat_template
    processor.chat_template = template if written else template.removeprefix("<s>")
    samples = list(make_samples(2))
    batch = make_batch(samples, processor, grid_for(model.config), "high", model)
    for row, sample in enumerate(samples):
        ids = [
            t
            for t, m in zip(*(batch.inputs[k][row].tolist() for k in ("input_ids", "attention_mask")), strict=True)
            if m
        ]
        assert ids[0] == 1 and ids.count(1) == 1
        plain = [t for t in ids[1:] if t != tiny.IDS["<image>"]]
        assert processor.tokenizer.decode(plain) == f"user: \n{sample.prompt}assistant: "


def test_words_of_a_batch_are_the_tokens_of_the_grid() -> None:
    model, processor = tiny.llava_next(), tiny.llava_processor()
    two = CalibrationSample(
        (noise(60, 60, 1), noise(112, 56, 2)), "?", "", quarters(60, 60)[:1] + quarters(112, 56, item=1)[1:3]
    )
    samples = [*make_samples(2), two]
    for views in ("high", "all"):
        batch = make_batch(samples, processor, grid_for(model.config), views, model)
        images = [image.size for sample in samples for image in sample.images]
        grids = grid_for(model.config).grids(batch.inputs, images)
        assert batch.words.shape == (3, 4, batch.prompt)
        for row, (sample, grid) in enumerate(zip(samples, grids, strict=True)):
            for k in range(4):
                shown = (
                    grid.inside(sample.boxes[k].xyxy, sample.boxes[k].item, views).tolist()
                    if k < len(sample.boxes)
                    else []
                )
                assert batch.words[row, k].nonzero().flatten().tolist() == sorted(shown)
                assert int(batch.sizes[row, k]) == len(shown)


# -- runs --------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def until(samples: list[Any], stop: int) -> Iterator[Any]:
    yield from samples[:stop]
    raise Stopped


@pytest.mark.parametrize(("limit", "size"), [(2, 1), (3, 1), (3, 2), (4, 2), (9, 2)])
def test_a_limit_below_what_a_killed_run_had_read(limit: int, size: int, tmp_path: Any) -> None:
    model, processor = tiny.llava_next(), tiny.llava_processor()
    samples = [Skipped("torn.png", "is not readable."), *make_samples(4)]

    def run(source: Any, name: str, **more: Any) -> Any:
        settings = ChaseSettings("teacher", batch_size=size)
        return score_heads(model, processor, source, tmp_path / name, settings, progress=False, **more)

    with pytest.raises(Stopped):
        run(until(samples, 5), "a.json")
    lines = (tmp_path / "a.json.partial.jsonl").read_bytes().splitlines()
    assert len(lines) == 1 + 5 // size * size  # a header, and the records of whole batches
    found = run((sample for sample in samples), "a.json", limit=limit)
    alone = run((sample for sample in samples[:limit]), "b.json")
    assert found.provenance["images"] == min(limit - 1, 4) and np.array_equal(found.values, alone.values)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert not (tmp_path / "a.json.partial.jsonl").exists()


@pytest.mark.parametrize("per_token", [False, True])
def test_records_become_means_and_errors(per_token: bool) -> None:
    dice = np.random.default_rng(0)
    records: list[dict[str, Any]] = [
        {"index": i, "name": f"s{i}", "tokens": 9 + i, "counted": counted, "score": dice.random((2, 3)).tolist(),
         "mass": dice.random((2, 3)).tolist()}
        for i, counted in enumerate([4, 1, 0, 5])
    ]  # fmt: skip
    records.insert(2, {"index": 9, "name": "torn", "skipped": "is torn."})
    found = reduce_records(records, {"per_token": per_token, "kind": "chase"})
    read = [record for record in records if "score" in record]
    values = np.array([np.array(r["score"]) / (max(r["counted"], 1) if per_token else 1) for r in read])
    np.testing.assert_allclose(found.values, values.sum(0) / 4)
    errors = np.sqrt(((values - values.mean(0)) ** 2).sum(0) / 3 / 4)
    np.testing.assert_allclose(found.stderr, errors)
    facts = found.provenance
    assert {key: facts[key] for key in ("images", "tokens", "tokens_counted", "images_without_counted_tokens")} == {
        "images": 4, "tokens": 9 + 10 + 11 + 12, "tokens_counted": 10, "images_without_counted_tokens": 1,
    }  # fmt: skip
    assert facts["skipped"] == {"count": 1, "first": ["torn: is torn."]} and facts["kind"] == "chase"
    np.testing.assert_allclose(facts["attention_mass"], sum(np.array(r["mass"]) for r in read) / 10, atol=1e-9)
    assert facts["split_half"] == split_half(values)
    assert reduce_records(read[:1], {"per_token": False}).stderr is None
    assert json.dumps(facts)


# -- statistics of tables ----------------------------------------------------------------------------------------------


def test_halves_are_the_even_and_the_odd_samples() -> None:
    """Neighbours disagree, so that first and second half would agree."""
    up = np.arange(1.0, 13).reshape(3, 4)
    tables = np.stack([up, 13 - up, up, 13 - up, 2 * up, 3 * (13 - up)])
    assert split_half(tables) == agreement(up, 13 - up)
    assert split_half(tables)["spearman"] == -1  # type: ignore[index]
    odd = np.stack([up, up, 13 - up, up, up])  # of five samples, three are even
    assert split_half(odd) == agreement((up + 13 - up + up) / 3, up)
    assert split_half(np.stack([up, 0 * up, up, 0 * up])) is None
    assert split_half(tables[:4]) == agreement(up, 13 - up) and split_half(tables[:3]) is None


@pytest.mark.parametrize("count", [9, 11])
def test_groups_are_compared_in_pairs(count: int) -> None:
    tables = np.random.default_rng(0).random((count, 2, 4))  # what does not fill a group is left out
    means = [tables[i : i + 3].mean(0) for i in (0, 3, 6)]
    pairs = [agreement(a, b) for a, b in ((means[0], means[1]), (means[0], means[2]), (means[1], means[2]))]
    found = group_agreement(tables, 3)
    assert found is not None and (found["size"], found["groups"]) == (3, 3)
    for key in ("spearman", "top_10_percent_overlap"):
        values = [pair[key] for pair in pairs]
        assert found[f"{key}_mean"] == pytest.approx(sum(values) / 3, abs=1e-6) and found[f"{key}_least"] == min(values)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12), st.floats(0.05, 1))
def test_ranks_and_overlaps_by_counting(pairs: list[tuple[int, int]], share: float) -> None:
    a, b = (np.array(column, dtype=float) for column in zip(*pairs, strict=True))
    assert ranks(a).tolist() == [sum(y < x for y in a) + (sum(y == x for y in a) - 1) / 2 for x in a]
    count = max(1, round(share * len(a)))
    best = [sorted(range(len(x)), key=lambda i, x=x: (-x[i], i))[:count] for x in (a, b)]
    assert top_overlap(a, b, share) == len(set(best[0]) & set(best[1])) / count
    if np.ptp(a) and np.ptp(b):
        assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])
