"""Models whose layers are not all full attention: those are compressed, the others are as in the stock model."""

import copy

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    cache_utils,
)

from sparsemm_lmms import CompressionConfig, HeadScores, compress, sliding
from sparsemm_lmms.cache import CACHE_NAME, RaggedLayer
from sparsemm_lmms.decode import Decoder
from sparsemm_lmms.decode_graph import uncapturable
from sparsemm_lmms.kernels.backend import interpreted
from sparsemm_lmms.registry import scorer_names
from sparsemm_lmms.session import attention_shape
from sparsemm_lmms.sliding import SLACK, SlidingLayer
from sparsemm_lmms.visual_heads.attention import Watcher, watch

from .tape import TapeGraph, fast_kernels

WINDOW = 16
IMAGE = 3
NEW = 5
TEXT = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_hidden_layers=4,
)  # fmt: skip
SLIDING = dict(sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"] * 2)
SHARED = dict(
    num_hidden_layers=6, num_kv_shared_layers=2, sliding_window=WINDOW, hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=64, layer_types=["sliding_attention", "full_attention"] * 3,
)  # fmt: skip
LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"] * 2,
)  # fmt: skip
KINDS = {
    "gemma2": dict(attn_logit_softcapping=5.0, query_pre_attn_scalar=8, **SLIDING),
    "cohere2": SLIDING,
    "gpt_oss": dict(num_local_experts=2, num_experts_per_tok=1, **SLIDING),
    "llama4_text": dict(
        intermediate_size_mlp=32, num_local_experts=2, num_experts_per_tok=1, attention_chunk_size=WINDOW,
        moe_layers=[1], no_rope_layers=[1, 0, 1, 0], floor_scale=8,
        layer_types=["chunked_attention", "full_attention"] * 2,
    ),
    "gemma3n_text": dict(
        intermediate_size=[32] * 6, laurel_rank=8, activation_sparsity_pattern=[0.0] * 6, altup_num_inputs=2, **SHARED
    ),
    "gemma4_text": dict(global_head_dim=16, **SHARED),
    "qwen3_5_text": LINEAR,
    "lfm2": dict(layer_types=["conv", "full_attention"] * 2, block_auto_adjust_ff_dim=False),
}  # fmt: skip
MODELS = ["gemma3", *KINDS]
FULL = CompressionConfig(method="fullkv", window_size=4)
SMALL = CompressionConfig(method="snapkv", budget=10, window_size=4)


def build(kind):
    if kind == "gemma3":
        vision = dict(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
            patch_size=7, vision_use_head=False,
        )  # fmt: skip
        text = {**TEXT, **SLIDING, "query_pre_attn_scalar": 8}
        config = Gemma3Config(
            text_config=text, vision_config=vision, mm_tokens_per_image=4, boi_token_index=4, eoi_token_index=5,
            image_token_index=IMAGE,
        )  # fmt: skip
        model = Gemma3ForConditionalGeneration(config)
    else:
        config = AutoConfig.for_model(kind, **{**TEXT, **KINDS[kind]})
        eager = {"attn_implementation": "eager"} if kind in ("gemma2", "gpt_oss") else {}
        model = AutoModelForCausalLM.from_config(config, **eager)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                gain = 2 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
                p.copy_(torch.randn(p.shape, generator=generator) * gain / p.shape[-1] ** 0.5)
    settings = model.generation_config
    settings.eos_token_id, settings.pad_token_id, settings.do_sample = None, 0, False
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return build(request.param)


@pytest.fixture(scope="module")
def gemma3():
    return build("gemma3")


