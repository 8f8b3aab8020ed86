"""Scorers against references, and what a `LayerView` shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsemm_lmms import CompressionConfig, compress, kept_positions, token_scores
from sparsemm_lmms.methods import METHODS, Model, find_method
from sparsemm_lmms.registry import allocator_names, find_allocator, find_scorer, scorer_names
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.scorers.base import LayerView, Scorer
from sparsemm_lmms.scorers.expected_attention import turned
from sparsemm_lmms.selection import build_method
from sparsemm_lmms.settings import declared

from ..wrappers import tiny
from . import golden, views
from .plugins import plugin

FREE = [f"{scorer}+{allocator}" for scorer in scorer_names() for allocator in allocator_names()]


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_keydiff_keeps_what_the_published_code_keeps() -> None:
    cases = json.loads((golden.HERE / "keydiff.json").read_text())
    arrays = np.load(golden.HERE / "keydiff.npz")
    assert len(cases) == 16
    for case in cases:
        key = torch.from_numpy(arrays[f"{case['id']}.k"].astype(np.float32))
        settings = {"budget": case["budget"], "window_size": case["window_size"]}
        kept = kept_positions("keydiff+uniform", torch.zeros_like(key), key, **settings)
        assert np.array_equal(torch.stack(kept), arrays[f"{case['id']}.kept"]), case["id"]


def able(name: str) -> bool:
    """Whether the two parts go together."""
    try:
        return find_method(name).compresses
    except ValueError as error:
        assert "holds the scores of heads against each other" in str(error)
        return False


@pytest.mark.parametrize("method", [name for name in FREE if able(name)])
def test_every_combination_keeps_of_a_padded_prompt_what_it_keeps_alone(method: str) -> None:
    """Layer after layer, so that what a scorer remembers of a sequence is tried as well."""
    scores = np.arange(1.0, 9).reshape(2, 4) if find_method(method).needs_head_scores else None
    curves = Retention.random(2, 4)
    for more in ({}, {"critical": True, "pooling": "maxpool"} if "critical" in find_method(method).settings else {}):
        built = build_method(
            CompressionConfig(method=method, budget=14, window_size=4, **more), Model(2, 4, 2), scores, curves
        )
        kept: list[Any] = [{}, {}]
        for layer in range(2):
            query, key, value = (rows(2, heads, 50, 8, seed=3 * layer + i) for i, heads in enumerate((4, 2, 2)))
            common = {"output": rows(16, 32)}
            batch = views.of_prompt(built, layer, query, key, 0.35, (50, 31), values=value, state=kept[0], **common)
            query, key, value = (x[1:, :, 19:] for x in (query, key, value))
            alone = views.of_prompt(built, layer, query, key, 0.35, (31,), values=value, state=kept[1], **common)
            for head, count in enumerate(alone.counts[0]):
                assert (batch.index[1, head, :count] - 19).tolist() == alone.index[0, head].tolist()[:count]
            assert batch.counts[1].tolist() == alone.counts[0].tolist()


@pytest.mark.parametrize("scorer", scorer_names())
def test_heads_that_hold_different_tokens_are_judged_as_if_alone(scorer: str) -> None:
    """What is chosen again from what heads hold: every head as a sequence of its own."""
    settings = {"critical": True} if "critical" in declared(find_scorer(scorer)) else {}
    config = CompressionConfig(method=f"{scorer}+uniform", budget=9, window_size=4, **settings)
    query, key, value, output = rows(1, 4, 6, 8), rows(1, 2, 30, 8, seed=1), rows(1, 2, 30, 8, seed=2), rows(16, 32)
    held = np.array([30, 21])
    common = {"values": value, "output": output}
    both = views.again(build_method(config, Model(1, 4, 2)), 0, query, key, 0.35, held, 60, **common)
    for head, count in enumerate(held):
        pair, last = slice(2 * head, 2 * head + 2), slice(30 - count, 30)
        own = {"values": value[:, head : head + 1, last], "output": output[:, 16 * head : 16 * head + 16]}
        one = build_method(config, Model(1, 2, 1))
        keys = key[:, head : head + 1, last]
        alone = views.again(one, 0, query[:, pair], keys, 0.35, held[head : head + 1], 60, **own)
        assert both.counts[0, head] == alone.counts[0, 0] == 9
        assert (both.index[0, head] - (30 - count)).tolist() == alone.index[0, 0].tolist()


@pytest.mark.parametrize("scorer", scorer_names())
@pytest.mark.parametrize("tokens", [3, 4, 5, 6, 13])
def test_short_prompts(scorer: str, tokens: int) -> None:
    """Windows and budgets that cover the prompt, and one token outside the window."""
    layer = rows(4, tokens, 8), rows(2, tokens, 8, seed=1), rows(2, tokens, 8, seed=2)
    for budget in (5, 8, 20):
        scores = token_scores(scorer, [layer, layer], budget=budget, window_size=4)
        assert all(x.shape == (2, max(tokens - 4, 0)) and x.dtype == torch.float32 for x in scores)
        assert all(x.isfinite().all() for x in scores)
        common = {"budget": budget, "window_size": 4, "value": layer[2]}
        kept = kept_positions(f"{scorer}+uniform", *layer[:2], **common)
        assert [len(row) for row in kept] == [min(budget, tokens)] * 2
        assert all(row[-min(tokens, 4) :].tolist() == list(range(max(tokens - 4, 0), tokens)) for row in kept)


def test_values_of_one_size_and_keys_of_one_direction_count_for_nothing() -> None:
    query, key = rows(4, 30, 8), rows(2, 30, 8, seed=1)
    common = {"budget": 12, "window_size": 4}
    [attention] = token_scores("window_attention", [(query, key, None)], **common)
    [mixed] = token_scores("headwisemixkv", [(query, key, torch.ones(2, 30, 8))], **common, h=[0.0, 0.0])
    torch.testing.assert_close(mixed, attention)
    [alike] = token_scores("keydiff", [(query, torch.ones(2, 30, 8), None)], **common)
    assert not alike.any()


def test_critical_picks_half_by_score_and_half_by_the_projected_value() -> None:
    """Also where heads keep different numbers."""
    query, key, value, output = rows(4, 40, 8), rows(2, 40, 8, seed=1), rows(2, 40, 8, seed=2), rows(16, 32)
    common = {"budget": 14, "window_size": 4, "num_layers": 1}
    [scores] = token_scores("window_attention", [(query, key, value)], budget=14, window_size=4)
    plain = kept_positions("adakv", query, key, **common)
    got = kept_positions("adakv", query, key, value=value, output=output, critical=True, **common)
    assert len({len(row) for row in got}) > 1
    for head, kept in enumerate(got):
        count = len(plain[head]) - 4
        norms = torch.stack(
            [(value[head] @ output[:, 8 * h : 8 * h + 8].T).abs().sum(-1) for h in (2 * head, 2 * head + 1)]
        )
        best = scores[head].argsort(descending=True)[: count // 2].tolist()
        weighted = (scores[head] + 1e-4) * norms.mean(0)[:36]
        rest = [i for i in weighted.argsort(descending=True).tolist() if i not in best][: count - count // 2]
        assert kept[:-4].tolist() == sorted([*best, *rest])
    with pytest.raises(ValueError, match="critical=true reads the weight of the layer's output projection"):
        kept_positions("snapkv", query, key, value=value, critical=True, budget=14, window_size=4)


def test_a_table_is_read_and_must_fit(tmp_path: Path) -> None:
    layer, common = (rows(4, 30, 8), rows(2, 30, 8, seed=1), rows(2, 30, 8, seed=2)), {"budget": 12, "window_size": 4}
    table = [[0.2, 0.7], [0.5, 0.1]]
    wanted = token_scores("headwisemixkv", [layer, layer], h=table, **common)
    (tmp_path / "rows.json").write_text(json.dumps(table))
    named = {
        f"{i}-{j}-{kind}": [2 * x, 0.0]
        for i, row in enumerate(table)
        for j, x in enumerate(row)
        for kind in ("key", "value")
    }
    (tmp_path / "named.json").write_text(json.dumps(named))
    for given in (np.array(table), torch.tensor(table, dtype=torch.float64), *map(str, tmp_path.iterdir())):
        got = token_scores("headwisemixkv", [layer, layer], h=given, **common)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    config = CompressionConfig(method="headwisemixkv", h=table)
    assert CompressionConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    for given, told in (
        ([[0.1] * 3] * 2, r"h has shape \[2, 3\] but the model has 2 layers x 2 kv heads"),
        ([[0.1, "x"]], "is not a table of numbers"),
        ([[0.1], [0.1, 0.2]], "is not a table of numbers"),
        (0.5, "is not a table of numbers"),
        (str(tmp_path / "none.json"), "Table h .*none.json does not exist"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=told):
            token_scores("headwisemixkv", [layer, layer], h=given, **common)


def test_presets_are_combinations() -> None:
    names = {parts: name for name in FREE if able(name) and (parts := find_method(name))}
    assert names[METHODS["snapkv"]] == "window_attention+uniform"
    assert names[METHODS["sparsemm"]] == "window_attention+head_scores"
    query, key = rows(4, 60, 8), rows(2, 60, 8, seed=1)
    for preset, free in (("pyramidkv", "window_attention+pyramid"), ("local_window", "recency+uniform")):
        pair = [kept_positions(name, query, key, budget=40, num_layers=3, layer_idx=2) for name in (preset, free)]
        assert [head.tolist() for head in pair[0]] == [head.tolist() for head in pair[1]]


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="allocator=adakv holds .* scorer=keydiff do not allow; use window_attention"):
        find_method("keydiff+adakv")
    with pytest.raises(ValueError, match="Unknown scorer 'keydif'; known: .*Did you mean 'keydiff'"):
        find_method("keydif+uniform")
    with pytest.raises(ValueError, match="Unknown allocator 'piramid'.*Did you mean 'pyramid'"):
        find_method("keydiff+piramid")


@pytest.mark.parametrize("kind", [*map(find_scorer, scorer_names()), *map(find_allocator, allocator_names())])
def test_settings_are_declared_in_full(kind: type) -> None:
    for name, known in declared(kind).items():
        assert known.checked(known.default) == known.default and known.help, name
        assert known.word or known.words or known.kind == "Table", f"{name} cannot be told in a name of VLMEvalKit"


def test_a_mean_does_not_count_the_padding() -> None:
    key, pads = rows(3, 2, 9, 5), torch.tensor([0, 4, 8], dtype=torch.int32)
    view = LayerView(0, rows(3, 4, 9, 5), key, 0.5, 2, pad=pads)
    for b, pad in enumerate(pads.tolist()):
        torch.testing.assert_close(view.mean(key)[b], key[b, :, pad:].mean(1, keepdim=True))
        torch.testing.assert_close(view.mean(key[..., 0])[b], key[b, :, pad:, 0].mean(1, keepdim=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_attention_rows(softcap: float | None, with_sinks: bool) -> None:
    query, key, pads = rows(2, 4, 9, 5), rows(2, 2, 9, 5, seed=1), torch.tensor([0, 3], dtype=torch.int32)
    sinks = rows(4, seed=2) if with_sinks else None
    got = LayerView(0, query, key, 0.5, 2, pad=pads, softcap=softcap, sinks=sinks).attention_rows(3)
    for b in range(2):
        for h in range(4):
            for i, place in enumerate((6, 7, 8)):
                logits = key[b, h // 2, pads[b] : place + 1] @ query[b, h, place] * 0.5
                logits = logits if softcap is None else softcap * (logits / softcap).tanh()
                sink = logits.new_zeros(0) if sinks is None else sinks[h : h + 1]
                want = torch.cat([logits, sink]).softmax(0)[: len(logits)]
                torch.testing.assert_close(got[b, h, i, pads[b] : place + 1], want)
                assert not got[b, h, i, : pads[b]].any() and not got[b, h, i, place + 1 :].any()


class Watching(Scorer):
    """Notes what it is shown."""

    seen: list[LayerView] = []
    reads_turn = True

    def score(self, view: LayerView) -> Tensor:
        view.state["layers"] = [*view.state.get("layers", []), view.layer_idx]
        type(self).seen.append(view)
        return view.value.float().norm(dim=-1)[..., : view.length]


@torch.no_grad()
@pytest.mark.parametrize("family", tiny.MAKERS)
def test_a_scorer_sees_images_rotary_and_its_own_state(family: str, tmp_path: Any, monkeypatch: Any) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tiny.MAKERS[family](tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "What is written here?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[tiny.picture(1)], return_tensors="pt")
    Watching.seen.clear()
    plugin(monkeypatch, "scorers", "watching", Watching)
    attention, projected = [layer.self_attn for layer in model.get_decoder().layers], []
    hook = attention[1].q_proj.register_forward_hook(lambda module, args, made: projected.append(made))
    with compress(model, CompressionConfig(method="watching+uniform", budget=12, window_size=4)) as session:
        model(**inputs)
        hook.remove()
        report = session.cache.report()
    assert report["kept_tokens"] == 12
    ids, first = inputs["input_ids"], Watching.seen[0]
    token = getattr(model.config, "image_token_id", None) or model.config.image_token_index
    assert torch.equal(first.vision, ids == token) and first.vision.any()
    assert Watching.seen[-1].state["layers"] == list(range(tiny.LAYERS)) and first.pad is None
    places = torch.arange(ids.shape[1])[None]
    cos, sin = first.rotary(places if family == "llava_next" else places.expand(3, 1, -1))
    assert cos.shape[-2:] == (ids.shape[1], first.key.shape[-1]) and torch.equal(cos[0, 0], torch.ones_like(cos[0, 0]))
    assert not sin[0, 0].any()
    second = Watching.seen[1]
    assert second.base == 8 and torch.equal(second.output, attention[1].o_proj.weight)
    before = turned(second.query, second.turn, back=True).transpose(1, 2).flatten(2)  # whatever axes the positions have
    torch.testing.assert_close(before, projected[0], rtol=1e-4, atol=1e-5)
    cos, _ = second.rotary(second.position[..., None])
    torch.testing.assert_close(cos[0], second.turn[0][0, -1:])  # the newest token's, from which the next are counted
