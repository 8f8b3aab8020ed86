"""The cache under real LLaVA-NeXT and Qwen2-VL classes: stock where it must be, smaller where it says so."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, HeadScores, RaggedCache, compress
from sparsemm_lmms.cache import CACHE_NAME, OLD_CACHE_NAME
from sparsemm_lmms.methods import METHODS
from tests.wrappers import tiny

FAMILIES = ("llava_next", "qwen2_vl")
COMPRESSING = [name for name in tiny.REPRESENTATIVE if METHODS[name].compresses]
SMALL = {"window_size": 4, "kernel_size": 3}
PROMPTS = [
    ([0], "What is written in the second line?"),
    ([1, 2], "Compare."),
    ([3], "Read all of it, from the first line to the very last one, please."),
    ([], "No image here."),
]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request, tmp_path_factory):
    folder = tiny.MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    return model, processor


def scores_for(method: str) -> HeadScores | None:
    needed = METHODS[method].needs_head_scores
    return HeadScores.random(tiny.LAYERS, tiny.Q_HEADS, seed=7) if needed else None


def encode(processor, prompts):
    sizes = [(84, 56), (56, 84), (56, 56), (28, 84)]
    texts, images = [], []
    for picks, text in prompts:
        content = [{"type": "image"} for _ in picks] + [{"type": "text", "text": text}]
        texts.append(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))
        images += [tiny.picture(i, sizes[i]) for i in picks]
    return processor(text=texts, images=images or None, padding=True, return_tensors="pt")


@torch.no_grad()
def generate(model, inputs, new_tokens=12, **kwargs):
    return model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, **kwargs)


@pytest.mark.parametrize("method", [*COMPRESSING, "fullkv"])
@pytest.mark.parametrize("picked", [[0], [1], [0, 1, 2, 3]], ids=["one image", "two images", "padded batch"])
def test_budget_that_covers_the_prompt_equals_stock(loaded, method, picked):
    model, processor = loaded
    inputs = encode(processor, [PROMPTS[i] for i in picked])
    stock = generate(model, inputs)
    config = CompressionConfig(method=method, budget=4096, **SMALL)
    with compress(model, config, scores_for(method)) as session:
        assert torch.equal(generate(model, inputs), stock)
        lengths = inputs["attention_mask"].sum(1)
        kept = session.cache.kept_per_head()
        assert torch.equal(kept, lengths[None, :, None].expand_as(kept))
    assert torch.equal(generate(model, inputs), stock)


def test_stock_again_after_an_error_and_fullkv_after_snapkv(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    stock, before = generate(model, inputs), model.config.get_text_config()._attn_implementation
    with pytest.raises(KeyError), compress(model, CompressionConfig(method="snapkv", budget=8, **SMALL)):
        assert not torch.equal(generate(model, inputs), stock)
        raise KeyError
    assert model.config.get_text_config()._attn_implementation == before
    assert not model._forward_pre_hooks
    with compress(model, CompressionConfig(method="fullkv")) as session:
        assert torch.equal(generate(model, inputs), stock)
        assert session.cache.report()["nominal_budget"] is None


@pytest.mark.parametrize("pooling", ["avgpool", "maxpool"])
@pytest.mark.parametrize("method", COMPRESSING)
def test_batch_of_eight_equals_batch_of_one(loaded, method, pooling):
    """Same tokens and same kept positions, whatever shares the batch."""
    model, processor = loaded
    prompts = PROMPTS + [PROMPTS[1], ([2], "?"), ([0, 3], "Sum of both"), ([1], "Who?")]
    config = CompressionConfig(method=method, budget=10, pooling=pooling, **SMALL)
    inputs = encode(processor, prompts)
    with compress(model, config, scores_for(method)) as session:
        together = generate(model, inputs)[:, inputs["input_ids"].shape[1] :]
        kept = [session.cache.kept_positions(layer) for layer in range(tiny.LAYERS)]
        for b, prompt in enumerate(prompts):
            one = encode(processor, [prompt])
            alone = generate(model, one)[:, one["input_ids"].shape[1] :]
            assert torch.equal(together[b], alone[0])
            for layer in range(tiny.LAYERS):
                for head, row in enumerate(session.cache.kept_positions(layer)[0]):
                    assert torch.equal(row, kept[layer][b][head])


@pytest.mark.parametrize("method", COMPRESSING)
def test_decode_equals_masked_attention(loaded, method):
    """An independent check: stock eager attention with everything evicted masked out gives the same logits."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with (
        torch.no_grad(),
        compress(model, CompressionConfig(method=method, budget=12, **SMALL), scores_for(method)) as s,
    ):
        first = model(**inputs)
        cache, token = first[CACHE_NAME], first.logits[:, -1:].argmax(-1)
        got = model(input_ids=token, **{CACHE_NAME: cache}).logits
        kept = [s.cache.kept_positions(layer)[0] for layer in range(tiny.LAYERS)]
    assert torch.allclose(got, _masked_step(model, inputs, token, kept), atol=2e-4)


