"""Real architectures with random weights, made straight on the device, and a synthetic prompt of image and text."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2VLConfig,
)

IMAGE_SHARE = 0.75  # of a prompt, at most
TEXT = 16  # tokens of text in a prompt, at least


@dataclass(frozen=True)
class LlavaNext:
    """Sizes of a LLaVA-NeXT: of the text decoder, of the CLIP tower, and the side of its tiles in patches of 14."""

    text: dict[str, Any]
    vision: dict[str, Any]
    side: int
    mistral: bool = False

    def config(self) -> PreTrainedConfig:
        pixels = 14 * self.side
        text = (MistralConfig if self.mistral else LlamaConfig)(
            **self.text, max_position_embeddings=2**17, bos_token_id=None, eos_token_id=None
        )
        return LlavaNextConfig(
            text_config=text,
            vision_config=CLIPVisionConfig(**self.vision, image_size=pixels, patch_size=14),
            image_token_index=self.text["vocab_size"] - 1,
            image_grid_pinpoints=[[pixels, 2 * pixels], [2 * pixels, pixels], [2 * pixels, 2 * pixels]],
        )

    def prompt(self, context: int, batch: int, random: torch.Generator) -> dict[str, Tensor]:
        """Images of one by two tiles: a whole view and a row of two, each line of which ends in a newline token."""
        tokens = self.side**2 + self.side * (2 * self.side + 1)
        images = _images(context, tokens)
        image_token, pixels = self.text["vocab_size"] - 1, 14 * self.side
        row = torch.tensor(([image_token] * tokens) * images)
        return {
            **_ids(row, context, batch, image_token, random),
            "pixel_values": torch.randn(batch * images, 3, 3, pixels, pixels, generator=random),
            "image_sizes": torch.tensor([[pixels, 2 * pixels]]).expand(batch * images, 2).contiguous(),
        }


@dataclass(frozen=True)
class Qwen2VL:
    """Sizes of a Qwen2-VL: of the text decoder and of the vision tower, and the largest side of an image in tokens."""

    text: dict[str, Any]
    vision: dict[str, Any]
    side: int

    def config(self) -> PreTrainedConfig:
        last = self.text["vocab_size"] - 1
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        text = {**self.text, "max_position_embeddings": 2**17, "bos_token_id": None, "eos_token_id": None}
        tokens = {name: last - i for i, name in enumerate(names)}
        return Qwen2VLConfig(text_config=text, vision_config=self.vision, **tokens)

    def prompt(self, context: int, batch: int, random: torch.Generator) -> dict[str, Tensor]:
        """Square images, each between its two marks."""
        side = min(self.side, isqrt(max(int(IMAGE_SHARE * context) - 2, 1)))
        tokens, last = side**2, self.text["vocab_size"] - 1
        images = _images(context, tokens + 2)
        row = torch.tensor(([last - 2] + [last] * tokens + [last - 3]) * images)
        inputs = _ids(row, context, batch, last - 3, random)
        patches = torch.randn(batch * images * 4 * tokens, 3 * 2 * 14 * 14, generator=random)
        grid = torch.tensor([[1, 2 * side, 2 * side]]).expand(batch * images, 3).contiguous()
        kinds = (inputs["input_ids"] == last).int()
        return {**inputs, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}


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


CLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
TINY_CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TINY_TEXT = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
)  # fmt: skip
PRESETS: dict[str, LlavaNext | Qwen2VL] = {
    "llava-next-vicuna-7b": LlavaNext(
        dict(
            vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=32, rms_norm_eps=1e-5,
        ),
        CLIP_LARGE, side=24,
    ),
    "llava-next-mistral-7b": LlavaNext(
        dict(
            vocab_size=32064, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, sliding_window=None,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        ),
        CLIP_LARGE, side=24, mistral=True,
    ),
    "qwen2-vl-7b": Qwen2VL(
        dict(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        ),
        dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16), side=32,
    ),
    "tiny-llava-next": LlavaNext({**TINY_TEXT, "num_key_value_heads": 4}, TINY_CLIP, side=4),
    "tiny-qwen2-vl": Qwen2VL(
        {
            **TINY_TEXT, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        },
        dict(depth=2, embed_dim=32, hidden_size=128, num_heads=2, mlp_ratio=2), side=16,
    ),
}  # fmt: skip


def find(name: str) -> LlavaNext | Qwen2VL:
    """The preset of a name."""
    if name not in PRESETS:
        raise ValueError(f"preset={name!r} is unknown; known: {', '.join(PRESETS)}.")
    return PRESETS[name]


def build(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """The model with random weights, made on `device` in `dtype`."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(find(name).config(), dtype=dtype, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None  # every answer takes the length that was asked for
    return model.eval()


def prompt(name: str, model: PreTrainedModel, context: int, batch: int, seed: int = 0) -> dict[str, Tensor]:
    """Inputs of `model.generate` with `context` tokens in every sequence."""
    inputs = find(name).prompt(context, batch, torch.Generator().manual_seed(seed))
    return {key: x.to(model.device, model.dtype if x.is_floating_point() else None) for key, x in inputs.items()}
