"""Prompts cut into parts, on models that attend in both directions among images (Gemma 3) or in the whole prompt."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from sparsemm_lmms import CompressionConfig, compress
from sparsemm_lmms.model_wrappers.matrix import makers
from sparsemm_lmms.model_wrappers.prefill import check_causal, cut, run

from . import tiny

IMAGE, PATCHES = 5, 4


@pytest.fixture(scope="module")
def prefix_lm() -> Any:
    """PaliGemma: every token of a prompt sees every other one."""
    torch.manual_seed(0)
    text = dict(
        model_type="gemma", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=1, initializer_range=0.4, pad_token_id=0,
    )  # fmt: skip
    vision = dict(model_type="siglip_vision_model", image_size=28, vision_use_head=False, projection_dim=32)
    config = AutoConfig.for_model(
        "paligemma",
        text_config=text,
        vision_config={**vision, **makers.TOWER},
        image_token_index=IMAGE,
        projection_dim=32,
    )
    return AutoModelForImageTextToText.from_config(config).eval()


def prompts(*lengths: int) -> dict[str, torch.Tensor]:
    """A left-padded batch: an image and so many tokens of text in each prompt."""
    width, random = PATCHES + max(lengths), torch.Generator().manual_seed(0)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in zip(ids, lengths, strict=True):
        row[width - length - PATCHES : width - length] = IMAGE
        row[width - length :] = torch.randint(6, 40, (length,), generator=random)
    pixels = torch.randn(len(lengths), 3, 28, 28, generator=random)
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": pixels,
    }


@torch.no_grad()
def test_a_prompt_whose_end_is_dropped(prefix_lm: Any) -> None:
    """Its tokens keep their kinds: those of the shorter prompts alone."""
    inputs, dropped = prompts(9, 6, 7), torch.tensor([2, 0, 3])
    parts = cut(prefix_lm, inputs, [inputs["input_ids"].shape[1] - dropped])
    with compress(prefix_lm, CompressionConfig("fullkv")) as session:
        found = run(prefix_lm, session.new_cache(), parts, 1)
    for row, drop in enumerate(dropped.tolist()):
        real = inputs["attention_mask"][row].bool()
        alone = {
            name: value[row : row + 1] if name == "pixel_values" else value[row : row + 1, real][:, : real.sum() - drop]
            for name, value in inputs.items()
        }
        wanted = prefix_lm(**alone, logits_to_keep=1).logits[0, -1]
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)
        causal = prefix_lm(**{**alone, "token_type_ids": torch.ones_like(alone["input_ids"])}).logits[0, -1]
        assert (causal - wanted).abs().max() > 0.01  # the kinds matter


def test_the_beginning_of_a_prompt_that_sees_its_end(prefix_lm: Any) -> None:
    inputs = prompts(9, 6)
    start = torch.tensor([6, 8])
    with pytest.raises(
        ValueError, match=r"^PaliGemma\w+ lets all tokens of a prompt .*leave compress_before_question out"
    ) as told:
        cut(prefix_lm, inputs, [start, torch.tensor([13, 13])])
    assert "\n" not in str(told.value)
    check_causal(prefix_lm, {name: value for name, value in inputs.items() if name != "token_type_ids"}, start)


def test_a_later_part_may_hold_no_image_that_sees_itself(tmp_path: Path) -> None:
    """At every column: later parts are causal, so all images must lie before it."""
    folder = makers.gemma3(tmp_path)
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}, {"type": "text", "text": "?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[text], images=[[tiny.picture(0), tiny.picture(1)]], return_tensors="pt")
    images = inputs["input_ids"][0] == model.config.image_token_id
    assert images.sum() == 2 * PATCHES
    for start in range(1, len(images)):
        with pytest.raises(ValueError) if images[start:].any() else nullcontext():
            check_causal(model, inputs, torch.tensor([start]))
