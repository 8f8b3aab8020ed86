"""Scorers against references, and what a `LayerView` shows them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsemm_lmms import CompressionConfig, compress, kept_positions
from sparsemm_lmms.methods import METHODS, Model, find_method
from sparsemm_lmms.registry import allocator_names, find_allocator, find_scorer, scorer_names
from sparsemm_lmms.scorers.base import LayerView, Scorer
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
    config = CompressionConfig(method=method, budget=14, window_size=4)
    scores = np.arange(1.0, 9).reshape(2, 4) if find_method(method).needs_head_scores else None
    built = build_method(config, Model(2, 4, 2), scores)
    query, key = rows(2, 4, 50, 8), rows(2, 2, 50, 8, seed=1)
    batch = views.of_prompt(built, 1, query, key, 0.35, (50, 31), values=rows(2, 2, 50, 8, seed=2))
    alone = views.of_prompt(built, 1, query[1:, :, 19:], key[1:, :, 19:], 0.35, (31,))
    for head, count in enumerate(alone.counts[0]):
        assert (batch.index[1, head, :count] - 19).tolist() == alone.index[0, head].tolist()[:count]
    assert batch.counts[1].tolist() == alone.counts[0].tolist()


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
        assert known.word or known.words, f"{name} cannot be told in a name of VLMEvalKit"


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
    with compress(model, CompressionConfig(method="watching+uniform", budget=12, window_size=4)) as session:
        model(**inputs)
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