@torch.no_grad()
def _masked_step(model, inputs, token, kept):
    """Logits of one decode step of the stock model whose attention hides the evicted positions."""
    text = model.config.get_text_config()
    groups = text.num_attention_heads // text.num_key_value_heads
    prompt = inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    hooks = []
    try:
        cache = model(**inputs)[CACHE_NAME]
        for layer, rows in zip(_decoder_layers(model), kept, strict=True):
            hidden = torch.full((1, text.num_attention_heads, 1, prompt + 1), float("-inf"))
            for head in range(text.num_attention_heads):
                hidden[0, head, 0, rows[head // groups]] = 0
            hidden[..., -1] = 0
            hooks.append(
                layer.self_attn.register_forward_pre_hook(
                    lambda _, args, kwargs, hidden=hidden: (args, {**kwargs, "attention_mask": hidden}),
                    with_kwargs=True,
                )
            )
        return model(input_ids=token, **{CACHE_NAME: cache}).logits
    finally:
        for hook in hooks:
            hook.remove()
        model.set_attn_implementation("sdpa")


def _decoder_layers(model):
    return model.model.language_model.layers


@pytest.mark.parametrize("budget", [10_000, 12])
def test_second_prompt_on_a_filled_cache(loaded, budget):
    """A later turn attends to what was kept plus itself; with everything kept, as the stock model does."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    later = processor.tokenizer("And the third?", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        stock = model(input_ids=later, **{CACHE_NAME: model(**inputs)[CACHE_NAME]}).logits
        with compress(model, CompressionConfig(method="snapkv", budget=budget, **SMALL)) as session:
            first = model(**inputs)
            together = model(input_ids=later, **{CACHE_NAME: first[CACHE_NAME]}).logits
            assert session.cache.get_seq_length() == inputs["input_ids"].shape[1] + later.shape[1]
            cache, steps = model(**inputs)[CACHE_NAME], []
            for i in range(later.shape[1]):
                steps.append(model(input_ids=later[:, i : i + 1], **{CACHE_NAME: cache}))
    one_by_one = torch.cat([step.logits for step in steps], dim=1)
    assert torch.allclose(together, one_by_one, atol=2e-4)
    assert torch.allclose(together, stock, atol=2e-4) == (budget == 10_000)


@pytest.mark.parametrize("method", [*COMPRESSING, "fullkv"])
def test_compressed_again_is_compressed_at_once(loaded, method):
    """As long as nothing was evicted before, a later prompt leaves what one prefill of the whole would leave."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    later = processor.tokenizer("Read all of it, once more, please.", return_tensors="pt")["input_ids"]
    first = inputs["input_ids"].shape[1]
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], later], 1)}
    for name in ("attention_mask", "mm_token_type_ids"):
        if name in inputs:
            filler = torch.full_like(later, int(name == "attention_mask"))
            whole[name] = torch.cat([inputs[name], filler], 1)
    for redistribute in (False, True):
        config = CompressionConfig(method=method, budget=first + 3, redistribute=redistribute, **SMALL)
        with torch.no_grad(), compress(model, config, scores_for(method)) as session:
            model(**whole)
            at_once = [session.cache.kept_positions(layer)[0] for layer in range(tiny.LAYERS)]
            cache = session.new_cache(max_new_tokens=2)
            model(**inputs, **{CACHE_NAME: cache})
            before = cache.report()["kv_bytes_full"]
            cache.compress_next = True
            model(input_ids=later, **{CACHE_NAME: cache})
            again = [cache.kept_positions(layer)[0] for layer in range(tiny.LAYERS)]
            report, kept = cache.report(), cache.kept_per_head()
            assert report["prompt_tokens"] == cache.get_seq_length() == first + later.shape[1] or method == "fullkv"
            assert report["kv_bytes_full"] == before * (first + later.shape[1]) / first
            assert all((layer.length.numpy() == layer.kept + layer.appended).all() for layer in cache.layers)
            assert not cache.step.compress or method == "fullkv" or int(kept.max()) <= first + later.shape[1]
            if method in ("fullkv", "expected_attention"):  # which evicts nothing; which needs all queries
                continue
            for one, other in zip(at_once, again, strict=True):
                assert [row.tolist() for row in one] == [row.tolist() for row in other]
            token = torch.tensor([[5]])
            after = model(input_ids=token, **{CACHE_NAME: cache}).logits
            model(**whole)
            assert torch.allclose(after, model(input_ids=token, **{CACHE_NAME: session.cache}).logits, atol=2e-4)


