"""VL-Cache, TGV-KV and CAKE against their published code and slow forms: token scores, budgets of layers, batches."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, compress, kept_positions, session, token_scores
from sparsemm_lmms.budgets import highest_averages, with_floor
from sparsemm_lmms.cache import CACHE_NAME, RaggedCache
from sparsemm_lmms.methods import Model, find_method
from sparsemm_lmms.scorers import base
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.post_vision import post_vision_attention
from sparsemm_lmms.selection import build_method

from ..wrappers import tiny
from . import golden

PRESETS = ["vlcache", "tgvkv", "cake"]
CASES: list[dict[str, Any]] = json.loads((golden.HERE / "layers.json").read_text())
IDS = [case["id"] for case in CASES]
Layers = list[tuple[Tensor, Tensor]]


@cache
def arrays() -> Any:
    return np.load(golden.HERE / "layers.npz")


def inputs(case: dict[str, Any]) -> tuple[Layers, Tensor]:
    """Queries and keys of each layer, and which tokens are images."""
    found = [
        tuple(torch.from_numpy(arrays()[f"{case['id']}.{x}{layer}"].astype(np.float32)) for x in "qk")
        for layer in range(case["layers"])
    ]
    return found, torch.from_numpy(arrays()[f"{case['id']}.vision"])  # type: ignore[return-value]


def filled(config: CompressionConfig, layers: Layers, lengths: list[int], vision: Tensor | None) -> RaggedCache:
    """A cache with left-padded prompts, whose layers are `[batch, heads, n, head_dim]` each."""
    query, key = layers[0]
    found = RaggedCache(build_method(config, Model(len(layers), query.shape[1], key.shape[1])), 4)
    columns = torch.arange(key.shape[2])
    mask = (columns >= columns[-1] + 1 - torch.tensor(lengths)[:, None]).long()
    found.begin(key.shape[2], len(lengths), mask, key.device, vision)
    for layer, (query, key) in zip(found.full_layers, layers, strict=True):
        layer.fill(query, key, key, key.shape[-1] ** -0.5, layer.step)
    return found


def alone(config: CompressionConfig, layers: Layers, vision: Tensor | None) -> list[list[list[int]]]:
    """Kept positions `[layer][kv head]` of one prompt."""
    batch = [(query[None], key[None]) for query, key in layers]
    found = filled(config, batch, [layers[0][1].shape[1]], None if vision is None else vision[None])
    return [[head.tolist() for head in found.kept_positions(layer)[0]] for layer in range(len(layers))]


def close(found: Tensor, wanted: np.ndarray, name: str) -> None:
    torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=1e-5, atol=1e-6, msg=lambda why: f"{name}: {why}")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_scores_are_those_of_the_published_code(case: dict[str, Any]) -> None:
    layers, vision = inputs(case)
    study = [(query, key, None) for query, key in layers]
    window = 4
    for scorer, name in (("post_vision", "vlcache.mass"), ("tgv", "tgv.score")):
        found = token_scores(scorer, study, budget=20, window_size=window, vision=vision)
        for layer, scores in enumerate(found):
            wanted = np.broadcast_to(arrays()[f"{case['id']}.{name}{layer}"], (len(scores), len(vision)))
            first = 4 if scorer == "tgv" else 0  # which that code keeps whatever they score
            assert (scores[:, :first] > len(vision)).all()
            close(scores[:, first:], wanted[:, first:-window].copy(), f"{name} of layer {layer}")
    for number, told in enumerate(case["cake"]):
        if number != 1:
            found = token_scores(
                "cake", study, budget=told["budget"], window_size=told["window_size"], gamma=told["gamma"]
            )
            for layer, scores in enumerate(found):
                close(scores, arrays()[f"{case['id']}.cake{number}.score{layer}"], f"cake of layer {layer}")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_a_cache_keeps_what_the_published_code_keeps(case: dict[str, Any]) -> None:
    layers, vision = inputs(case)
    config = CompressionConfig(method="vlcache", budget=case["budget"], window_size=case["vlcache_window"])
    runs = [(config, "vlcache", case["vlcache_counts"])]
    for number, told in enumerate(case["cake"]):
        own = {name: told[name] for name in ("budget", "window_size", "tau1", "tau2", "gamma")}
        counts = [kept - told["window_size"] for kept in told["kept"]]
        runs.append((CompressionConfig(method="cake", **own), f"cake{number}", counts))
    for config, name, counts in runs:
        kept = alone(config, layers, vision)
        *earlier, last = [(query, key, None) for query, key in layers]
        place = {"num_layers": len(layers), "layer_idx": len(layers) - 1}
        found = kept_positions(config.method, *last[:2], earlier=earlier, vision=vision, **place, **{
            name: value for name, value in config.to_dict().items() if name != "method"
        })  # fmt: skip
        assert [head.tolist() for head in found] == kept[-1]
        assert [len(heads[0]) - config.window_size for heads in kept] == counts, name
        for layer, heads in enumerate(kept):
            assert heads == arrays()[f"{case['id']}.{name}.kept{layer}"].tolist(), (name, layer)
    config = CompressionConfig(method="tgvkv", budget=case["budget"], window_size=4)
    shares = np.array(case["text_image"]) / sum(case["text_image"]) * config.base * len(layers)
    kept = alone(config, layers, vision)
    assert [len(heads[0]) - 4 for heads in kept] == np.floor(shares).tolist()
    for layer, heads in enumerate(kept):
        scores = arrays()[f"{case['id']}.tgv.score{layer}"][4:-4]
        best = np.argsort(-scores)[: len(heads[0]) - 8] + 4
        assert heads[0] == heads[-1] == sorted([*range(4), *best.tolist(), *range(len(vision) - 4, len(vision))])


def test_the_share_of_a_layer_in_the_middle_is_not_known() -> None:
    query, key = (x[0] for x in random_layers([40], layers=1)[0])
    with pytest.raises(ValueError, match="ask for the last one \\(layer_idx=3\\) and pass the 3 before it as earlier"):
        kept_positions("cake", query, key, budget=20, window_size=4, num_layers=4, layer_idx=2)


def random_layers(lengths: list[int], layers: int = 4, heads: int = 2, dim: int = 8, seed: int = 0) -> Layers:
    generator = torch.Generator().manual_seed(seed)
    shape = len(lengths), heads, max(lengths), dim
    return [
        (
            torch.randn(shape[0], 2 * heads, *shape[2:], generator=generator) * (layer % 3 + 0.7),
            torch.randn(shape, generator=generator),
        )
        for layer in range(layers)
    ]


LENGTHS = [61, 40, 33, 52, 9, 24, 61, 4]
WHERE = [[(5, 30)], [(0, 20), (25, 33)], [], [(10, 52)], [(2, 5)], [(3, 20)], [(1, 60)], [(0, 2)]]  # 3: nothing behind


def images() -> Tensor:
    vision = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.bool)
    for row, (length, places) in enumerate(zip(LENGTHS, WHERE, strict=True)):
        for begin, end in places:
            vision[row, max(LENGTHS) - length + begin : max(LENGTHS) - length + end] = True
    return vision


@pytest.mark.parametrize("method", [*PRESETS, "tgv+cake", "cake+layer_sparsity", "post_vision+adakv", "tgv+uniform"])
@pytest.mark.parametrize("redistribute", [False, True])
def test_eight_together_are_eight_alone(method: str, redistribute: bool) -> None:
    """Images early, twice, nowhere, at the end; prompts within the budget and within the window."""
    config = CompressionConfig(method=method, budget=20, window_size=6, redistribute=redistribute)
    layers, vision = random_layers(LENGTHS), images()
    together = filled(config, layers, LENGTHS, vision)
    for b, length in enumerate(LENGTHS):
        own = [(query[b, :, -length:], key[b, :, -length:]) for query, key in layers]
        kept = alone(config, own, vision[b, -length:])
        assert [[h.tolist() for h in together.kept_positions(i)[b]] for i in range(4)] == kept, b
        total = sum(len(head) for heads in kept for head in heads)
        most = min(length, config.budget) * 4 * 2
        assert total <= most
        if redistribute or length <= config.budget:
            assert total == most
        assert all(head[-6:] == list(range(max(length - 6, 0), length)) for heads in kept for head in heads)


def test_cake_spends_all_that_its_heads_can_use() -> None:
    for seed in range(8):
        config = CompressionConfig(method="cake", budget=30, window_size=6)
        kept = alone(config, [(q[0], k[0]) for q, k in random_layers([90], layers=6, seed=seed)], None)
        assert sum(len(heads[0]) for heads in kept) == 30 * 6 and len({len(heads[0]) for heads in kept}) > 2


def test_without_images_the_window_judges() -> None:
    """A text, an image at the end, and tokens of which nobody says what they are."""
    query, key = (x[0] for x in random_layers([40], layers=1)[0])
    nothing = torch.zeros(40, dtype=torch.bool)
    at_the_end = nothing.clone()
    at_the_end[9:] = True
    weights = LayerView(0, query[None], key[None], 8**-0.5, 6).attention_rows(6)[0]
    wanted = weights.sum(1).unflatten(0, (2, 2)).sum(1)[:, :-6]
    for scorer in ("post_vision", "tgv"):
        for vision in (nothing, at_the_end, None):
            [found] = token_scores(scorer, [(query, key, None)], budget=20, window_size=6, vision=vision)
            torch.testing.assert_close(found, wanted)
    layers = random_layers([61])
    for method in ("vlcache", "tgvkv"):
        kept = alone(
            CompressionConfig(method=method, budget=20, window_size=6), [(q[0], k[0]) for q, k in layers], None
        )
        counts = {len(heads[0]) for heads in kept}
        assert counts == {20} if method == "tgvkv" else len(counts) > 1


def test_tgv_with_several_images() -> None:
    """The rule written with loops: every image counts, text between them is text, the question is behind the last."""
    [(query, key)] = random_layers([40], layers=1)
    vision = torch.zeros(40, dtype=torch.bool)
    vision[6:15] = vision[20:28] = True
    mean = LayerView(0, query, key, 8**-0.5, 6).attention_rows(40)[0].double().mean(0)
    wanted = []
    for column in range(34):
        if vision[column]:
            weights = {t: mean[t:, t].mean() for t in range(28, 40)}
            wanted.append(sum(mean[t, column] * weight for t, weight in weights.items()))
        else:
            wanted.append(mean[:, column].sum() + 100 + 40 * (column < 4))
    [found] = token_scores("tgv", [(query[0], key[0], None)], budget=20, window_size=6, vision=vision)
    torch.testing.assert_close(found[0].double(), torch.stack(wanted).double(), rtol=1e-6, atol=1e-6)
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("pads", [None, [0, 11]])
def test_rows_come_in_blocks(pads: list[int] | None, monkeypatch: pytest.MonkeyPatch) -> None:
    [(query, key)] = random_layers([40, 40], layers=1)
    view = LayerView(
        0, query, key, 0.3, 6, pad=None if pads is None else torch.tensor(pads, dtype=torch.int32),
        vision=torch.arange(40).expand(2, -1) % 17 == 13, softcap=3.0, sinks=torch.randn(4),
    )  # fmt: skip
    whole, judged = view.attention_rows(25), post_vision_attention(view)
    monkeypatch.setitem(base.BLOCKS, "cpu", 2 * 4 * 40 * 3 + 5)
    rows = []
    for begin, block in view.attention_blocks(25):
        assert begin == 15 + len(rows) and block.numel() <= base.BLOCKS["cpu"]
        rows += [torch.nn.functional.pad(row, (0, 40 - row.shape[-1])) for row in block.unbind(2)]
    torch.testing.assert_close(torch.stack(rows, 2), whole)
    view.memo.clear()
    again = post_vision_attention(view)
    torch.testing.assert_close(again.mass, judged.mass)
    assert torch.equal(again.density, judged.density)
    behind = whole[:, :, 16:]  # the last image token is column 30: 31..39 judge
    high = (behind >= 0.01 * behind.amax(-1, keepdim=True)).double().sum((1, 2, 3))
    seen = [sum(column + 1 - pad for column in range(31, 40)) for pad in pads or (0, 0)]
    torch.testing.assert_close(judged.density, high / 4 / torch.tensor(seen))


WEIGHTS = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=9).map(np.array)


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.integers(0, 12), st.integers(0, 60))
def test_highest_averages(weights: np.ndarray, limit: int, total: int) -> None:
    """Against the definition: the best of all quotients; and no cell gains from a further one."""
    quotients = sorted((-w / (k + 1), i, k) for i, w in enumerate(weights) for k in range(limit) if w)
    chosen = [i for _, i, _ in quotients[:total]]
    zeros = np.flatnonzero(weights == 0)
    rest = min(total - len(chosen), limit * len(zeros))
    chosen += [zeros[j % len(zeros)] for j in range(rest)]
    found = highest_averages(weights, limit, total)
    assert found.tolist() == np.bincount(chosen, minlength=len(weights)).tolist()
    if len(weights) > 1:
        assert (found[:-1] <= highest_averages(weights[:-1], limit, total)).all()


@settings(max_examples=150, deadline=None)
@given(WEIGHTS, st.floats(0, 1), st.integers(1, 60))
def test_with_floor(weights: np.ndarray, share: float, total: int) -> None:
    least = share * total / len(weights)
    found = with_floor(weights, least, total)
    assert found.sum() == pytest.approx(total) and (found >= least * (1 - 1e-9)).all()
    above = found > least * (1 + 1e-9) + 1e-12
    if weights.any() and above.any():
        rate = found[above].sum() / weights[above].sum()
        np.testing.assert_allclose(found[above], rate * weights[above], rtol=1e-6)
        assert (rate * weights[~above] <= least * (1 + 1e-6) + 1e-9).all()
    if len(weights) > 1:
        assert (np.floor(found[:-1]) <= np.floor(with_floor(weights[:-1], least, total))).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(WEIGHTS, min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 40), st.booleans())
@pytest.mark.parametrize("preset", PRESETS)
def test_layers_only_shrink_and_stay_within_the_budget(
    preset: str, prompts: list[np.ndarray], base: int, length: int, redistribute: bool
) -> None:
    layers = min(map(len, prompts))
    config = CompressionConfig(method=preset, budget=base + 1, window_size=1, redistribute=redistribute)
    built = build_method(config, Model(layers, 2, 1))
    lengths = tuple(length + i for i in range(len(prompts)))
    seen, before = [], np.full((0, len(prompts), 1), 10**9)
    for layer in range(layers):
        seen.append(np.array([weights[layer] for weights in prompts]))
        found = np.stack([np.minimum(row, np.array(lengths)[:, None]) for row in built.allocator.counts_so_far(
            built.shape, seen, lengths
        )])  # fmt: skip
        assert (found[:-1] <= before).all() and (found >= 0).all()
        before = found
    total = before.sum((0, 2))
    assert (total <= base * layers).all()
    if redistribute:
        assert total.tolist() == [min(base, n) * layers for n in lengths]


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
@pytest.mark.parametrize("method", PRESETS)
def test_a_text_model_and_its_conversation(llama: LlamaForCausalLM, method: str) -> None:
    ids = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    with compress(llama, CompressionConfig(method=method, budget=16, window_size=4)) as running:
        tokens = running.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        lone = llama.generate(ids[1:, 25:], max_new_tokens=8, do_sample=False)
        assert torch.equal(tokens[1, 60:], lone[0, 35:])
        for turn in (1, 9, 30):  # fewer tokens than the window's, and more
            found = llama(ids[:1])[CACHE_NAME]
            found.compress_next = True
            llama(ids[1:, :turn], **{CACHE_NAME: found})
            kept = found.kept_per_head()
            assert found.prompt_lengths == (60 + turn,) and int(kept.sum()) <= 16 * 8
            assert (kept >= 4).all() and int(kept.sum()) > 14 * 8


@torch.no_grad()
def test_methods_that_read_images_must_know_them(
    llama: LlamaForCausalLM, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [name for name in PRESETS if find_method(name).reads_vision] == ["vlcache", "tgvkv"]
    model = AutoModelForImageTextToText.from_pretrained(tiny.MAKERS["qwen2_vl"](tmp_path)).eval()
    config = CompressionConfig(method="post_vision+uniform", budget=12, window_size=4)
    ids = torch.randint(8, 20, (1, 30))
    with compress(model, config):
        with pytest.raises(ValueError, match="method='post_vision\\+uniform' tells image tokens apart.*pass input_ids"):
            model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=torch.ones_like(ids))
        model(ids)
    monkeypatch.setattr(session, "vision_ids", lambda model: [])
    with pytest.raises(ValueError, match="Qwen2VLForConditionalGeneration names no image_token_id; use a method"):
        with compress(model, config):
            pass
    with compress(model, CompressionConfig(method="cake", budget=12, window_size=4)):
        model(ids)
