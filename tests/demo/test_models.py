"""The embedded models load with plain transformers, offline, and read images that no training saw."""

from pathlib import Path

import pytest
import torch

from sparsemm_lmms.demo import FAMILIES, model_path
from sparsemm_lmms.demo.data import samples
from sparsemm_lmms.demo.evaluate import load, read
from sparsemm_lmms.demo.metrics import character_accuracy
from sparsemm_lmms.demo.pages import GRIDS
from sparsemm_lmms.demo.questions import KINDS

CLASSES = {
    "llava_next": "LlavaNextForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
}


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request):
    return request.param, *load(model_path(request.param))


def test_models_are_small():
    folders = [Path(model_path(family)) for family in FAMILIES]
    assert sum(f.stat().st_size for folder in folders for f in folder.rglob("*") if f.is_file()) < 20e6
    with pytest.raises(ValueError, match="known: llava_next, qwen2_vl, internvl"):
        model_path("gpt")


def test_the_real_classes(loaded):
    family, model, processor = loaded
    assert type(model).__name__ == CLASSES[family]
    text = model.config.text_config
    group = text.num_attention_heads // text.num_key_value_heads
    assert group == (2 if family == "qwen2_vl" else 1)
    assert processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


@pytest.mark.parametrize("kind", KINDS)
def test_reads_held_out_images(loaded, kind):
    _, model, processor = loaded
    count = 2 if kind == "all" else 8  # a column has 3 to 5 characters, a transcription about 50
    chosen = [s for grid in GRIDS for s in samples(kind, count, 11, "heldout", grid)]
    answers = read(model, processor, chosen)
    share = sum(character_accuracy(s.answer, a) for s, a in zip(chosen, answers, strict=True)) / len(chosen)
    assert share >= 0.97, [(s.answer, a) for s, a in zip(chosen, answers, strict=True) if s.answer != a]


def test_prompt_lengths(loaded):
    """Window 32 and budgets of 48 to 256 tokens are a fair operating point for 400 to 700 tokens."""
    _, _, processor = loaded
    for grid in GRIDS:
        [s] = samples("line", 1, 0, "heldout", grid)
        message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": s.question}]}]
        text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        length = processor(images=[s.image], text=[text], return_tensors="pt")["input_ids"].shape[1]
        assert 400 <= length <= 700


def test_answers_without_an_image_and_in_a_padded_batch(loaded):
    _, model, processor = loaded
    message = [{"role": "user", "content": [{"type": "text", "text": "Copy this text: AB 7"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    with torch.inference_mode():
        out = model.generate(**processor(text=[text], return_tensors="pt"), max_new_tokens=8)
    assert out.shape[1] > 8
    long, short = (next(iter(samples("line", 1, 3, "heldout", grid))) for grid in (GRIDS[0], GRIDS[-1]))
    together = read(model, processor, [long, short])
    assert together == [read(model, processor, [s])[0] for s in (long, short)]
