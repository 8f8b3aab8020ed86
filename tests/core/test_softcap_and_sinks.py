"""Decoders that cap their attention logits (Gemma 2) or have attention sinks (GPT-OSS) decode as stock does."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.attention import HARMLESS
from sparsemm_lmms.cache import CACHE_NAME

SHAPE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.4, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    layer_types=["full_attention"] * 2,
)  # fmt: skip
GEMMA = ("Gemma2Config", dict(attn_logit_softcapping=1.5))
OSS = ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2))
FULL = CompressionConfig(method="fullkv")
SNAPKV = CompressionConfig(method="snapkv", budget=12, window_size=4, kernel_size=1)
IDS = torch.randint(3, 64, (2, 40), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :13] = 0


def build(name, more, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**SHAPE, **more)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "sinks" in key:
                parameter.copy_(torch.tensor([30.0, -9.0, 4.0, 12.0]))  # one closes a head, one weighs nothing
    return model


@pytest.fixture(params=[GEMMA, OSS], ids=["softcap", "sinks"])
def model(request):
    return build(*request.param)


def generate(model, rows, **more):
    out = model.generate(
        input_ids=IDS[rows] * MASK[rows], attention_mask=MASK[rows], max_new_tokens=8, do_sample=False,
        output_logits=True, return_dict_in_generate=True, **more,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits)


def close(got, want):
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [slice(1, 2), slice(0, 2)], ids=["one", "padded"])
def test_fullkv_gives_the_tokens_and_logits_of_stock(model, rows):
    want = generate(model, rows)
    with compress(model, FULL):
        close(generate(model, rows), want)
    close(generate(model, rows), want)


def test_the_kernels_in_triton_give_them_too_interpreter(model):
    pytest.importorskip("triton", reason="triton is not installed")
    from sparsemm_lmms.kernels.backend import interpreted

    if not interpreted():
        pytest.skip("triton was imported without TRITON_INTERPRET=1")
    want = generate(model, slice(0, 2))
    with compress(model, CompressionConfig(method="fullkv", kernel_backend="triton")):
        close(generate(model, slice(0, 2)), want)


def test_the_arguments_matter(model):
    """So that the tests above can fail: without cap or sinks the logits are others."""
    want = generate(model, slice(1, 2))[1]
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
        if hasattr(module, "sinks"):
            module.sinks.data.fill_(float("-inf"))
    assert (generate(model, slice(1, 2))[1] - want).abs().max() > 0.1


@torch.no_grad()
def test_more_tokens_at_once(model):
    """A later prompt, appended to the cache of the first: causal among its own tokens."""
    ids, mask = IDS * MASK, MASK
    want = model(input_ids=ids, attention_mask=mask).logits[:, 25:]
    with compress(model, FULL):
        cache = getattr(model(input_ids=ids[:, :25], attention_mask=mask[:, :25]), CACHE_NAME)
        got = model(input_ids=ids[:, 25:], attention_mask=mask, **{CACHE_NAME: cache}).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def kept_of_weights(weights, length, kv_heads=2):
    """SnapKV's choice, from stock's attention weights `[q_heads, n, n]`: the best columns, and the window."""
    window, budget = SNAPKV.window_size, SNAPKV.budget
    scores = weights[:, -window:, : length - window].mean(1).unflatten(0, (kv_heads, -1)).mean(1)
    best = scores.topk(budget - window).indices
    own = torch.arange(length - window, length).expand(kv_heads, -1)
    return torch.cat([best, own], 1).sort().values


@torch.no_grad()
def test_snapkv_keeps_what_the_attention_of_stock_rates_best(model):
    """A sink scales a head's probabilities by its own factor, so it changes the mean over the heads of a group."""
    weights = model(input_ids=IDS[1:], output_attentions=True).attentions
    with compress(model, SNAPKV) as session:
        model(input_ids=IDS[1:])
    for layer in range(2):
        got = torch.stack(session.cache.kept_positions(layer)[0])
        assert torch.equal(got, kept_of_weights(weights[layer][0], 40)), layer


