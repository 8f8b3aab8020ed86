"""Retention curves against attention matrices, and what `waterfill` makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import LayerPrompt, Model
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.selection import build_method, kept_positions
from sparsemm_lmms.session import compress
from sparsemm_lmms.visual_heads.chase import ChaseSettings, score_heads
from sparsemm_lmms.visual_heads.inputs import make_batch, with_answers
from sparsemm_lmms.visual_heads.passes import pad_token
from sparsemm_lmms.visual_heads.retention import COUNTS, WINDOW, held_masses
from sparsemm_lmms.visual_heads.token_grid import grid_for

from . import tiny
from .test_chase import make_samples


def slow_curves(model, processor, sample) -> np.ndarray:
    """[layers, kv_heads, L]: mass that the k best tokens hold, from the attention matrices of the sample alone."""
    batch = make_batch([sample], processor, grid_for(model.config), "high", model)
    answer = processor.tokenizer(sample.answer, add_special_tokens=False)["input_ids"]
    inputs = with_answers(batch, [answer], pad_token(processor.tokenizer), model)
    before = model.config.get_text_config()._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    kv_heads = model.config.get_text_config().num_key_value_heads
    length = batch.prompt - WINDOW
    table = []
    for weights in attentions:
        groups = weights[0].double().unflatten(0, (kv_heads, -1))  # [kv_heads, group, rows, keys]
        window = groups[:, :, length : batch.prompt, :length].mean((1, 2))
        padded = torch.nn.functional.pad(window, (2, 2))
        pooled = torch.stack([padded[:, i : i + 5].sum(-1) / 5 for i in range(length)], dim=-1)
        later = groups[:, :, batch.prompt : batch.prompt + len(answer), :length].mean((1, 2))
        rows = []
        for score, mass in zip(pooled, later, strict=True):
            order = sorted(range(length), key=lambda i, score=score: (-round(float(score[i]), 9), -i))
            rows.append(np.cumsum(mass[order].numpy()))
        table.append(rows)
    return np.array(table)


@pytest.mark.parametrize("kind", ["llava_next", "qwen2_vl"])
def test_curves_are_those_of_the_attention_matrices(kind, tmp_path):
    model, processor = (
        (tiny.llava_next(), tiny.llava_processor())
        if kind == "llava_next"
        else (tiny.qwen2_vl(), tiny.qwen_processor())
    )
    samples = list(make_samples())
    settings = ChaseSettings("teacher", batch_size=2, retention_images=3)  # two batches of two, images one by one
    scores = score_heads(model, processor, samples, tmp_path / "s.json", settings, progress=False)
    alone = [slow_curves(model, processor, sample) for sample in samples[:4]]
    found = HeadScores.load(tmp_path / "s.json").retention
    assert scores.provenance["retention"]["images"] == 4
    points = found.counts.astype(int)
    assert points[0] == 0 and list(points[1:]) == COUNTS[: len(points) - 1].tolist()
    assert not found.held[..., 0].any()
    for i, count in enumerate(points[1:], start=1):
        held = np.mean([curve[..., min(count, curve.shape[-1]) - 1] for curve in alone], axis=0)
        np.testing.assert_allclose(found.held[..., i], held, atol=3e-5)
    assert points[-2] < max(curve.shape[-1] for curve in alone) <= points[-1]


def test_a_sample_without_an_answer_says_nothing():
    model, processor = tiny.qwen2_vl(), tiny.qwen_processor()
    first, second = list(make_samples(2))
    empty = type(first)(first.images[0], first.prompt, "", first.boxes)
    batch = make_batch([empty, second], processor, grid_for(model.config), "high", model)
    pad = pad_token(processor.tokenizer)
    nothing, something = held_masses(model, batch, processor.tokenizer, pad)
    alone = make_batch([second], processor, grid_for(model.config), "high", model)
    assert nothing is None
    np.testing.assert_allclose(something, held_masses(model, alone, processor.tokenizer, pad)[0], atol=1e-6)


curves = st.integers(0, 10_000).map(np.random.default_rng)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(curves, st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 90))
def test_fill_is_the_best_for_concave_curves(dice, layers, heads, most, total):
    """Against handing out token by token to whoever gains most."""
    length = 24
    gains = -np.sort(-dice.random((layers, heads, length)), axis=-1) / (length * 2)
    held = np.concatenate([np.zeros((layers, heads, 1)), gains.cumsum(-1)], axis=-1)
    got = Retention(np.arange(length + 1), held).fill(total, most)
    counts = np.zeros((layers, heads), dtype=int)
    for _ in range(total):
        room = counts < min(most, length)
        if not room.any():
            break
        gain = np.where(room, np.take_along_axis(gains, np.minimum(counts, length - 1)[..., None], -1)[..., 0], -1)
        counts[np.unravel_index(gain.argmax(), gain.shape)] += 1
    np.testing.assert_allclose(got, counts, atol=1e-9)


def test_fill_climbs_the_hull_of_a_curve_that_is_not_concave():
    """A head that gains only at its fourth token gets all four, or the other head the first ones."""
    counts = np.arange(5)
    late, early = [0, 0, 0, 0, 0.8], [0, 0.3, 0.35, 0.36, 0.36]
    both = Retention(counts, np.array([[late, early]]))
    assert both.fill(1, 9).tolist() == [[0, 1]]  # .3 a token against .2
    assert both.fill(5, 9).tolist() == [[4, 1]]
    assert both.fill(99, 9).tolist() == [[4, 4]]
    assert both.fill(99, 2).tolist() == [[2, 2]]


def some_scores(dice, layers=3, q_heads=8, kv_heads=4) -> HeadScores:
    gains = -np.sort(-dice.random((layers, kv_heads, 8)), axis=-1) / 20
    held = np.concatenate([np.zeros((layers, kv_heads, 1)), gains.cumsum(-1)], axis=-1)
    counts = np.array([0, 1, 2, 4, 8, 16, 32, 64, 128])
    facts = {"retention": Retention(counts, held).facts()}
    return HeadScores(dice.random((layers, q_heads)) ** 4, provenance=facts)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(curves, st.integers(33, 200), st.integers(1, 300), st.sampled_from([0, 0.3, 0.5, 1]))
def test_spends_exactly_what_there_is(dice, budget, tokens, share):
    scores = some_scores(dice)
    config = CompressionConfig(method="waterfill", budget=budget, score_share=share)
    method = build_method(config, Model(3, 8, 4), scores.values, scores.retention)
    prompts = [LayerPrompt(layer, torch.empty(0), (tokens,)) for layer in range(3)]
    counts = np.stack([method.counts(prompt)[0] for prompt in prompts])
    assert counts.sum() == min(budget - 32, tokens) * 12
    assert counts.min() >= 0 and counts.max() <= tokens


def test_the_two_ends_are_sparsemm_and_pure_mass():
    scores = some_scores(np.random.default_rng(3))
    spent = {}
    for name, options in {
        "sparsemm": {"redistribute": True},
        "waterfill": {"score_share": 1.0},
        "mass": {"score_share": 0.0},
    }.items():
        config = CompressionConfig(method="sparsemm" if name == "sparsemm" else "waterfill", budget=64, **options)
        method = build_method(config, Model(3, 8, 4), scores.values, scores.retention)
        spent[name] = np.stack([method.counts(LayerPrompt(i, torch.empty(0), (500,)))[0] for i in range(3)])
    assert np.array_equal(spent["sparsemm"], spent["waterfill"])  # no head is full, so nothing is redistributed
    assert np.abs(spent["mass"] - scores.retention.fill(32 * 12, 500)).max() <= 1


def test_kept_positions_and_a_model_agree():
    model, processor = tiny.qwen2_vl(), tiny.qwen_processor()
    batch = make_batch(list(make_samples(2)), processor, grid_for(model.config), "high", model)
    text = model.config.get_text_config()
    scores = some_scores(np.random.default_rng(1), text.num_hidden_layers, text.num_attention_heads, 2)
    config = CompressionConfig(method="waterfill", budget=40)
    with compress(model, config, scores) as session, torch.no_grad():
        model(**batch.inputs)
        kept = session.cache.report()["kept_tokens"]
    assert np.allclose(kept, 40)
    dice = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 90, 16, generator=dice), torch.randn(2, 90, 16, generator=dice)
    rows = kept_positions(
        "waterfill", query, key, budget=40, num_layers=3, layer_idx=1, head_scores=scores.values,
        retention=scores.retention,
    )  # fmt: skip
    method = build_method(config, Model(3, 4, 2), scores.values, scores.retention)
    assert [len(row) - 32 for row in rows] == method.counts(LayerPrompt(1, torch.empty(0), (58,)))[0].tolist()


def test_controls_carry_their_curves():
    scores = some_scores(np.random.default_rng(2))
    mean, dealt = scores.layer_mean().retention, scores.permuted(5).retention
    np.testing.assert_allclose(mean.held, np.repeat(scores.retention.held.mean(1, keepdims=True), 4, 1), atol=1e-6)
    order = np.sort(dealt.held.reshape(12, -1), axis=0)
    np.testing.assert_allclose(order, np.sort(scores.retention.held.reshape(12, -1), axis=0), atol=1e-6)
    assert not np.array_equal(dealt.held, scores.retention.held)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({}, "needs retention curves, which these head scores lack"),
        ({"retention": None}, "needs retention curves"),
        ({"retention": []}, "lack counts or held"),
        ({"retention": {"counts": [0, 1]}}, "lack counts or held"),
        ({"retention": {"counts": [0, 1], "held": [[[0, 0.5]]]}}, "are for [1, 1] layers and kv heads"),
        ({"retention": {"counts": [0, 1], "held": [[[0, 1.5]]]}}, "outside 0..1"),
        ({"retention": {"counts": [0, 1], "held": [[[0, float("nan")]]]}}, "outside 0..1"),
        ({"retention": {"counts": [1, 2], "held": [[[0, 0.5]]]}}, "do not ascend from 0"),
        ({"retention": {"counts": [0, 0], "held": [[[0, 0.5]]]}}, "do not ascend from 0"),
        ({"retention": {"counts": "ab", "held": [[["x", 0.5]]]}}, "are no numbers"),
        ({"retention": {"counts": [0, 1], "held": [[[0, 0.5], [0]]]}}, "are no numbers"),
    ],
)
def test_unusable_curves_are_one_sentence(facts, words):
    scores = HeadScores(np.ones((2, 4)), provenance=facts)
    with pytest.raises(ValueError, match="chase") as caught:
        build_method(CompressionConfig(method="waterfill", budget=64), Model(2, 4, 2), scores.values, scores.retention)
    assert words in str(caught.value) and "\n" not in str(caught.value)
