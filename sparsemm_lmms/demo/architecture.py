"""Configurations of the demo models and their processors: the ordinary transformers classes, only small."""

import torch
from transformers import (
    CLIPVisionConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.got_ocr2 import GotOcr2ImageProcessor
from transformers.models.internvl import InternVLVideoProcessor
from transformers.models.llava_next import LlavaNextImageProcessor
from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from sparsemm_lmms.demo.glyphs import CELL
from sparsemm_lmms.demo.vocabulary import build_tokenizer

TILE = 8  # cells a side of one any-resolution tile of LLaVA-NeXT
SQUARE, SQUARES = 4, 36  # cells a side of one tile of InternVL, most tiles an image
PINPOINTS = [[336, 336], [224, 336], [336, 224]]
MEAN, STD = [0.5, 0.5, 0.5], [0.5, 0.5, 0.5]
SYSTEM = "You are a helpful assistant."

LLAVA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] != 'system' %}{{ m['role'].upper() + ':' }}{{ ' ' if m['role'] == 'user' else '' }}{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}{% endif %}"
    "{{ '</s>' if m['role'] == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INTERNVL_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def llava_next_config(tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    vision = CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, image_size=TILE * CELL,
        patch_size=CELL, initializer_range=0.04,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=4096, initializer_range=0.05,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **_ids(tokenizer),
    )  # fmt: skip
    return LlavaNextConfig(
        vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS, vision_feature_layer=-1, vision_feature_select_strategy="default",
        image_seq_length=TILE * TILE, tie_word_embeddings=True, **_ids(tokenizer),
    )  # fmt: skip


def qwen2_vl_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    def token(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    vision = {
        "depth": 1, "embed_dim": 96, "hidden_size": 256, "num_heads": 3, "mlp_ratio": 2, "patch_size": CELL // 2,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.04,
    }  # fmt: skip
    # M-RoPE gives the slowest frequencies to the width: at theta 1e4 neighbouring columns can't be told apart.
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 10,
        "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096,
        "initializer_range": 0.05, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 4.0}, **_ids(tokenizer),
    }  # fmt: skip
    return Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"), vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"), tie_word_embeddings=True, **_ids(tokenizer),
    )  # fmt: skip


def internvl_config(tokenizer: PreTrainedTokenizerFast) -> InternVLConfig:
    vision = InternVLVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=4, image_size=SQUARE * CELL,
        patch_size=CELL // 2, initializer_range=0.04,
    )  # fmt: skip
    text = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8, head_dim=32, max_position_embeddings=4096, initializer_range=0.05,
        tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e5}, **_ids(tokenizer),
    )  # fmt: skip
    return InternVLConfig(
        vision_config=vision, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=SQUARE * SQUARE, downsample_ratio=0.5, tie_word_embeddings=True, **_ids(tokenizer),
    )  # fmt: skip


def build_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A freshly initialised model of `family`."""
    tokenizer = build_tokenizer(family)
    torch.manual_seed(seed)
    if family == "llava_next":
        model = LlavaNextForConditionalGeneration(llava_next_config(tokenizer))
    elif family == "internvl":
        model = InternVLForConditionalGeneration(internvl_config(tokenizer))
    else:
        model = Qwen2VLForConditionalGeneration(qwen2_vl_config(tokenizer))
    for key, value in _ids(tokenizer).items():
        setattr(model.generation_config, key, value)
    model.generation_config.do_sample = False
    return model


def build_processor(family: str) -> LlavaNextProcessor | Qwen2VLProcessor | InternVLProcessor:
    """Image processor, tokenizer and chat template of `family`."""
    tokenizer = build_tokenizer(family)
    norm = {"image_mean": MEAN, "image_std": STD}
    if family == "llava_next":
        side = TILE * CELL
        images = LlavaNextImageProcessor(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_grid_pinpoints=PINPOINTS,
            **norm,
        )  # fmt: skip
        return LlavaNextProcessor(
            images, tokenizer, patch_size=CELL, vision_feature_select_strategy="default",
            num_additional_image_tokens=1, chat_template=LLAVA_TEMPLATE,
        )  # fmt: skip
    if family == "internvl":
        size = {"height": SQUARE * CELL, "width": SQUARE * CELL}
        images = GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=SQUARES, **norm)
        videos = InternVLVideoProcessor(size=size, **norm)
        return InternVLProcessor(
            images, tokenizer, videos, image_seq_length=SQUARE * SQUARE, chat_template=INTERNVL_TEMPLATE
        )
    patches = {"patch_size": CELL // 2, "merge_size": 2, "temporal_patch_size": 2}
    limits = {"min_pixels": 4 * CELL * CELL, "max_pixels": 1024 * CELL * CELL}
    images = Qwen2VLImageProcessor(**patches, **limits, **norm)
    videos = Qwen2VLVideoProcessor(**patches, **norm)
    return Qwen2VLProcessor(images, tokenizer, videos, chat_template=QWEN_TEMPLATE)
