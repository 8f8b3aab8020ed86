"""Tiny random checkpoints of the built-in families, in the ordinary Hugging Face layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.clip.image_processing_clip import CLIPImageProcessor
from transformers.models.gemma3.image_processing_gemma3 import Gemma3ImageProcessor
from transformers.models.got_ocr2.image_processing_got_ocr2 import GotOcr2ImageProcessor
from transformers.models.idefics3.image_processing_idefics3 import Idefics3ImageProcessor
from transformers.models.llava_onevision.image_processing_llava_onevision import LlavaOnevisionImageProcessor
from transformers.models.pixtral.image_processing_pixtral import PixtralImageProcessor

from ..wrappers import tiny

TOWER = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
CLIP = dict(model_type="clip_vision_model", image_size=56, projection_dim=16, **TOWER)
SIGLIP = dict(model_type="siglip_vision_model", image_size=56, vision_use_head=False, **TOWER)
MROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]})
SQUARE = {"height": 56, "width": 56}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": tiny.LAYERS,
        "num_attention_heads": tiny.Q_HEADS,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "initializer_range": 0.4,
        **tiny._ends(tokenizer),
        **more,
    }


def save(name: str, config: Any, processor: Any, folder: Path, mark: str = "<image>") -> Path:
    torch.manual_seed(0)
    processor.chat_template = tiny.TURNS.replace("IMAGE", mark).replace("VIDEO", "")
    return tiny._save(getattr(transformers, f"{name}ForConditionalGeneration")(config), processor, folder)


def tokens(*special: str, **named: str) -> tuple[Any, dict[str, int]]:
    """A tokenizer with the special tokens, some as its attributes, and their ids."""
    tokenizer = tiny._tokenizer(["<image>", *special])
    ids = dict(zip(("<image>", *special), tokenizer.convert_tokens_to_ids(["<image>", *special]), strict=True))
    for name, token in named.items():
        tokenizer.init_kwargs.setdefault("extra_special_tokens", {})
        tokenizer._set_model_specific_special_tokens({name: token})
    return tokenizer, ids


def qwen(name: str, vision: dict[str, Any], patch: int, folder: Path, **more: Any) -> Path:
    tokenizer = tiny._tokenizer(list(QWEN))
    named = dict(
        zip(("vision_start", "vision_end", "image", "video"), tokenizer.convert_tokens_to_ids(QWEN), strict=True)
    )
    config = getattr(transformers, f"{name}Config")(
        text_config=text(tokenizer, **MROPE, **more),
        vision_config=dict(hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, **vision),
        **{f"{word}_token_id": token for word, token in named.items()},
    )
    video = transformers.Qwen3VLVideoProcessor if patch == 16 else transformers.Qwen2VLVideoProcessor
    image_processor = transformers.Qwen2VLImageProcessor(patch_size=patch)
    processor = getattr(transformers, f"{name.removesuffix('Moe')}Processor")(image_processor, tokenizer, video())
    return save(name, config, processor, folder, tiny._seen("image"))


def qwen2_5_vl(folder: Path) -> Path:
    return qwen("Qwen2_5_VL", dict(depth=2, fullatt_block_indexes=[1]), 14, folder)


def qwen3_vl(folder: Path) -> Path:
    return qwen("Qwen3VL", dict(depth=2, num_position_embeddings=64, deepstack_visual_indexes=[0]), 16, folder)


def llava(folder: Path) -> Path:
    tokenizer, ids = tokens()
    config = transformers.LlavaConfig(
        text_config=text(tokenizer, model_type="llama"),
        vision_config=CLIP,
        image_token_index=ids["<image>"],
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    images = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return save("Llava", config, processor, folder)


def llava_onevision(folder: Path) -> Path:
    tokenizer, ids = tokens("<video>")
    pinpoints = [[56 * rows, 56 * columns] for rows in (1, 2) for columns in (1, 2)]
    config = transformers.LlavaOnevisionConfig(
        text_config=text(tokenizer, model_type="qwen2"),
        vision_config=SIGLIP,
        image_token_index=ids["<image>"],
        video_token_index=ids["<video>"],
        image_grid_pinpoints=pinpoints,
    )
    processor = transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=pinpoints),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
    )
    return save("LlavaOnevision", config, processor, folder)


def internvl(folder: Path) -> Path:
    marks = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<image>", video_token="<v>")
    tokenizer, ids = tokens("<img>", "</img>", "<v>", **marks)
    config = transformers.InternVLConfig(
        text_config=text(tokenizer, model_type="qwen2"),
        vision_config=dict(TOWER, patch_size=[14, 14], image_size=[56, 56]),
        image_token_id=ids["<image>"],
        image_seq_length=4,
    )
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessor(size=SQUARE, crop_to_patches=True, max_patches=4),
        tokenizer,
        transformers.InternVLVideoProcessor(size=SQUARE),
        image_seq_length=4,
    )
    return save("InternVL", config, processor, folder)


def mistral3(folder: Path) -> Path:
    tokenizer, ids = tokens("[IMG_BREAK]", "[IMG_END]")
    config = transformers.Mistral3Config(
        text_config=text(tokenizer, model_type="mistral", sliding_window=None),
        vision_config=dict(TOWER, model_type="pixtral", image_size=112, head_dim=8),
        image_token_index=ids["<image>"],
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    processor = transformers.PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        image_token="<image>",
    )
    return save("Mistral3", config, processor, folder)


def idefics3(folder: Path) -> Path:
    tokenizer, ids = tokens("<fake_token_around_image>", "<end_of_utterance>", "<global-img>")
    config = transformers.Idefics3Config(
        text_config=text(tokenizer, model_type="llama"),
        vision_config=dict(TOWER, image_size=56),
        image_token_id=ids["<image>"],
        scale_factor=2,
    )
    images = Idefics3ImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    return save("Idefics3", config, transformers.Idefics3Processor(images, tokenizer, image_seq_len=4), folder)


def gemma3(folder: Path) -> Path:
    """One full layer in three; the window of the others is shorter than a prompt."""
    marks = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image>")
    tokenizer, ids = tokens("<start_of_image>", "<end_of_image>", **marks)
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    config = transformers.Gemma3Config(
        text_config=text(tokenizer, sliding_window=16, layer_types=kinds),
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=ids["<start_of_image>"],
        eoi_token_index=ids["<end_of_image>"],
        image_token_index=ids["<image>"],
    )
    processor = transformers.Gemma3Processor(Gemma3ImageProcessor(size=SQUARE), tokenizer, image_seq_length=4)
    return save("Gemma3", config, processor, folder, "<start_of_image>")


MAKERS: dict[str, Callable[[Path], Path]] = {
    **tiny.MAKERS,
    "gemma3": gemma3,
    "idefics3": idefics3,
    "internvl": internvl,
    "llava": llava,
    "llava_onevision": llava_onevision,
    "mistral3": mistral3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}
