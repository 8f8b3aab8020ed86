"""Tiny random models and processors of both families, built from configs without any file or network."""

from __future__ import annotations

import string

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.llava_next.image_processing_llava_next import LlavaNextImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

SPECIAL = ["<pad>", "<s>", "</s>", "<image>", "<video>", "<|vs|>", "<|ve|>", "<unk>"]
CHARACTERS = list(string.ascii_letters + string.digits + " .,:?!'\"()\n")
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]

LLAVA_TEMPLATE = (
    "<s>{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
QWEN_TEMPLATE = LLAVA_TEMPLATE.replace("<image>\n", "<|vs|><image><|ve|>").replace(
    "{% else %}", "{% elif c['type'] == 'video' %}<|vs|><video><|ve|>{% else %}"
)


def tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token a character, plus whole ``words`` (matched first); decoding joins them."""
    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS + list(words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    pattern = "|".join([*sorted(words, key=len, reverse=True), r"[\s\S]"])
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>", "<video>", "<|vs|>", "<|ve|>"],
        extra_special_tokens={"image_token": "<image>", "video_token": "<video>"},
        padding_side="left",
    )


VOCABULARY = len(SPECIAL) + len(CHARACTERS) + 8
IDS = {token: index for index, token in enumerate(SPECIAL)}


TEXT = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    head_dim=16,
    vocab_size=VOCABULARY,
    max_position_embeddings=4096,
    initializer_range=0.4,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def _text(kind: str) -> LlamaConfig | MistralConfig:
    if kind == "vicuna":
        return LlamaConfig(num_key_value_heads=4, **TEXT)
    return MistralConfig(num_key_value_heads=2, sliding_window=None, **TEXT)


def sayable(model):
    """Never generates a special token but the end, nor an id without text."""
    unused = range(len(SPECIAL) + len(CHARACTERS), VOCABULARY)
    model.generation_config.suppress_tokens = [i for i in range(len(SPECIAL)) if i != 2] + list(unused)
    return model


def llava_next(kind: str = "vicuna", seed: int = 0) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=_text(kind),
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
    )
    config._attn_implementation = "sdpa"
    return sayable(LlavaNextForConditionalGeneration(config).eval())


def llava(text: dict, **more) -> LlavaForConditionalGeneration:
    """LLaVA-1.5's class around any text model: ``text`` has its ``model_type``."""
    torch.manual_seed(0)
    text = {**TEXT, "num_key_value_heads": 2, **text, **more, "num_hidden_layers": len(text["layer_types"])}
    config = LlavaConfig(
        vision_config=dict(
            model_type="clip_vision_model", hidden_size=16, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, image_size=56, patch_size=14,
        ),
        text_config=text,
        image_token_index=IDS["<image>"],
        image_seq_length=16,
        vision_feature_layer=-1,
    )  # fmt: skip
    return sayable(AutoModelForImageTextToText.from_config(config).eval())


def llava_processor(words: tuple[str, ...] = (), **image_options) -> LlavaNextProcessor:
    image = LlavaNextImageProcessor(
        size={"shortest_edge": 56},
        crop_size={"height": 56, "width": 56},
        image_grid_pinpoints=PINPOINTS,
        **image_options,
    )
    return LlavaNextProcessor(
        image,
        tokenizer(words),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )


def qwen2_vl(seed: int = 0) -> Qwen2VLForConditionalGeneration:
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        vision_config=dict(depth=1, embed_dim=16, hidden_size=64, num_heads=2, mlp_ratio=2),
        text_config=dict(
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            max_position_embeddings=4096,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]},
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        vision_start_token_id=IDS["<|vs|>"],
        vision_end_token_id=IDS["<|ve|>"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config._attn_implementation = "sdpa"
    return sayable(Qwen2VLForConditionalGeneration(config).eval())


def qwen_processor(words: tuple[str, ...] = (), **image_options) -> Qwen2VLProcessor:
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=size, **image_options),
        tokenizer(words),
        Qwen2VLVideoProcessor(size=size, cap_pixels_per_frame=False, **image_options),
        chat_template=QWEN_TEMPLATE,
    )
