"""A family with sliding and full layers, brought by a test, evaluated by lmms-eval: FullKV answers as stock Gemma 3."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
)

from sparsemm_lmms.families import Family, LmmsEvalDefaults
from sparsemm_lmms.model_wrappers.lmms_eval.model import CompressedChatModel

from ..wrappers import tiny
from ..wrappers.conftest import png, task

__all__ = ["task"]  # a fixture
WINDOW, SIZES = 8, [(84, 56), (56, 84), (40, 40)]
FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    pretrained="google/gemma-3-4b-it",
    vision_tokens=("image_token_id",),
    grid=None,
    lmms_eval=LmmsEvalDefaults(prompts_of="gemma3", max_new_tokens=8),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sliding layers to one full one, windows much shorter than a prompt; random weights."""
    torch.manual_seed(0)
    special = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    tokenizer = tiny._tokenizer(list(special.values()))
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in special.items()}
    for name, token in special.items():
        tokenizer.init_kwargs[name] = token
    tokenizer._set_model_specific_special_tokens(special)
    text = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, initializer_range=0.4,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        **tiny._ends(tokenizer),
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7,
        vision_use_head=False,
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text, vision_config=vision, tie_word_embeddings=False, mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"], image_token_index=ids["image_token"], eoi_token_index=ids["eoi_token"],
    )  # fmt: skip
    processor = Gemma3Processor(
        image_processor=Gemma3ImageProcessor(size={"height": 28, "width": 28}),
        tokenizer=tokenizer,
        chat_template=tiny.TURNS.replace("IMAGE", special["boi_token"]),
        image_seq_length=4,
    )
    model = Gemma3ForConditionalGeneration(config)
    with torch.no_grad():  # answers that differ
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.copy_(torch.randn(weight.shape) * 2 / weight.shape[-1] ** 0.5)
    model.generation_config.update(
        **tiny._ends(tokenizer), do_sample=False, top_k=None, top_p=None, cache_implementation=None
    )
    return tiny._save(model, processor, tmp_path_factory.mktemp("gemma3"))


def evaluate(method: str, checkpoint: Path, folder: Path, **more: Any) -> dict[str, Any]:
    kind = type("Hybrid", (CompressedChatModel,), {"family": FAMILY, "method": method})
    model = kind(pretrained=str(checkpoint), device="cpu", window_size=4, **more)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(model, tasks=["tiny_images"], task_manager=manager, bootstrap_iters=0)


def answers(results: dict[str, Any]) -> list[str]:
    return [sample["filtered_resps"][0] for sample in results["samples"]["tiny_images"]]


@torch.no_grad()
def stock(checkpoint: Path, count: int) -> list[str]:
    """What transformers answers to the same documents, one by one."""
    from PIL import Image

    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    found = []
    for i in range(count):
        parts = [{"type": "image"}, {"type": "text", "text": f"What is it{'?' * (i + 1)}"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        image = Image.open(io.BytesIO(png(i, SIZES[i])))
        inputs = processor(text=[text], images=[image], return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        found.append(processor.tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.slow
def test_a_hybrid_model_answers_as_stock(checkpoint: Path, task: Callable[..., Path]) -> None:
    folder = task([png(i, size) for i, size in enumerate(SIZES)])
    want = stock(checkpoint, len(SIZES))
    for batch_size in (1, 3):
        results = evaluate("fullkv", checkpoint, folder, batch_size=batch_size)
        assert answers(results) == want and len(set(want)) > 1
    results = evaluate("snapkv", checkpoint, folder, budget=12)
    throughput = results["throughput"]
    assert throughput["avg_kept_tokens"] == 12 < throughput["avg_prompt_tokens"]
    assert throughput["avg_kv_bytes_used"] < throughput["avg_kv_bytes_full"]
