"""What `compress` refuses at its door, and what it takes as stock transformers does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.cache import CACHE_NAME
from sparsemm_lmms.visual_heads.sources import open_image

SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
TOKENS = dict(pad_token_id=0, eos_token_id=None, bos_token_id=None)
SNAPKV = CompressionConfig(method="snapkv", budget=12, window_size=4)
FULL = CompressionConfig(method="fullkv")
IDS = torch.randint(3, 64, (1, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **TOKENS, num_key_value_heads=2)).eval()


def refuses(model, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), compress(model, FULL):
        pass


@pytest.mark.parametrize("wrap", [torch.compile, torch.nn.DataParallel])
def test_wrappers_are_named(model, wrap) -> None:
    refuses(wrap(model), "OptimizedModule, which wraps|DataParallel, which wraps")


@pytest.mark.parametrize(
    "name, more, sentence",
    [
        ("OPTConfig", dict(ffn_dim=48, word_embed_proj_dim=32), "OPTConfig names no num_key_value_heads"),
    ],
)
def test_decoders_that_cannot_are_named(name, more, sentence) -> None:
    extra = {"layer_types": ["full_attention"] * 2} if name != "OPTConfig" else {}
    config = getattr(transformers, name)(**SHAPE, **TOKENS, **more, **extra)
    refuses(transformers.AutoModelForCausalLM.from_config(config), sentence)


def test_autograd_and_autocast_give_the_tokens_of_stock(model) -> None:
    want = model(input_ids=IDS).logits
    with compress(model, SNAPKV) as session:
        got = model(input_ids=IDS).logits
    torch.testing.assert_close(got, want)
    assert session.cache is not None and session.cache.layers[0].length.tolist() == [[12, 12]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stock = model.generate(IDS, max_new_tokens=4, do_sample=False)
        with compress(model, FULL) as session:
            assert torch.equal(model.generate(IDS, max_new_tokens=4, do_sample=False), stock)


def test_generate_takes_the_prompt_by_place(model) -> None:
    want = model.generate(IDS, max_new_tokens=4, do_sample=False)
    with compress(model, FULL) as session:
        assert torch.equal(session.generate(IDS, max_new_tokens=4, do_sample=False), want)


def test_what_a_compressed_cache_cannot_serve_is_refused(model) -> None:
    filled = getattr(model(input_ids=IDS[:, :4]), CACHE_NAME)
    with compress(model, FULL):
        with pytest.raises(ValueError, match="output_attentions"):
            model(input_ids=IDS, output_attentions=True)
        for name, value in (
            ("cache_implementation", "static"),
            ("cache_implementation", "quantized"),
            ("cache_implementation", "offloaded"),
            ("prefill_chunk_size", 8),
        ):
            with pytest.raises(ValueError, match=f"{name}={value!r} cannot be served"):
                model.generate(IDS, max_new_tokens=2, **{name: value})
        caches = {
            "is a DynamicCache with 4 tokens": filled,
            "is StaticCache": transformers.StaticCache(config=model.config, max_cache_len=40),
            "is tuple": (),
        }
        for sentence, cache in caches.items():
            with pytest.raises(ValueError, match=sentence):
                model(input_ids=IDS, **{CACHE_NAME: cache})
        mask = torch.ones(1, 32, dtype=torch.long)
        cache = getattr(model(input_ids=IDS), CACHE_NAME)
        mask[0, 5] = 0
        with pytest.raises(ValueError, match="tokens of the earlier passes"):
            model(input_ids=IDS[:, :2], attention_mask=mask, **{CACHE_NAME: cache})
    assert "_prepare_cache_for_generation" not in vars(model)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, prefill_chunk_size=8).shape == (1, 32)


@torch.no_grad()
@pytest.mark.parametrize("method", ["fullkv", "snapkv"])
def test_an_empty_cache_of_the_caller_is_the_one_that_is_used(model, method) -> None:
    config = FULL if method == "fullkv" else SNAPKV

    def loop(cache):
        out = model(input_ids=IDS, **{CACHE_NAME: cache})
        tokens = [out.logits[:, -1].argmax(-1)]
        for _ in range(5):
            tokens.append(model(input_ids=tokens[-1][:, None], **{CACHE_NAME: cache}).logits[:, -1].argmax(-1))
        return torch.stack(tokens, 1)

    def turns(cache):
        ids = IDS
        for question in ([5, 6, 7], [9]):
            ids = model.generate(ids, max_new_tokens=4, do_sample=False, **{CACHE_NAME: cache})
            ids = torch.cat([ids, torch.tensor([question])], 1)
        return ids

    stock = loop(transformers.DynamicCache()), turns(transformers.DynamicCache())
    with compress(model, config) as session:
        ours = loop(session.new_cache()), turns(session.new_cache())
        mine = transformers.DynamicCache(config=model.config), transformers.DynamicCache()
        got = loop(mine[0]), turns(mine[1])
        assert session.cache is mine[1]
        kept = [[cache.report()["kept_tokens"], cache.get_seq_length()] for cache in mine]
    assert all(torch.equal(a, b) for a, b in zip(got, ours, strict=True))
    if method == "fullkv":
        assert all(torch.equal(a, b) for a, b in zip(got, stock, strict=True))
    else:
        assert [pair[0] for pair in kept] == [12, 12]
    assert [pair[1] for pair in kept] == [35, 40]


@torch.no_grad()
def test_a_prefix_is_copied_for_each_question(model) -> None:
    questions = [torch.tensor([[5, 6]]), torch.tensor([[7, 8, 9]])]
    whole = [torch.cat([IDS, question], 1) for question in questions]
    want = [model.generate(ids, max_new_tokens=3, do_sample=False) for ids in whole]
    with compress(model, FULL) as session:
        prefix = session.new_cache()
        model(input_ids=IDS, **{CACHE_NAME: prefix})
        for ids, stock in zip(whole, want, strict=True):
            made = model.generate(ids, **{CACHE_NAME: copy.deepcopy(prefix)}, max_new_tokens=3, do_sample=False)
            assert torch.equal(made, stock)
        assert prefix.get_seq_length() == 30 and prefix.layers[0].length.tolist() == [[30, 30]]


def test_pictures_are_what_a_viewer_shows(tmp_path) -> None:
    page = np.full((6, 9), 255, np.uint8)
    page[1:3, 2:5] = 0
    grey = Image.fromarray(page)
    tag = Image.Exif()
    tag[0x0112] = 6
    grey.rotate(90, expand=True).save(tmp_path / "turned.png", exif=tag)
    Image.fromarray(page.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    clear = np.zeros((6, 9, 4), np.uint8)
    clear[..., 3] = 255 - page
    Image.fromarray(clear, "RGBA").save(tmp_path / "clear.png")
    for file in tmp_path.iterdir():
        assert np.array_equal(np.asarray(open_image(file).convert("L")), page), file.name


@torch.no_grad()
def test_a_cache_ends_with_its_block(model) -> None:
    with compress(model, FULL) as session:
        model(input_ids=IDS)
    assert session.cache is not None and session.cache.report()["kept_tokens"] == 30
    with pytest.raises(RuntimeError, match="block that has ended"):
        model(input_ids=IDS[:, :1], **{CACHE_NAME: session.cache})