@pytest.mark.parametrize("method", ["snapkv", "sparsemm", "fullkv"])
def test_tokens_taken_back_leave_no_trace(loaded, method):
    """Padded passes too, also when the store grew in between, and down into the prompt's window."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    config = CompressionConfig(method=method, budget=12, **SMALL)
    token = torch.full((len(PROMPTS), 1), 7)
    with torch.no_grad(), compress(model, config, scores_for(method)) as session:
        cache = session.new_cache(max_new_tokens=2)
        model(**inputs, **{CACHE_NAME: cache})
        mask = inputs["attention_mask"]

        def run(ids, new):
            whole = torch.cat([mask, new], 1)
            at = (whole.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            at = at.expand(3, -1, -1) if "mm_token_type_ids" in inputs else at
            return model(input_ids=ids, attention_mask=whole, position_ids=at, **{CACHE_NAME: cache}).logits

        def step():
            logits = run(token, torch.ones_like(token))
            cache.rollback(1)
            return logits

        before, seen = step(), cache.get_seq_length()
        new = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]])
        ids = torch.randint(8, 40, new.shape, generator=torch.Generator().manual_seed(0))
        run(ids, new)
        cache.rollback(5, new.sum(1).int())
        assert cache.get_seq_length() == seen and torch.equal(step(), before)

        model(**inputs, **{CACHE_NAME: (cache := session.new_cache())})
        model(input_ids=token[:, :1], **{CACHE_NAME: cache})
        cache.rollback(1 + SMALL["window_size"] - 1)
        assert cache.get_seq_length() == seen - 3
        if method != "fullkv":
            with pytest.raises(ValueError, match="1 tokens cannot be rolled back: 0 came after"):
                for _ in range(99):
                    cache.rollback(1)


def test_only_one_conversation_is_compressed_again(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    config = CompressionConfig(method="snapkv", budget=12, **SMALL)
    with torch.no_grad(), compress(model, config) as session:
        cache = model(**inputs)[CACHE_NAME]
        cache.compress_next = True
        with pytest.raises(ValueError, match="one conversation at a time"):
            model(input_ids=torch.full((len(PROMPTS), 2), 7), **{CACHE_NAME: cache})
        assert session.cache is cache


def test_beam_search_equals_stock(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:3])
    stock = generate(model, inputs, num_beams=3)
    with compress(model, CompressionConfig(method="fullkv")):
        assert torch.equal(generate(model, inputs, num_beams=3), stock)
    with compress(model, CompressionConfig(method="sparsemm", budget=10, **SMALL), scores_for("sparsemm")):
        first = generate(model, inputs, num_beams=3)
        assert torch.equal(generate(model, inputs, num_beams=3), first)


def test_assisted_decoding_is_refused(loaded):
    model, processor = loaded
    inputs = encode(processor, [PROMPTS[3]])
    with compress(model, CompressionConfig(method="fullkv")) as session:
        with pytest.raises(ValueError, match="[Aa]ssisted"):
            generate(model, inputs, prompt_lookup_num_tokens=3)
        with pytest.raises(ValueError, match="[Aa]ssisted"):
            generate(model, inputs, prompt_lookup_num_tokens=3, **{CACHE_NAME: session.new_cache()})


def test_more_tokens_than_planned(loaded):
    """The store grows when generation outlives the room, and the text is the same."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    config = CompressionConfig(method="adakv", budget=9, **SMALL)
    with compress(model, config) as session:
        roomy = generate(model, inputs, 30, **{CACHE_NAME: session.new_cache(max_new_tokens=64)})
        tight = generate(model, inputs, 30, **{CACHE_NAME: session.new_cache(max_new_tokens=1)})
        assert torch.equal(roomy, tight)
        session.cache.check_overflow()


