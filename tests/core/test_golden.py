"""Every published selection, exactly: through the study functions and through a real model's cache."""

from __future__ import annotations

import json
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import (
    CompressionConfig,
    HeadScores,
    RaggedCache,
    compress,
    head_budgets,
    kept_positions,
    token_scores,
)
from sparsemm_lmms.methods import LayerPrompt, Model
from sparsemm_lmms.selection import _Judged, build_method
from tests.kernels import naive

from . import golden, slow


def test_all_cases_are_here() -> None:
    assert len(golden.CASES) == 134


@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case["id"])
def test_kept_positions(case) -> None:
    query, key = golden.inputs(case)
    got = kept_positions(
        case["method"],
        query,
        key,
        num_layers=case.get("num_hidden_layers", 1),
        layer_idx=case.get("layer_idx", 0),
        head_scores=golden.head_scores(case),
        **golden.settings(case),
    )
    assert [row.tolist() for row in got] == golden.expected(case)


class _Given(nn.Module):
    """A projection that ignores its input and returns what it was told to."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states  # [heads, n, d]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.states.transpose(0, 1).reshape(1, hidden.shape[1], -1).expand(hidden.shape[0], -1, -1)


class _NoRotation(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(1, position_ids.shape[-1], self.dim)
        return ones, torch.zeros_like(ones)


def given(layers: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> LlamaForCausalLM:
    """A Llama whose layers' attention receives these queries, keys and (where not None) values."""
    (q_heads, _, dim), kv_heads = layers[0][0].shape, layers[0][1].shape[0]
    config = LlamaConfig(
        vocab_size=8, hidden_size=dim * q_heads, intermediate_size=16, num_hidden_layers=len(layers), head_dim=dim,
        num_attention_heads=q_heads, num_key_value_heads=kv_heads, max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = _NoRotation(dim)
    for layer, (query, key, value) in zip(model.model.layers, layers, strict=True):
        layer.self_attn.q_proj, layer.self_attn.k_proj = _Given(query), _Given(key)
        if value is not None:
            layer.self_attn.v_proj = _Given(value)
    return model


@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case["id"])
def test_model_cache(case) -> None:
    """The same through a Llama whose attention receives the given queries and keys in every layer."""
    query, key = golden.inputs(case)
    layers = case.get("num_hidden_layers", 1)
    model = given([(query, key, None)] * layers)
    values = golden.head_scores(case)
    compression = CompressionConfig(method=case["method"], **golden.settings(case))
    with torch.no_grad(), compress(model, compression, None if values is None else HeadScores(values)) as session:
        model(torch.zeros(1, query.shape[1], dtype=torch.long))
        idx = case.get("layer_idx", 0)
        got = session.cache.kept_positions(idx)[0]
        assert [row.tolist() for row in got] == golden.expected(case)
        layer = session.cache.layers[idx]
        for head, row in enumerate(got):  # the store holds the keys of exactly these positions
            start = int(layer.start[0, head])
            torch.testing.assert_close(layer.keys[start : start + len(row)], key[head, row], rtol=0, atol=0)


