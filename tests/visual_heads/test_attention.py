"""What the watcher keeps, against attention matrices of the eager implementation."""

import pytest
import torch

from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.visual_heads import attention
from sparsemm_lmms.visual_heads.attention import Watcher, watch

from . import tiny

HYBRID = {"layer_types": ["sliding_attention"] + ["full_attention"] * 3, "sliding_window": 6}
GEMMA2, GPT_OSS = {"model_type": "gemma2", **HYBRID}, {"model_type": "gpt_oss", **HYBRID}


def with_sinks(model):
    """One head that looks at almost nothing, one that has no sink to speak of."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.tensor([8.0, -9.0, 0.0, 3.0]))
    return model


MODELS = {
    "llava-mha": lambda: tiny.llava_next("vicuna"),
    "llava-gqa": lambda: tiny.llava_next("mistral"),
    "qwen-gqa": tiny.qwen2_vl,
    "softcap, one sliding layer": lambda: tiny.llava(GEMMA2, attn_logit_softcapping=1.5),
    "sinks, one sliding layer": lambda: with_sinks(tiny.llava(GPT_OSS, num_local_experts=2, num_experts_per_tok=1)),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


def text_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 60, (3, 23), generator=generator)
    mask = torch.ones_like(ids)
    for row, pad in enumerate([0, 4, 9]):
        ids[row, :pad], mask[row, :pad] = 0, 0
    words = torch.rand(3, 5, 20, generator=generator) < 0.3
    return ids, mask, words


def eager_attentions(model, **inputs):
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        with torch.no_grad():
            seen = torch.stack(model(**inputs, output_attentions=True).attentions)  # [layers, batch, heads, q, k]
    finally:
        model.set_attn_implementation({"text_config": before})
    kinds = getattr(model.config.text_config, "layer_types", None) or ["full_attention"] * len(seen)
    return seen[[i for i, kind in enumerate(kinds) if kind == "full_attention"]]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("elements", [1, 500, 1 << 24])
def test_known_targets(model, padded, elements, monkeypatch):
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", elements)
    ids, mask, words = text_batch()
    inputs = {"input_ids": ids, "attention_mask": mask if padded else torch.ones_like(mask)}
    rows = 7
    targets = torch.randint(-1, 5, (3, rows), generator=torch.Generator().manual_seed(2))
    reference = eager_attentions(model, **inputs)[:, :, :, -rows:]
    with torch.no_grad():
        stock = model(**inputs).logits
        with watch(model, Watcher(words, rows, targets)) as seen:
            watched = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, stock)
    assert torch.equal(watched, stock)
    assert sorted(seen.argmax) == [0, 1, 2]
    for layer in range(3):
        assert torch.equal(seen.argmax[layer], reference[layer].argmax(-1))
        for b in range(3):
            for r in range(rows):
                if targets[b, r] >= 0:
                    expected = reference[layer, b, :, r, :20][:, words[b, targets[b, r]]].sum(-1)
                    torch.testing.assert_close(seen.mass[layer][b, :, r], expected, rtol=1e-4, atol=1e-6)


def test_decoding_sees_the_cache(model):
    ids, mask, words = text_batch()
    reference = eager_attentions(model, input_ids=ids, attention_mask=mask)
    with torch.no_grad(), watch(model, Watcher(words)) as seen:
        position = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
        if model.config.model_type == "qwen2_vl":
            position = {}
        first = model(
            input_ids=ids[:, :20],
            attention_mask=mask[:, :20],
            use_cache=True,
            **{k: v[:, :20] for k, v in position.items()},
        )
        for step in range(20, 23):
            seen.clear()
            model(
                input_ids=ids[:, step : step + 1],
                attention_mask=mask[:, : step + 1],
                **{CACHE_NAME: first[CACHE_NAME]},
                **{k: v[:, step : step + 1] for k, v in position.items()},
            )
            for layer in range(3):
                row = reference[layer, :, :, step, : step + 1]
                assert torch.equal(seen.argmax[layer][..., 0], row.argmax(-1))
                expected = torch.einsum("bhk,bwk->bhw", row[..., :20], words.float())
                torch.testing.assert_close(seen.mass[layer][:, :, 0], expected, rtol=1e-4, atol=1e-6)


def test_everything_is_restored_even_after_an_error(model):
    before = (model.config._attn_implementation, model.config.get_text_config()._attn_implementation)
    _, _, words = text_batch()
    with pytest.raises(KeyError), watch(model, Watcher(words)):
        assert model.config.get_text_config()._attn_implementation == attention.NAME
        assert model.config.vision_config._attn_implementation == "sdpa"
        with pytest.raises(RuntimeError, match="already"), watch(model, Watcher(words)):
            pass
        assert len(model._forward_pre_hooks) == 1
        raise KeyError
    assert (model.config._attn_implementation, model.config.get_text_config()._attn_implementation) == before
    assert not model._forward_pre_hooks


def test_memory_does_not_grow_with_rows_times_keys(monkeypatch):
    """The largest weight table ever made stays within the limit, whatever the number of rows and keys."""
    monkeypatch.setattr(attention, "CHUNK_ELEMENTS", 4 * 64 * 10)
    largest = 0
    stock = attention._weights

    def measure(*args):
        nonlocal largest
        weights = stock(*args)
        largest = max(largest, weights.numel())
        return weights

    monkeypatch.setattr(attention, "_weights", measure)
    for length in (64, 256):
        watcher = Watcher(torch.zeros(1, 1, length, dtype=torch.bool), length, torch.zeros(1, length, dtype=torch.long))
        watcher.look(0, torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8), None, attention.Logits(1.0))
        assert watcher.argmax[0].shape == (1, 4, length)
    assert largest <= 4 * 64 * 10