def prompt(model, lengths=(45,), seed=1):
    """Left-padded prompts longer than the window; Gemma 3's begin with an image."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(8, 64, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : width - length], mask[row, : width - length] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.model_type == "gemma3":
        for row, length in enumerate(lengths):
            ids[row, width - length + 2 : width - length + 6] = IMAGE
        inputs["token_type_ids"] = (ids == IMAGE).long()
        inputs["pixel_values"] = torch.randn(len(lengths), 3, 28, 28, generator=generator)
    return inputs


def generate(model, inputs, run=None, **kwargs):
    options = {"max_new_tokens": NEW, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    made = (run or model.generate)(**inputs, **options)
    return made.sequences, torch.stack(made.logits)


def forward(model, inputs, cache=None, **kwargs):
    with torch.no_grad():
        return model(**inputs, **({} if cache is None else {CACHE_NAME: cache}), **kwargs).logits


def later(seen, tokens, batch=1, mask=None, seed=5):
    """A pass of new tokens behind `seen` columns."""
    ids = torch.randint(8, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(batch, seen, dtype=torch.int64) if mask is None else mask
    mask = torch.cat([mask, torch.ones(batch, tokens, dtype=torch.int64)], 1)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1)[:, seen:]}


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_full_budget_is_the_stock_model(model):
    lengths = (45, 31)
    inputs = prompt(model, lengths)
    tokens, logits = generate(model, inputs)
    with compress(model, FULL) as session:
        ours, ours_logits = generate(model, inputs)
        assert torch.equal(ours, tokens)
        close(ours_logits, logits)
        assert torch.equal(session.generate(**inputs, max_new_tokens=NEW), tokens)
        assert session.cache.get_seq_length() == max(lengths) + NEW - 1
        beams = generate(model, inputs, num_beams=2)[0]
    assert torch.equal(beams, generate(model, inputs, num_beams=2)[0])
    assert torch.equal(generate(model, inputs)[1], logits)


def test_small_budget(model):
    """Full layers keep what their rule says, the others what the stock model keeps; both loops agree."""
    inputs = prompt(model, (45, 31))
    stock = DynamicCache(config=model.config)
    logits = forward(model, inputs, stock)
    shape = attention_shape(model.config)
    with compress(model, SMALL) as session:
        cache = session.new_cache(NEW)
        close(forward(model, inputs, cache), logits)
        report = cache.report()
        assert report["kept_tokens"] == 10 and list(cache.kept_per_head().shape) == [
            shape.num_layers,
            2,
            shape.kv_heads,
        ]
        bytes_of_others = allocated = 0
        for ours, theirs in zip(cache.layers, stock.layers, strict=True):
            if isinstance(ours, RaggedLayer):
                for b, length in enumerate((45, 31)):
                    for h in range(shape.kv_heads):
                        kept = cache.kept_positions(ours.layer_idx)[b][h] + 45 - length
                        start, count = int(ours.start[b, h]), int(ours.length[b, h])
                        close(ours.keys[start : start + count], theirs.keys[b, h, kept])
                continue
            if isinstance(ours, SlidingLayer):
                for b, length in enumerate((45, 31)):
                    rows = slice(ours.window.end - min(length, WINDOW - 1), ours.window.end)
                    for x, y in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
                        close(x[b, :, rows], y[b])
                        bytes_of_others += y[b].nbytes
                allocated += ours.keys.nbytes + ours.values.nbytes
                assert ours.keys.shape[2] == WINDOW - 1 + SLACK + NEW
                continue
            assert type(ours) is type(theirs)
            for name in ("keys", "values", "conv_states", "recurrent_states"):
                found, wanted = getattr(ours, name, None), getattr(theirs, name, None)
                for x, y in zip(*(v.values() if isinstance(v, dict) else [v] for v in (found, wanted)), strict=True):
                    assert (x is None) == (y is None)
                    if x is not None:
                        close(x, y)
                        bytes_of_others, allocated = bytes_of_others + x.nbytes, allocated + x.nbytes
        full = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.full_layers)
        assert report["kv_bytes_allocated"] == full + allocated
        row = 2 * cache.full_layers[0].keys[0].nbytes
        assert report["kv_bytes_used"] == 20 * shape.num_layers * shape.kv_heads * row + bytes_of_others
        assert [layer.layer_idx for layer in cache.full_layers] == list(range(shape.num_layers))
        first = session.generate(**inputs, max_new_tokens=NEW)
        assert torch.equal(model.generate(**inputs, max_new_tokens=NEW), first)


def test_every_scorer_judges_a_padded_prompt_as_it_does_alone(model):
    """Queries are turned back and values projected by each model's own, and nothing of the padding counts."""
    if model.config.model_type == "llama4_text":
        pytest.skip("its chunks count columns, padding included: the stock model answers otherwise in a batch")
    batch = prompt(model, (45, 31))
    positions = batch["attention_mask"].cumsum(1).sub(1).clamp(min=0)
    alone = {name: x[1:] if name == "pixel_values" else x[1:, 14:] for name, x in batch.items()}
    for scorer in scorer_names():
        settings = {"critical": True} if scorer in ("bacon", "expected_attention") else {}
        config = CompressionConfig(method=f"{scorer}+uniform", budget=10, window_size=4, **settings)
        with compress(model, config) as session:
            forward(model, {**batch, "position_ids": positions})
            together = [session.cache.kept_positions(i)[1] for i in range(len(session.cache.full_layers))]
            forward(model, alone)
            for i, wanted in enumerate(together):
                got = session.cache.kept_positions(i)[0]
                assert [row.tolist() for row in got] == [row.tolist() for row in wanted], (scorer, i)


