"""Real architectures with random weights, made straight on the device, and a synthetic prompt of image and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from sparsemm_lmms.families import FAMILIES, BenchModel, Family

IMAGE_SHARE = 0.75  # of a prompt, at most
TEXT = 16  # tokens of text in a prompt, at least
SHARED = {"max_position_embeddings": 2**17, "bos_token_id": None, "eos_token_id": None}  # of all text decoders
PRESETS = {name: (family, model) for family in FAMILIES.values() for name, model in family.bench.items()}
"""Name -> family and sizes."""


def find(name: str) -> tuple[Family, BenchModel]:
    """The preset of a name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def config_of(name: str) -> PreTrainedConfig:
    """The config of a preset."""
    family, sizes = find(name)
    text = {**sizes.config["text_config"], **SHARED}
    return AutoConfig.for_model(family.model_type, **{**sizes.config, "text_config": text})


def build(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, made on `device` in `dtype`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config_of(name), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # every answer takes the length that was asked for
    return model.eval()


def prompt(name: str, model: PreTrainedModel, context: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model.generate` with `context` tokens in every sequence."""
    family, sizes = find(name)
    if family.grid is None or family.grid not in PROMPTS:
        raise ValueError(f"preset={name!r} has the grid {family.grid!r}; known are {', '.join(PROMPTS)}.")
    random = torch.Generator().manual_seed(seed)
    inputs = PROMPTS[family.grid](config_of(name), sizes, context, batch, random)
    return {key: x.to(model.device, model.dtype if x.is_floating_point() else None) for key, x in inputs.items()}


def _anyres(config: Any, sizes: BenchModel, context: int, batch: int, random: torch.Generator) -> dict[str, Tensor]:
    """Images of one by two tiles: a whole view and a row of two, each line of which ends in a newline token."""
    pixels = config.vision_config.image_size
    side = pixels // config.vision_config.patch_size
    tokens = side**2 + side * (2 * side + 1)
    images = _images(context, tokens)
    row = torch.tensor(([config.image_token_id] * tokens) * images)
    return {
        **_ids(row, context, batch, config.image_token_id, random),
        "pixel_values": torch.randn(batch * images, 3, 3, pixels, pixels, generator=random),
        "image_sizes": torch.tensor([[pixels, 2 * pixels]]).expand(batch * images, 2).contiguous(),
    }


def _patches(config: Any, sizes: BenchModel, context: int, batch: int, random: torch.Generator) -> dict[str, Tensor]:
    """Square images, each between its two marks."""
    vision, image = config.vision_config, config.image_token_id
    side = min(sizes.image_side, isqrt(max(int(IMAGE_SHARE * context) - 2, 1)))
    tokens, merge = side**2, vision.spatial_merge_size
    images = _images(context, tokens + 2)
    row = torch.tensor(([config.vision_start_token_id] + [image] * tokens + [config.vision_end_token_id]) * images)
    inputs = _ids(row, context, batch, config.vision_end_token_id, random)
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    patches = torch.randn(batch * images * merge**2 * tokens, values, generator=random)
    grid = torch.tensor([[1, merge * side, merge * side]]).expand(batch * images, 3).contiguous()
    kinds = (inputs["input_ids"] == image).int()
    return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


PROMPTS: Mapping[str, Callable[..., dict[str, Tensor]]] = {"anyres": _anyres, "patches": _patches}
"""Kind of token grid -> the prompt of such models."""


def _images(context: int, tokens: int) -> int:
    images = max(int(IMAGE_SHARE * context) // tokens, 1)
    if images * tokens + TEXT > context:
        raise ValueError(
            f"context={context} is too short for this preset: one image takes {tokens} tokens, the text {TEXT}."
        )
    return images


def _ids(vision: Tensor, context: int, batch: int, below: int, random: torch.Generator) -> dict[str, Tensor]:
    """Random text (tokens 3 .. below - 1) around the vision tokens: `context` columns, no padding."""
    text = torch.randint(3, below, (batch, context - len(vision)), generator=random)
    ids = torch.cat([text[:, : TEXT // 2], vision.expand(batch, -1), text[:, TEXT // 2 :]], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
