"""Random checkpoints of the real transformers classes, small enough for a test, in the ordinary Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!\n"
LAYERS, Q_HEADS = 3, 4

TURNS = (
    "{% for message in messages %}{{ message.role }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def llava_next(folder: Path, seed: int = 0) -> Path:
    """MHA, CLIP tower of 28 px images with patches of 14, any-resolution tiles."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(["<image>"])
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=Q_HEADS,
        num_key_value_heads=Q_HEADS,
        initializer_range=0.4,
        **_ends(tokenizer),
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    pinpoints = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
    config = LlavaNextConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TURNS.replace("IMAGE", "<image>").replace("VIDEO", ""),
    )
    return _save(LlavaNextForConditionalGeneration(config), processor, folder)


def qwen2_vl(folder: Path, seed: int = 0) -> Path:
    """GQA with groups of 2, 2x2 merge, M-RoPE."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"])
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": Q_HEADS,
        "num_key_value_heads": 2,
        "initializer_range": 0.4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        **_ends(tokenizer),
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    tokens = ("vision_start", "vision_end", "image", "video")  # as transformers' config names them
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    config = Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        **{f"{t}_token_id": tokenizer.convert_tokens_to_ids(n) for t, n in zip(tokens, names, strict=True)},
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=TURNS.replace("IMAGE", _seen("image")).replace("VIDEO", _seen("video")),
    )
    return _save(Qwen2VLForConditionalGeneration(config), processor, folder)


MAKERS = {"llava_next": llava_next, "qwen2_vl": qwen2_vl}


def _seen(kind: str) -> str:
    return f"<|vision_start|><|{kind}_pad|><|vision_end|>"


def head_scores(path: Path, seed: int = 0) -> Path:
    """A score file in the published format for the models above."""
    values = torch.rand(LAYERS, Q_HEADS, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    path.write_text(json.dumps({f"{i}-{j}": v for i, row in enumerate(values) for j, v in enumerate(row)}))
    return path


def picture(index: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    """A noisy image that differs with `index`."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def _tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
    """One token a character; `<pad>` and `</s>` as real checkpoints have them."""
    words = ["<unk>", "<pad>", "</s>", *special, *CHARACTERS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    extra = {"image_token": special[0]} if special == ["<image>"] else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=special,
        **extra,
    )


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def _save(model: torch.nn.Module, processor: object, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
