"""What tiny random checkpoints share: a tokenizer of characters, a chat template, pictures and questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:?!\n"
LAYERS, Q_HEADS = 3, 4

TURNS = (
    "{% for message in messages %}{{ message.role }}: "
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}IMAGE{% elif part.type == 'video' %}VIDEO{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def picture(index: int, size: tuple[int, int] = (84, 56)) -> Image.Image:
    """A noisy image that differs with `index`."""
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(index))
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def tokenizer(special: list[str]) -> PreTrainedTokenizerFast:
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


def ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    return {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}


def save(model: Any, processor: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def conversation(index: int, question: str = "What is it?", images: int = 1, **size: Any) -> list[dict[str, Any]]:
    """A question on one or more tiny pictures."""
    parts = [{"type": "image", "url": picture(10 * index + i, **size)} for i in range(images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]