@pytest.mark.parametrize("case", golden.scored(), ids=lambda case: case.case["id"])
def test_scorers(case: golden.Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores within 1e-5 and positions exactly, by the study functions and in a model, whose cache must give both."""
    layers, seen = case.layers, []
    scored = _Judged.ranked
    monkeypatch.setattr(
        _Judged, "ranked", lambda self, outside: seen.append(scored(self, outside)[0]) or seen[-1][None]
    )
    for entry in case.entries:
        name, i, more = entry["method"], entry["layer_idx"], case.more(entry)
        scores, kept = case.tensor(entry["score"]), case.tensor(entry["kept"]).long().tolist()
        told = token_scores(name, layers[: i + 1], **case.settings, **more)[i]
        torch.testing.assert_close(told, scores, rtol=0, atol=1e-5)
        place = {"layer_idx": i, "num_layers": len(layers), "earlier": layers[:i], "value": layers[i][2]}
        got = kept_positions(f"{name}+uniform", *layers[i][:2], **place, **case.settings, **more)
        assert [row.tolist() for row in got] == kept
        if i in (0, len(layers) - 1):  # a pass through a model shows all of its layers
            seen.clear()
            config = CompressionConfig(method=f"{name}+uniform", **case.settings, **more)
            with torch.no_grad(), compress(given(layers[: i + 1]), config) as session:
                session.model(torch.zeros(1, layers[0][0].shape[1], dtype=torch.long))
                got = session.cache.kept_positions(i)[0]
            assert [row.tolist() for row in got] == kept
            torch.testing.assert_close(seen[i], scores, rtol=0, atol=1e-5)
        if "online_h" in entry:
            online, table = (
                token_scores(name, layers[:1], **case.settings, h=h)[0]
                for h in ("online", case.tensor(entry["online_h"]))
            )
            torch.testing.assert_close(online, table, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", golden.scored(), ids=lambda case: case.case["id"])
def test_adakv_shares_by_attention_and_picks_by_the_score(case: golden.Scored) -> None:
    settings, layers = case.settings, case.layers
    config = CompressionConfig(method="adakv", **settings)
    model = Model(len(layers), layers[0][0].shape[0], layers[0][1].shape[0])
    for entry in case.entries[:: len(layers) - 1]:
        name, i = entry["method"], entry["layer_idx"]
        if name == "keydiff":  # which does not say how heads compare
            continue
        query, key, value = layers[i]
        attention = naive.window_score(
            query[None, :, -config.window_size :], key[None], key.shape[-1] ** -0.5, config.kernel_size,
            config.pooling, config.gqa_func,
        )[0]  # fmt: skip
        length = attention.shape[1]
        counts = slow.capacities(config, model, None, i, attention.tolist(), length)
        score = case.tensor(entry["score"])
        wanted = [sorted(row.argsort(descending=True)[:c].tolist()) for row, c in zip(score, counts, strict=True)]
        place = {"layer_idx": i, "num_layers": len(layers), "earlier": layers[:i], "value": value}
        got = kept_positions(f"{name}+adakv", query, key, **place, **settings, **case.more(entry))
        assert [row[: row.numel() - config.window_size].tolist() for row in got] == wanted


def turn(places: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = places[..., None].float() * 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()


def test_what_kvpress_computes() -> None:
    """Expected Attention and CriticalKV."""
    arrays = np.load(golden.HERE / "kvpress.npz")
    for case in json.loads((golden.HERE / "kvpress.json").read_text()):
        query, key, value, output = (torch.from_numpy(arrays[f"{case['id']}.{x}"].astype(np.float32)) for x in "qkvo")
        cos, sin = turn(torch.arange(query.shape[1]), query.shape[2])
        query, key = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (query, key))
        common = {"budget": case["budget"], "window_size": case["window_size"]}
        more = common | {"rotary": partial(turn, dim=query.shape[2])}
        scores = token_scores("expected_attention", [(query, key, value)], **more)[0]
        wanted = torch.from_numpy(arrays[f"{case['id']}.expected"])
        torch.testing.assert_close(scores[:, 4:], wanted, rtol=0, atol=1e-5)
        kept = torch.stack(kept_positions("expected_attention", query, key, value=value, **more))
        assert np.array_equal(kept, arrays[f"{case['id']}.expected_kept"])
        kept = torch.stack(kept_positions("snapkv", query, key, value=value, output=output, critical=True, **common))
        assert np.array_equal(kept, arrays[f"{case['id']}.critical_kept"])


def prompt(layer_idx: int) -> LayerPrompt:
    """A prompt long enough that nothing is clamped."""
    return LayerPrompt(layer_idx, torch.empty(0), (10**6,))


def test_allocations() -> None:
    """All 128 allocations of the published LLaVA-NeXT-Vicuna table (kept outside the repository: no licence stated)."""
    if not (golden.SHARED / "allocation.json").exists():
        pytest.skip("the published LLaVA-NeXT score table states no licence, so it and its allocations are not shipped")
    cases = json.loads((golden.SHARED / "allocation.json").read_text())["cases"]
    wanted = np.load(golden.SHARED / "allocation.npz")
    table = np.load(golden.SHARED / "scores" / "llava-v1.6.npz")["mean"]
    assert len(cases) == 128
    for case in cases:
        got = head_budgets(
            table,
            kv_heads=case["kv_heads"],
            budget=case["budget"],
            window_size=case["window_size"],
            ratio=case["ratio"],
        )
        np.testing.assert_array_equal(got.numpy(), wanted[case["array"]], err_msg=case["id"])
        settings = {name: case[name] for name in ("budget", "window_size", "ratio")}
        model = Model(case["layers"], case["q_heads"], case["kv_heads"])
        cache = RaggedCache(build_method(CompressionConfig(method="sparsemm", **settings), model, table))
        rows = [layer.method.capacities(prompt(i))[0] for i, layer in enumerate(cache.layers)]
        np.testing.assert_array_equal(np.stack(rows), wanted[case["array"]], err_msg=case["id"])
