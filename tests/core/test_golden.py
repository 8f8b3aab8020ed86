"""Every published selection, exactly: through the study functions and through a real model's cache."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, HeadScores, RaggedCache, compress, head_budgets, kept_positions
from sparsemm_lmms.methods import LayerPrompt, Model
from sparsemm_lmms.selection import build_method

from . import golden


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
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ones = torch.ones(1, position_ids.shape[-1], 16)
        return ones, torch.zeros_like(ones)


@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case["id"])
def test_model_cache(case) -> None:
    """The same through a Llama whose attention receives the given queries and keys in every layer."""
    query, key = golden.inputs(case)
    layers = case.get("num_hidden_layers", 1)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16 * case["q_heads"], intermediate_size=16, num_hidden_layers=layers, head_dim=16,
        num_attention_heads=case["q_heads"], num_key_value_heads=case["kv_heads"], max_position_embeddings=2048,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.model.rotary_emb = _NoRotation()
    for layer in model.model.layers:
        layer.self_attn.q_proj, layer.self_attn.k_proj = _Given(query), _Given(key)
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