@pytest.mark.parametrize("method", METHODS)
def test_bytes_equal_the_formula(loaded, method):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    room, new_tokens = 20, 6
    with compress(model, CompressionConfig(method=method, budget=11, **SMALL), scores_for(method)) as session:
        generate(model, inputs, new_tokens, **{CACHE_NAME: session.new_cache(max_new_tokens=room)})
        report, layers = session.cache.report(), session.cache.layers
    text = model.config.get_text_config()
    head_dim, heads = text.hidden_size // text.num_attention_heads, text.num_key_value_heads
    segments = tiny.LAYERS * len(PROMPTS) * heads
    kept, appended = int(report["kept_per_head"].sum()), new_tokens - 1  # the last token is never fed back
    assert report["kv_bytes_allocated"] == (kept + segments * room) * 2 * head_dim * 4
    assert report["kv_bytes_used"] == (kept + segments * appended) * 2 * head_dim * 4
    full = int(inputs["attention_mask"].sum()) * tiny.LAYERS * heads + segments * appended
    assert report["kv_bytes_full"] == full * 2 * head_dim * 4
    assert report["kv_bytes_allocated"] == sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
    assert report["kept_tokens"] == pytest.approx(kept / segments)


def test_no_full_keys_survive_the_prefill(loaded):
    """Each layer's full K/V is dropped before the next layer's attention runs."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    seen: list[weakref.ref] = []
    alive: list[int] = []

    def watch(layer_update):
        def update(key, value, *args, **kwargs):
            gc.collect()
            alive.append(sum(ref() is not None for ref in seen))
            seen.extend(weakref.ref(tensor.untyped_storage()) for tensor in (key, value))
            return layer_update(key, value, *args, **kwargs)

        return update

    with torch.no_grad(), compress(model, CompressionConfig(method="snapkv", budget=8, **SMALL)) as session:
        cache = session.new_cache(4)
        for layer in cache.layers:
            layer.update = watch(layer.update)
        model(**inputs, **{CACHE_NAME: cache})
        full = 2 * inputs["input_ids"].shape[1]
        for layer in cache.layers:
            assert layer.keys.shape[0] < full * model.config.get_text_config().num_key_value_heads / 2
    gc.collect()
    assert alive == [0] * tiny.LAYERS and not any(ref() is not None for ref in seen)


def test_prompt_shorter_than_the_window(loaded):
    model, processor = loaded
    inputs = encode(processor, [([], "a"), PROMPTS[3]])
    stock = generate(model, inputs)
    with compress(model, CompressionConfig(method="snapkv", budget=600, window_size=512)) as session:
        assert torch.equal(generate(model, inputs), stock)
        assert session.cache.kept_positions(0)[0][0].tolist() == list(range(int(inputs["attention_mask"][0].sum())))


def test_redistribute_spends_the_budget(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    lengths = inputs["attention_mask"].sum(1)
    for method in ("sparsemm", "adakv", "pyramidkv", "random", "snapkv"):
        for budget in (9, 17, 30, 60):
            config = CompressionConfig(method=method, budget=budget, redistribute=True, **SMALL)
            with torch.no_grad(), compress(model, config, scores_for(method)) as session:
                model(**inputs)
                kept = session.cache.kept_per_head().double().mean((0, 2))
            torch.testing.assert_close(kept, lengths.clamp(max=budget).double(), msg=f"{method} {budget}")


def test_refusals(loaded):
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:2])
    config = CompressionConfig(method="snapkv", budget=8, **SMALL)
    with pytest.raises(ValueError, match="needs head_scores"), compress(model, CompressionConfig(budget=64)):
        pass
    wrong = HeadScores.uniform(tiny.LAYERS, 9)
    with pytest.raises(ValueError, match="3 layers x 4 query heads"), compress(model, CompressionConfig(), wrong):
        pass
    table = HeadScores.random(tiny.LAYERS, tiny.Q_HEADS, seed=7).values
    theirs = HeadScores(table, provenance={"model_type": "another_vl"})
    with pytest.raises(ValueError, match="found on a another_vl model"), compress(model, CompressionConfig(), theirs):
        pass
    with compress(model, CompressionConfig(), HeadScores(table, provenance={"model_type": model.config.model_type})):
        pass
    with torch.no_grad(), compress(model, config) as session:
        with pytest.raises(ValueError, match="already under"), compress(model, config):
            pass
        with pytest.raises(ValueError, match="use_cache"):
            model(**inputs, use_cache=False)
        with pytest.raises(ValueError, match="left"):
            model(**{**inputs, "attention_mask": inputs["attention_mask"].flip(1)})
        with pytest.raises(ValueError, match="empty"):
            session.new_cache().report()
        stale = generate(model, inputs, 2, return_dict_in_generate=True)[CACHE_NAME]
    assert isinstance(stale, RaggedCache)
    with compress(model, config), pytest.raises(ValueError, match="another"):
        model(**inputs, **{CACHE_NAME: stale})


@pytest.mark.parametrize("name", sorted({CACHE_NAME, OLD_CACHE_NAME}))
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_both_names_of_the_cache(loaded, name):
    """transformers 5.24 renamed the argument; code that was written before goes on working under compression."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS[:1])
    with torch.no_grad(), compress(model, CompressionConfig(method="snapkv", budget=12, **SMALL)) as session:
        cache = session.new_cache(4)
        model(**inputs, **{name: cache})
        seen = cache.get_seq_length()
        assert session.cache is cache and seen == inputs["input_ids"].shape[1]
        model(input_ids=inputs["input_ids"][:, -1:], **{name: cache})
        assert session.cache is cache and cache.get_seq_length() == seen + 1
        fresh = session.new_cache(4)
        assert generate(model, inputs, 3, **{name: fresh}).shape[1] == seen + 3
        assert session.cache is fresh and fresh.get_seq_length() == seen + 2


