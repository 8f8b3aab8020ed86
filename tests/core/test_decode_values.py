"""What a decode step hands on: to processors that keep it, and to a model whose inputs have a kind for each token."""

from __future__ import annotations

from functools import wraps
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.generation import LogitsProcessor

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.decode import Decoder
from sparsemm_lmms.kernels.backend import interpreted

from .tape import TapeGraph, fast_kernels

NEW = 9
IDS = torch.randint(1, 30, (2, 12), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.5, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Keeps(LogitsProcessor):
    """Keeps the very tensors it gets."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids.append(input_ids)
        self.scores.append(scores)
        return scores


@pytest.mark.parametrize("replayed", [False, True], ids=["called", "replayed"])
def test_scores_that_a_processor_keeps_stay_as_they_were(
    model: LlamaForCausalLM, replayed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if replayed:
        pytest.importorskip("triton", reason="triton is not installed")
        if not interpreted():
            pytest.skip("triton was imported without TRITON_INTERPRET=1, so its kernels cannot run on the CPU")
        fast_kernels(monkeypatch)
    graph = TapeGraph() if replayed else None
    config = CompressionConfig(
        method="snapkv", budget=6, window_size=2, kernel_backend="triton" if replayed else "torch"
    )
    kept = []
    with compress(model, config) as session:
        for decoder in ({}, {"custom_generate": Decoder(graph=graph)}):
            keeps = Keeps()
            model.generate(
                IDS, do_sample=False, max_new_tokens=NEW, logits_processor=[keeps], **decoder,
                **{CACHE_NAME: session.new_cache(NEW)},
            )  # fmt: skip
            kept.append(keeps)
    stock, ours = kept
    assert len(ours.scores) == NEW and (graph is None or graph.replays == NEW - 2)
    for a, b in zip(stock.ids + stock.scores, ours.ids + ours.scores, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert all(not torch.equal(a, b) for a, b in zip(ours.scores, ours.scores[1:], strict=False))


@pytest.mark.parametrize("name", ["token_type_ids", "mm_token_type_ids"])
def test_a_step_has_the_kind_of_one_token(model: LlamaForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some versions of transformers hand the kinds of all tokens on to a decode step."""
    prepare, seen = model.prepare_inputs_for_generation, []

    @wraps(prepare)
    def prepared(input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        kinds = torch.arange(input_ids.shape[1]).expand(len(input_ids), -1)
        return {**prepare(input_ids, **kwargs), name: kinds}

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        seen.append((kwargs["input_ids"].shape[1], kwargs.pop(name).tolist()))
        return args, kwargs

    with compress(model, CompressionConfig(method="snapkv", budget=6, window_size=2)) as session:
        wanted = session.generate(IDS, do_sample=False, max_new_tokens=5)
        monkeypatch.setattr(model, "prepare_inputs_for_generation", prepared)
        hook = model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
        try:
            assert torch.equal(session.generate(IDS, do_sample=False, max_new_tokens=5), wanted)
        finally:
            hook.remove()
    assert seen[0] == (12, [list(range(12))] * 2)
    assert seen[1:] == [(1, [[12]] * 2)] * 4


def test_the_end_that_is_found_late_is_taken_back(model: LlamaForCausalLM) -> None:
    """Steps behind the last end leave neither tokens nor rows; rows that ended are padded."""
    with compress(model, CompressionConfig(method="snapkv", budget=6, window_size=2)) as session:
        free = session.generate(IDS, do_sample=False, max_new_tokens=12)[:, 12:].tolist()
        ends = [free[0][2], free[1][4]]
        cut = [next(i for i, token in enumerate(row) if token in ends) + 1 for row in free]
        width = max(cut)
        wanted = [row[:n] + [0] * (width - n) for row, n in zip(free, cut, strict=True)]
        for every in (1, 4, 5):
            cache = session.new_cache(12)
            made = model.generate(
                IDS, do_sample=False, max_new_tokens=12, eos_token_id=ends, custom_generate=Decoder(check_every=every),
                **{CACHE_NAME: cache},
            )  # fmt: skip
            assert made[:, 12:].tolist() == wanted and 1 < min(cut)
            assert [layer.length.tolist() for layer in cache.layers] == [[[6 + width - 1]] * 2] * 2
            assert cache.get_seq_length() == 12 + width - 1


class EndsOnce(StoppingCriteria):
    """Row b ends at its step 3 + 2 b, and the criterion forgets it at the next."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - IDS.shape[1] == 3 + 2 * torch.arange(len(input_ids))


def test_a_row_that_ended_stays_ended(model: LlamaForCausalLM) -> None:
    with compress(model, CompressionConfig(method="snapkv", budget=6, window_size=2)) as session:
        common = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 40, "pad_token_id": 0}
        free = session.generate(IDS, **common)[:, 12:].tolist()
        made = [
            generate(IDS, **common, stopping_criteria=StoppingCriteriaList([EndsOnce()]))[:, 12:].tolist()
            for generate in (model.generate, session.generate)
        ]
    assert made == [[free[0][:3] + [0, 0], free[1][:5]]] * 2
