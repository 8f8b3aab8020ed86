"""Logits that are not finite end a generation, greedy and sampling, and a mask of -inf does not."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, compress


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


HOW = [{"do_sample": False}, {"do_sample": True}, {"do_sample": False, "cuda_graph": "off"}, {"num_beams": 2}]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [1, 3], ids=["first token", "third token"])
@pytest.mark.parametrize("how", HOW, ids=["greedy", "sampling", "stock loop", "beams"])
def test_broken_logits_raise(model, how, at, value):
    calls = []

    def broken(module, args, output):
        calls.append(1)
        if len(calls) == at:
            output[0, -1, 5] = value
        return output

    hook = model.lm_head.register_forward_hook(broken)
    try:
        with compress(model, CompressionConfig(method="fullkv")) as session:
            with pytest.raises(ValueError, match="NaN or infinity"):
                session.generate(input_ids=torch.ones(2, 6, dtype=torch.long), max_new_tokens=4, **how)
    finally:
        hook.remove()


def test_a_processors_mask_is_no_fault(model):
    with compress(model, CompressionConfig(method="fullkv")) as session:
        ids = torch.ones(1, 6, dtype=torch.long)
        made = session.generate(input_ids=ids, max_new_tokens=4, do_sample=True, top_k=1)
        greedy = session.generate(input_ids=ids, max_new_tokens=4, do_sample=False, suppress_tokens=[3])
    assert made.shape == greedy.shape == (1, 10) and 3 not in greedy[0, 6:]