def test_scores_speak_of_full_layers(model):
    shape, inputs = attention_shape(model.config), prompt(model)
    scores = HeadScores.random(shape.num_layers, shape.q_heads, seed=3)
    config = CompressionConfig(method="sparsemm", budget=12, window_size=4)
    with compress(model, config, scores) as session:
        forward(model, inputs)
        assert len(session.cache.kept_per_head().unique()) > 1
    if model.config.model_type == "gemma2":
        return  # heads are watched under sdpa, which knows no softcap
    with watch(model, Watcher(torch.zeros(1, 1, 45, dtype=torch.bool))) as watcher:
        close(forward(model, inputs), forward(model, inputs))
    assert sorted(watcher.argmax) == list(range(shape.num_layers))


@pytest.mark.parametrize("tokens", [1, 20])
def test_appending_and_taking_back(model, tokens):
    """A pass behind the prompt equals the stock model's, and can be undone where no state was overwritten."""
    inputs, probe = prompt(model, (45, 31)), None
    stock = DynamicCache(config=model.config)
    forward(model, inputs, stock)
    mask = inputs["attention_mask"]
    twin = copy.deepcopy(stock)
    with compress(model, FULL) as session:
        cache = session.new_cache()
        forward(model, inputs, cache)
        close(
            forward(model, later(45, tokens, 2, mask), cache), _stock(model, session, later(45, tokens, 2, mask), stock)
        )
        if any(kind in ("linear_attention", "conv") for kind in model.config.get_text_config().layer_types):
            with pytest.raises(ValueError, match="LinearAttentionLayer, no longer holds"):
                cache.rollback(tokens)
            assert cache.get_seq_length() == 45 + tokens
            return
        cache.rollback(tokens)
        assert cache.get_seq_length() == 45
        probe = later(45, 3, 2, mask, seed=6)
        close(forward(model, probe, cache), _stock(model, session, probe, twin))


def _stock(model, session, inputs, cache):
    """The stock model in the middle of a session."""
    text = model.config.get_text_config(decoder=True)
    under = text._attn_implementation
    hooks, model._forward_pre_hooks = model._forward_pre_hooks, type(model._forward_pre_hooks)()
    text._attn_implementation = "eager" if model.config.model_type in ("gemma2", "gpt_oss") else "sdpa"
    try:
        return forward(model, inputs, cache)
    finally:
        text._attn_implementation, model._forward_pre_hooks = under, hooks


