"""Qwen2-VL: images and videos of any size as patches, merged two by two, with positions in three axes."""

from __future__ import annotations

from typing import Any

from sparsemm_lmms.families.base import BenchModel, Family, LmmsEvalDefaults, VLMEvalKit


def _config(text: dict[str, Any], vision: dict[str, int], mrope: list[int], theta: float) -> dict[str, Any]:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": mrope}
    tokens = {name: text["vocab_size"] - 1 - i for i, name in enumerate(names)}
    return {"text_config": {**text, "rope_parameters": rope}, "vision_config": vision, **tokens}


TEXT_7B = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4,
)  # fmt: skip
TINY_TEXT = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
TOWER_7B = dict(depth=32, embed_dim=1280, hidden_size=3584, num_heads=16)
TINY_TOWER = dict(depth=2, embed_dim=32, hidden_size=128, num_heads=2, mlp_ratio=2)

FAMILY = Family(
    model_type="qwen2_vl",
    architecture="Qwen2VLForConditionalGeneration",
    pretrained="Qwen/Qwen2-VL-7B-Instruct",
    vision_tokens=("image_token_id", "video_token_id"),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(
        prompts_of="qwen2_vl",
        max_new_tokens=128,
        system_prompt="You are a helpful assistant.",
        strip_answers=True,
        pixel_limits=(3136, 602112),  # at most 768 tokens an image
    ),
    vlmevalkit=VLMEvalKit(
        stock="Qwen2VLChat",
        name="CompressedQwen2VL",
        checkpoints={
            "Qwen2VL-2B-Instruct": "Qwen2-VL-2B-Instruct",
            "Qwen2VL-7B-Instruct": "Qwen2-VL-7B-Instruct",
            "Qwen2VL-72B-Instruct": "Qwen2-VL-72B-Instruct",
            "Qwen2VL-Demo": None,
        },
        spread=("Qwen2VL-72B-Instruct",),
        prepares_content=True,
        attributes={"total_pixels": None, "fps": 2, "nframe": 128, "FRAME_FACTOR": 2},  # datasets set fps or nframe
    ),
    reads_video=True,
    in_papers={"qwen2-vl-7b-instruct": "Qwen2-VL-7B-Instruct"},
    bench={
        "qwen2-vl-7b": BenchModel(_config(TEXT_7B, TOWER_7B, [16, 24, 24], 1e6), image_side=32),
        "tiny-qwen2-vl": BenchModel(_config(TINY_TEXT, TINY_TOWER, [4, 6, 6], 1e4), image_side=16),
    },
)
