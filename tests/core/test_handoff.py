"""The keys say which layer they come from: in threads, under autocast and inference mode; else an error says so."""

import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.handoff import hand_on, handed
from sparsemm_lmms.visual_heads.attention import WatchedCache, Watcher, watch

IDS = torch.arange(1, 13)[None]


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def generate(model):
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)


def test_the_first_reader_is_known():
    key = torch.zeros(1)
    assert handed(key) is None and hand_on(key, "layer 3") is key
    first = handed(key)
    assert (first.source, first.readers) == ("layer 3", 1)
    assert handed(key).readers == 2 and handed(key.clone()) is None


def test_two_models_in_two_threads_do_not_mix():
    models = [tiny_llama(), tiny_llama()]
    with torch.no_grad():
        models[1].lm_head.weight.add_(torch.randn_like(models[1].lm_head.weight))
    stock, found = [generate(model) for model in models], {}

    def run(n):
        for _ in range(3):
            found[n] = generate(models[n])

    with compress(models[0], CompressionConfig(method="fullkv")), compress(models[1], CompressionConfig("fullkv")):
        threads = [threading.Thread(target=run, args=(n,)) for n in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(found[n], stock[n]) for n in (0, 1))


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(mode):
    model = tiny_llama()
    with mode():
        stock = generate(model)
        with compress(model, CompressionConfig(method="fullkv")):
            assert torch.equal(generate(model), stock)


def copied(update):
    return lambda key, value, *args, **kwargs: tuple(x.clone() for x in update(key, value, *args, **kwargs))


@torch.no_grad()
def test_keys_without_a_word_are_refused(monkeypatch):
    model = tiny_llama()
    with compress(model, CompressionConfig(method="fullkv")) as session:
        cache = session.new_cache()
        monkeypatch.setattr(cache, "update", copied(cache.update))
        with pytest.raises(RuntimeError, match="carries no RaggedCache"):
            model(input_ids=IDS, **{CACHE_NAME: cache})
    with watch(model, Watcher(torch.zeros(1, 1, 4, dtype=torch.bool))):
        cache = DynamicCache(config=model.config)
        monkeypatch.setattr(WatchedCache, "update", DynamicCache.update)
        with pytest.raises(RuntimeError, match="no watched cache"):
            model(input_ids=IDS, **{CACHE_NAME: cache})


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_watched_pass_keeps_what_it_was_asked_to(use_cache):
    model = tiny_llama()
    with watch(model, Watcher(torch.zeros(1, 1, 4, dtype=torch.bool))) as watcher:
        out = model(input_ids=IDS, use_cache=use_cache)
    assert sorted(watcher.argmax) == [0, 1]
    cache = out.get(CACHE_NAME)
    assert (0 if cache is None else cache.get_seq_length()) == (IDS.shape[1] if use_cache else 0)