def test_decode_steps_in_a_graph(model, monkeypatch):
    """States stay where they are, windows move on inside their buffers: a captured step serves all of them.

    One window is full from the start, one gets full on the way; buffers grow, then are shifted.
    """
    pytest.importorskip("triton", reason="triton is not installed")
    if not interpreted():
        pytest.skip("triton was imported without TRITON_INTERPRET=1, so its kernels cannot run on the CPU")
    fast_kernels(monkeypatch)
    monkeypatch.setattr(sliding, "SHIFT", 5)
    lengths = (20, 7)
    inputs, decoder, new = prompt(model, lengths), Decoder(graph=TapeGraph(), check_every=4), 13
    stop = {"max_new_tokens": new, "eos_token_id": None, "do_sample": True, "top_k": 0}
    config = CompressionConfig(method="snapkv", budget=8, window_size=4, kernel_backend="triton")
    with compress(model, config) as session:
        torch.manual_seed(0)
        wanted = model.generate(**inputs, **stop, **{CACHE_NAME: session.new_cache(4)})
        cache = session.new_cache(4)
        assert uncapturable(model, cache) is None
        torch.manual_seed(0)
        found = model.generate(**inputs, **stop, custom_generate=decoder, **{CACHE_NAME: cache})
        assert torch.equal(found, wanted) and len(wanted[0, -new:].unique()) > 4
        assert decoder.graph.captures <= 6 and decoder.graph.replays >= new - 6
        assert cache.get_seq_length() == max(lengths) + new - 1
        stop |= {"eos_token_id": wanted[:, -5].tolist()}  # steps behind the end are taken back, where that can be
        torch.manual_seed(0)
        wanted = model.generate(**inputs, **stop)
        torch.manual_seed(0)
        made = model.generate(
            **inputs, **stop, custom_generate=decoder, return_dict_in_generate=True, **{CACHE_NAME: session.new_cache()}
        )
        assert torch.equal(made.sequences, wanted)
        assert made[CACHE_NAME].get_seq_length() == wanted.shape[1] - 1


def test_taking_back_what_is_gone(gemma3):
    inputs = prompt(gemma3)
    with compress(gemma3, FULL) as session:
        cache = session.new_cache()
        forward(gemma3, inputs, cache)
        cache.rollback(3)  # into the window that every head keeps
        assert cache.get_seq_length() == 42
        twin = copy.deepcopy(cache)
        for seen in range(42, 60):
            forward(gemma3, later(seen, 1), cache)
        cache.rollback(18)
        close(forward(gemma3, later(42, 9), cache), forward(gemma3, later(42, 9), twin))
    short = prompt(gemma3, (9,))
    with compress(gemma3, FULL) as session:  # nothing has slid out yet
        cache = session.new_cache()
        wanted = forward(gemma3, short, cache)[:, -1]
        for seen in range(9, 14):
            forward(gemma3, later(seen, 1), cache)
        cache.rollback(6)
        assert {layer.get_seq_length() for layer in cache.layers} == {8}
        again = {**later(8, 1), "input_ids": short["input_ids"][:, -1:]}
        close(forward(gemma3, again, cache)[:, -1], wanted)


def test_choosing_sequences(model):
    inputs = prompt(model, (45, 31))
    with compress(model, SMALL) as session:
        cache = session.new_cache()
        forward(model, inputs, cache)
        twin = copy.deepcopy(cache)
        wanted = forward(model, later(45, 2, 2, inputs["attention_mask"]), cache)
        twin.batch_repeat_interleave(2)
        twin.batch_select_indices(torch.tensor([2, 0]))
        twin.reorder_cache(torch.tensor([1, 0]))
        close(forward(model, later(45, 2, 2, inputs["attention_mask"]), twin), wanted)


def test_compressing_again(model):
    with compress(model, SMALL) as session:
        cache = session.new_cache()
        forward(model, prompt(model), cache)
        cache.compress_next = True
        if cache.shared:
            with pytest.raises(ValueError, match="read the keys of others"):
                forward(model, later(45, 20), cache)
            return
        forward(model, later(45, 20), cache)
        assert cache.prompt_lengths == (65,) and cache.report()["kept_tokens"] == 10
        forward(model, later(65, 1), cache)