@torch.no_grad()
def test_compressed_again_by_the_attention_of_stock(model):
    """Nothing was evicted of the first prompt, so the second choice is that of the whole conversation."""
    weights = model(input_ids=IDS[1:], output_attentions=True).attentions
    with compress(model, SNAPKV) as session:
        cache = getattr(model(input_ids=IDS[1:, :11]), CACHE_NAME)
        cache.compress_next = True
        model(input_ids=IDS[1:, 11:], **{CACHE_NAME: cache})
    for layer in range(2):
        got = torch.stack(session.cache.kept_positions(layer)[0])
        assert torch.equal(got, kept_of_weights(weights[layer][0], 40)), layer


@pytest.mark.parametrize("which", [GEMMA, ("GraniteSWAConfig", {})], ids=["softcap", "sinks"])  # no experts to swap
def test_bfloat16(which):
    model = build(*which, dtype=torch.bfloat16)
    want = generate(model, slice(1, 2))[1][:2]
    with compress(model, FULL):
        got = generate(model, slice(1, 2))[1][:2]  # the first decode step; later tokens may differ
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)


def attention_of(model):
    return next(m for m in model.modules() if type(m).__name__.endswith("Attention"))


def test_a_prefill_that_passes_over_them_is_refused(model):
    """Else the prompt would be read without them, and decoded with them."""

    def forgetful(module, query, key, value, attention_mask, scaling=None, **kwargs):
        return nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True
        ).transpose(1, 2), None

    AttentionInterface.register("forgetful", forgetful)
    AttentionMaskInterface.register("forgetful", sdpa_mask)
    model.set_attn_implementation("forgetful")
    name = type(attention_of(model)).__name__
    with compress(model, FULL), pytest.raises(ValueError, match=f"{name} uses (softcap|s_aux), .*'forgetful' passes"):
        model(input_ids=IDS)


def test_sinks_that_are_not_passed_are_refused():
    torch.manual_seed(0)
    more = {key: value for key, value in SHAPE.items() if key != "layer_types"}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**more))
    attention_of(model).sinks = nn.Parameter(torch.zeros(4))
    with compress(model, FULL), pytest.raises(ValueError, match="LlamaAttention has sinks, but does not pass them"):
        model(input_ids=IDS)


@pytest.mark.parametrize("name, value", [("position_bias", torch.zeros(1, 4, 40, 40)), ("indices", torch.zeros(1)),
                                         ("is_causal", False), ("alibi", 1.0)])  # fmt: skip
def test_unknown_arguments_are_named(model, name, value):
    told = "is_causal=False" if name == "is_causal" else name
    with compress(model, FULL), pytest.raises(ValueError, match=f"Attention uses {told}, which compressed decode"):
        model(input_ids=IDS, **{name: value})


def test_arguments_without_effect_pass(model):
    assert {"position_ids", "is_causal", "cu_seq_lens_q", "output_attentions", "dropout", "use_cache"} <= HARMLESS
    with compress(model, FULL):
        model(input_ids=IDS, num_items_in_batch=2, is_causal=True, output_hidden_states=True)


def test_a_vision_language_model_of_such_a_decoder():
    """Only the text decoder caps: the tower runs the stock attention."""
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                  patch_size=4)  # fmt: skip
    config = transformers.LlavaConfig(
        text_config=getattr(transformers, GEMMA[0])(**SHAPE, **GEMMA[1]),
        vision_config=transformers.CLIPVisionConfig(**vision),
        image_token_index=2,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    model.set_attn_implementation({"text_config": "eager"})
    model.generation_config.eos_token_id = None
    ids = IDS.clone()
    ids[:, 15:19] = 2
    picture = torch.randn(2, 3, 8, 8)
    given = dict(input_ids=ids * MASK, attention_mask=MASK, pixel_values=picture, max_new_tokens=8, do_sample=False)
    want = model.generate(**given)
    with compress(model, FULL):
        assert torch.equal(model.generate(**given), want)