def test_sliding_window_models_are_refused():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        layer_types=["sliding_attention"], sliding_window=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match="full attention"):
        with compress(LlamaForCausalLM(config), CompressionConfig(method="fullkv")):
            pass


@pytest.mark.parametrize("prefill", ["eager", "sdpa"])
def test_prefill_implementations_agree(loaded, prefill):
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    model.set_attn_implementation(prefill)
    try:
        stock = generate(model, inputs)
        with compress(model, CompressionConfig(method="fullkv")):
            assert torch.equal(generate(model, inputs), stock)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("method", ["mask", "mask_random"])
def test_masked_heads_contribute_nothing(loaded, method):
    """Equals the stock model with the masked heads' columns of every output projection set to zero."""
    model, processor = loaded
    inputs = encode(processor, PROMPTS)
    stock = generate(model, inputs)
    config = CompressionConfig(method=method, mask_ratio=0.4, seed=3)
    with compress(model, config, scores_for("sparsemm")) as session:
        masked = session.method.masked_heads()
        got = generate(model, inputs)
    assert masked.sum() == round(0.4 * tiny.LAYERS * tiny.Q_HEADS)
    best = scores_for("sparsemm").values >= sorted(scores_for("sparsemm").values.ravel())[-masked.sum()]
    assert (masked == best).all() if method == "mask" else not (masked & best).any()
    text = model.config.get_text_config()
    saved = [layer.self_attn.o_proj.weight.data.clone() for layer in _decoder_layers(model)]
    try:
        for layer, row in zip(_decoder_layers(model), masked, strict=True):
            columns = torch.from_numpy(row).repeat_interleave(text.hidden_size // text.num_attention_heads)
            layer.self_attn.o_proj.weight.data[:, columns] = 0
        assert torch.equal(got, generate(model, inputs))
        assert not torch.equal(got, stock)
    finally:
        for layer, weight in zip(_decoder_layers(model), saved, strict=True):
            layer.self_attn.o_proj.weight.data = weight
