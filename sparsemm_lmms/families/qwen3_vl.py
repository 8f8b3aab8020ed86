"""Qwen3-VL, dense and with experts: patches merged two by two, which also enter the first layers of the text model.

Its videos carry a time stamp before every two frames.
"""

from sparsemm_lmms.families.base import Family, FrameLimits, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    also={"qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration"},
    pretrained="Qwen/Qwen3-VL-4B-Instruct",
    vision_tokens=("image_token_id", "video_token_id"),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(
        prompts_of="qwen3_vl",
        max_new_tokens=128,
        system_prompt="You are a helpful assistant.",
        pixel_limits=(200704, 1605632),
        frame_limits=FrameLimits(),
    ),
    vlmevalkit=VLMEvalKit(
        stock="Qwen3VLChat",
        name="CompressedQwen3VL",
        checkpoints={
            "Qwen3VL-2B-Instruct": "Qwen3-VL-2B-Instruct",
            "Qwen3VL-4B-Instruct": "Qwen3-VL-4B-Instruct",
            "Qwen3VL-8B-Instruct": "Qwen3-VL-8B-Instruct",
            "Qwen3VL-32B-Instruct": "Qwen3-VL-32B-Instruct",
            "Qwen3VL-30B-A3B-Instruct": "Qwen3-VL-30B-A3B-Instruct",
            "Qwen3VL-235B-A22B-Instruct": "Qwen3-VL-235B-A22B-Instruct",
            "Qwen3VL-2B-Thinking": "Qwen3-VL-2B-Thinking",
            "Qwen3VL-4B-Thinking": "Qwen3-VL-4B-Thinking",
            "Qwen3VL-8B-Thinking": "Qwen3-VL-8B-Thinking",
            "Qwen3VL-32B-Thinking": "Qwen3-VL-32B-Thinking",
            "Qwen3VL-30B-A3B-Thinking": "Qwen3-VL-30B-A3B-Thinking",
            "Qwen3VL-235B-A22B-Thinking": "Qwen3-VL-235B-A22B-Thinking",
        },
        spread=tuple(
            f"Qwen3VL-{size}-{kind}" for size in ("32B", "30B-A3B", "235B-A22B") for kind in ("Instruct", "Thinking")
        ),
        reads_video=False,  # qwen-vl-utils would have to tell the time of each frame
        prepares_content=True,
        image_settings=lambda *_: {"do_resize": False},  # qwen-vl-utils has done it
        max_new_tokens=32768,
        attributes={"total_pixels": None, "fps": 2, "nframe": 128, "FRAME_FACTOR": 2},
    ),
    reads_video=True,
)
