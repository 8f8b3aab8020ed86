"""Allocators that see a number of every layer, and shrink the layers before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, cache, compress
from sparsemm_lmms.allocators.base import Allocator, Shape
from sparsemm_lmms.bench.tensor_log import TensorLog
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


def held(made: Any) -> list[Any]:
    """Positions and rows of every head."""
    found = []
    for i, layer in enumerate(made.layers):
        for b, row in enumerate(made.kept_positions(i)):
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
@pytest.mark.parametrize("chunk", [1, 200, 2**24])  # bytes: a row, 6 rows, all
def test_layers_end_with_what_the_whole_model_decides(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """Shrunk step by step, each layer holds what it would hold had its last count been known from the start."""
    monkeypatch.setattr(cache, "CHUNK_BYTES", chunk)
    plugin(monkeypatch, "allocators", "mass", Mass)
    with compress(model, CompressionConfig(method="window_attention+mass", **SETTINGS)) as session:
        model(IDS, attention_mask=MASK)
        counts = session.cache.kept_per_head().numpy() - 4
        found, bytes_of_all = held(session.cache), session.cache.report()["kv_bytes_allocated"]
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
        assert session.cache.report()["kv_bytes_allocated"] == bytes_of_all == (counts + 4 + 128).sum() * 2 * 8 * 4


class Rows(TensorLog):
    """Of the tensors that are made, those that are no indices."""

    def _see(self, tensor: Tensor) -> None:
        if tensor.is_floating_point():
            super()._see(tensor)


@torch.no_grad()
def test_stores_shrink_where_they_lie(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk of rows beside the store, its address kept until half is free; in the end no store has a free row."""
    chunk, seen = 400, []
    monkeypatch.setattr(cache, "CHUNK_BYTES", chunk)
    plugin(monkeypatch, "allocators", "mass", Mass)
    stock = cache.RaggedLayer.shrink

    def shrink(layer: cache.RaggedLayer, *args: Any) -> Any:
        before, rows = layer.keys, layer.keys.shape[0]
        with Rows() as log:
            kept = stock(layer, *args)
        used = int((layer.length + layer.headroom).sum())
        assert layer.keys.shape[0] == (rows if 2 * used >= rows else used)
        seen.append(layer.keys is before)
        if layer.keys is before:
            assert log.peak <= chunk
        else:
            assert log.peak <= layer.keys.nbytes + layer.values.nbytes + chunk
        return kept

    monkeypatch.setattr(cache.RaggedLayer, "shrink", shrink)
    with compress(model, CompressionConfig(method="window_attention+mass", **SETTINGS)) as session:
        made = session.new_cache(2)
        model(IDS, attention_mask=MASK, **{CACHE_NAME: made})
        for layer in made.layers:
            ends = (layer.start + layer.capacity).flatten()
            assert layer.keys.shape[0] == layer.values.shape[0] == ends[-1] == (layer.length + 2).sum()
            assert torch.equal(ends[:-1], layer.start.flatten()[1:])
            assert layer.plan is not None
    assert len(seen) == 6 and {True, False} == set(seen)


@torch.no_grad()
def test_a_conversation_is_compressed_again(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin(monkeypatch, "allocators", "mass", Mass)
    plugin(monkeypatch, "allocators", "even", Even)
    found = {}
    for method in ("snapkv", "window_attention+even", "window_attention+mass"):
        with compress(model, CompressionConfig(method=method, **SETTINGS)):
            made = model(IDS[:1])[CACHE_NAME]
            made.compress_next = True
            model(IDS[1:, :9], **{CACHE_NAME: made})
            kept = made.kept_per_head()[:, 0].float().mean(1)
            found[method] = held(made), kept
            assert made.layers[0].prompt_lengths == (69,)
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