def test_a_batch_is_as_its_sequences_alone(model, monkeypatch):
    """Steps, and passes that are padded themselves, before windows are full and after; steps need no mask."""
    if any(kind in ("linear_attention", "conv") for kind in model.config.get_text_config().layer_types):
        pytest.skip("transformers' linear attention knows no padding behind the prompt")
    if model.config.model_type == "llama4_text":  # it scales queries by their column, padding included
        for layer in model.model.layers:
            monkeypatch.setattr(layer.self_attn, "attn_temperature_tuning", False)
    lengths = (33, 16, 15, 9)
    inputs = prompt(model, lengths)
    width = max(lengths)
    with compress(model, FULL) as session:
        caches = [session.new_cache() for _ in range(5)]
        mask = inputs["attention_mask"]
        forward(model, {**inputs, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, caches[-1])
        for b, length in enumerate(lengths):
            alone = {name: x[b : b + 1] for name, x in inputs.items()}
            forward(model, {k: x if x.ndim == 4 else x[:, width - length :] for k, x in alone.items()}, caches[b])
        for tokens in (1, 6, 20, 1):
            ids = torch.randint(8, 64, (4, tokens), generator=torch.Generator().manual_seed(tokens))
            real = torch.arange(tokens) >= torch.tensor([[0, 3, 5, 0]]).T % tokens
            seen, mask = mask.shape[1], torch.cat([mask, real.long()], 1)
            positions = (mask.cumsum(1) - 1)[:, seen:].clamp(min=0)
            passed = {"input_ids": ids, "position_ids": positions, "attention_mask": mask if tokens > 1 else None}
            together = forward(model, passed, caches[-1])
            for b in range(4):
                passed = {"input_ids": ids[b : b + 1, real[b]], "position_ids": positions[b : b + 1, real[b]]}
                close(together[b, real[b]], forward(model, passed, caches[b])[0])


@pytest.mark.parametrize(
    ("kind", "settings", "why"),
    [
        ("mistral", dict(sliding_window=8), "none of its layers has full attention"),
        ("llama", dict(layer_types=["full_attention"] * 3 + ["indexed_attention"]), "a DynamicIndexedLayer"),
    ],
)
def test_refused(kind, settings, why):
    if why.startswith("a Dynamic") and not hasattr(cache_utils, why.removeprefix("a ")):
        pytest.skip("this version of transformers has no such layer")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TEXT, **settings}))
    with pytest.raises(ValueError, match=f"ForCausalLM cannot be compressed: .*{why}"), compress(model, FULL):
        pass


@pytest.mark.parametrize("method", ["vlcache", "tgvkv", "cake"])
@pytest.mark.parametrize("redistribute", [False, True])
def test_full_layers_share_a_budget_among_themselves(gemma3, method, redistribute):
    """Prompts with an image, alone and in a padded batch, for allocators that look at every layer."""
    config = CompressionConfig(method=method, budget=10, window_size=4, redistribute=redistribute)
    inputs = prompt(gemma3, (45, 31))
    with compress(gemma3, config) as session:
        together = session.generate(**inputs, max_new_tokens=NEW)
        kept = session.cache.kept_per_head()
        for row, length in enumerate((45, 31)):
            own = {name: x[row : row + 1] for name, x in inputs.items()}
            for name in ("input_ids", "attention_mask", "token_type_ids"):
                own[name] = own[name][:, 45 - length :]
            assert torch.equal(session.generate(**own, max_new_tokens=NEW)[0, length:], together[row, 45:])
            assert torch.equal(session.cache.kept_per_head()[:, 0], kept[:, row])
    assert kept.shape == (2, 2, 2) and (kept.sum((0, 2)) <= 40).all() and (kept.sum((0, 2)) >= 36).all()
    assert not redistribute or (kept.sum((0, 2)) == 40).all()
