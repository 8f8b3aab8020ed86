"""A tokenizer of printable characters and common prompt words whose decoding is exact."""

import re
import string

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sparsemm_lmms.demo.pages import SYMBOLS
from sparsemm_lmms.demo.questions import TEMPLATES, TEXT_TEMPLATES

SPECIALS = {
    "llava_next": ["<unk>", "<s>", "</s>", "<pad>", "<image>"],
    "qwen2_vl": [
        "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
        "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    ],
    "internvl": [
        "<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>",
    ],
}  # fmt: skip
MARKERS = ["USER:", "ASSISTANT:", "system", "user", "assistant"]
EXTRA = (
    "You are a helpful assistant. Answer the question using a single word or phrase. OCR text image picture "
    "document number read first last second third top bottom left right answer directly with from which"
)
CHARACTERS = sorted(set(string.printable) - set("\r\x0b\x0c\t"))


def prompt_words() -> list[str]:
    """Prompt words that are one token each, with and without the blank before them."""
    text = " ".join([t for group in TEMPLATES.values() for t in group] + list(TEXT_TEMPLATES.values()) + [EXTRA])
    words = sorted({w for w in re.findall(r"[A-Za-z]+", text) if len(w) > 1})
    return [w for word in words for w in (word, " " + word)] + MARKERS


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Tokenizer of `family`: `decode(encode(text)) == text` for printable ASCII; other characters are <unk>."""
    specials, words = SPECIALS[family], prompt_words()
    # Answers are spelled in characters, and the page symbols come first, so that ids of symbols are contiguous.
    rest = [c for c in CHARACTERS if c not in SYMBOLS]
    tokens = list(dict.fromkeys(specials + list(SYMBOLS) + rest + words))
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    plain = "|".join(re.escape(w) for w in sorted(prompt_words()[: -len(MARKERS)], key=len, reverse=True))
    marks = "|".join(re.escape(w) for w in MARKERS[:2])
    pattern = rf"(?:{marks})|(?:{plain}|{'|'.join(MARKERS[2:])})(?![A-Za-z0-9])|[\s\S]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    names = {"unk_token": "<unk>", "clean_up_tokenization_spaces": False, "padding_side": "left"}
    if family == "llava_next":
        names |= {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
        extra = ["<image>"]
    else:
        names |= {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        extra = [t for t in specials if t not in ("<unk>", "<|im_end|>", "<|endoftext|>")]
    if family == "internvl":
        names["extra_special_tokens"] = {
            "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        }  # fmt: skip
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, additional_special_tokens=extra, model_max_length=4096, **names
    )
