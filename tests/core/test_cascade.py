"""Allocators that see a number of every layer, and shrink the layers before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.scorers.base import LayerView

from .plugins import plugin

LAYERS, HEADS = 4, 2
SETTINGS = {"budget": 16, "window_size": 4, "kernel_size": 3}


@dataclass(frozen=True)
class Even(Allocator):
    """Every layer the same, whatever was seen."""

    cascades = True

    def observe(self, view: LayerView, scores: Tensor) -> Tensor:
        return scores.clamp(min=0).sum((1, 2)) * (1 + (view.layer_idx + 1) % 3)

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[Any]:
        return [shape.base for _ in seen]


@dataclass(frozen=True)
class Mass(Even):
    """The budget of the whole model by the attention mass of the layers so far, as CAKE does it by its preferences."""

    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[Any]:
        table = np.stack(seen)
        return [np.floor(row / table.sum(0) * shape.base * shape.num_layers)[:, None] for row in table]


@dataclass(frozen=True)
class Growing(Even):
    def counts_so_far(self, shape: Shape, seen: list[np.ndarray], lengths: tuple[int, ...]) -> list[Any]:
        return [len(seen) for _ in seen]


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=HEADS, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


IDS = torch.randint(3, 64, (2, 60), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :25] = 0


def held(cache: Any) -> list[Any]:
    """Positions and rows of every head."""
    found = []
    for i, layer in enumerate(cache.layers):
        for b, row in enumerate(cache.kept_positions(i)):
            for h, positions in enumerate(row):
                start, length = int(layer.start[b, h]), int(layer.length[b, h])
                found.append((positions.tolist(), layer.keys[start : start + length].tolist()))
    return found


@torch.no_grad()
def test_even_shares_are_snapkv(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "allocators", "even", Even)
    caches = []
    for method in ("snapkv", "window_attention+even"):
        with compress(model, CompressionConfig(method=method, **SETTINGS)) as session:
            tokens = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
            caches.append((tokens.tolist(), held(session.cache)))
    assert caches[0] == caches[1]


@torch.no_grad()
def test_layers_end_with_what_the_whole_model_decides(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shrunk step by step, each layer holds what it would hold had its last count been known from the start."""
    plugin(monkeypatch, "allocators", "mass", Mass)
    with compress(model, CompressionConfig(method="window_attention+mass", **SETTINGS)) as session:
        model(IDS, attention_mask=MASK)
        counts = session.cache.kept_per_head().numpy() - 4
        found = held(session.cache)
        tokens = session.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
        stock = model.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False)
        alone = model.generate(IDS[1:, 25:], max_new_tokens=6, do_sample=False)
    assert torch.equal(tokens, stock) and torch.equal(tokens[1, 60:], alone[0, 35:])
    assert len(np.unique(counts)) > 3 and (counts.sum((0, 2)) <= 12 * LAYERS * HEADS).all()

    @dataclass(frozen=True)
    class Known(Allocator):
        def counts(self, shape: Shape, prompt: Any) -> np.ndarray:
            return counts[prompt.layer_idx]

    plugin(monkeypatch, "allocators", "known", Known)
    with compress(model, CompressionConfig(method="window_attention+known", **SETTINGS)) as session:
        model(IDS, attention_mask=MASK)
        assert held(session.cache) == found


@torch.no_grad()
def test_a_conversation_is_compressed_again(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "allocators", "mass", Mass)
    plugin(monkeypatch, "allocators", "even", Even)
    found = {}
    for method in ("snapkv", "window_attention+even", "window_attention+mass"):
        with compress(model, CompressionConfig(method=method, **SETTINGS)):
            cache = model(IDS[:1])[CACHE_NAME]
            cache.compress_next = True
            model(IDS[1:, :9], **{CACHE_NAME: cache})
            kept = cache.kept_per_head()[:, 0].float().mean(1)
            found[method] = held(cache), kept
            assert cache.layers[0].prompt_lengths == (69,)
    assert found["snapkv"][0] == found["window_attention+even"][0]
    assert len(found["window_attention+mass"][1].unique()) > 1


@torch.no_grad()
def test_what_was_evicted_does_not_come_back(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "allocators", "growing", Growing)
    with compress(model, CompressionConfig(method="window_attention+growing", **SETTINGS)):
        with pytest.raises(ValueError, match="Growing gives layer 0 2 tokens a head after 1: .* may only shrink"):
            model(IDS)


@torch.no_grad()
def test_short_prompts_are_kept_whole(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "allocators", "mass", Mass)
    short = MASK.clone()
    short[1, :50] = 0
    with compress(model, CompressionConfig(method="window_attention+mass", **SETTINGS)) as session:
        model(IDS, attention_mask=short)
        assert (session.cache.kept_per_head()[:, 1] == 10).all()
        model(IDS[:, :11])
        assert (session.cache.kept_per_head() == 11).all()
