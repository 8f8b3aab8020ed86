"""Qwen3.5, dense and with experts: patches merged two by two; three layers in four are of linear attention.

Its videos carry a time stamp before every two frames.
"""

from sparsemm_lmms.families.base import Family, FrameLimits, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="qwen3_5",
    architecture="Qwen3_5ForConditionalGeneration",
    also={"qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration"},
    pretrained="Qwen/Qwen3.5-4B",
    vision_tokens=("image_token_id", "video_token_id"),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(
        prompts_of="qwen3_5",
        max_new_tokens=1024,
        system_prompt="You are a helpful assistant.",
        pixel_limits=(65536, 131072),  # 64 to 128 tokens an image
        enable_thinking=True,
        frame_limits=FrameLimits(max_num_frames=768, fps=2.0, total_pixels=224 * 1024 * 32 * 32),
    ),
    reads_video=True,
    vlmevalkit=VLMEvalKit(
        stock="Qwen3VLChat",
        name="CompressedQwen35",
        checkpoints={
            "Qwen35-27B": "Qwen3.5-27B",
            "Qwen35-35B-A3B": "Qwen3.5-35B-A3B",
            "Qwen35-122B-A10B": "Qwen3.5-122B-A10B",
            "Qwen35-397B-A17B": "Qwen3.5-397B-A17B",
        },
        spread=("Qwen35-35B-A3B", "Qwen35-122B-A10B", "Qwen35-397B-A17B"),
        reads_video=False,
        prepares_content=True,
        image_settings=lambda *_: {"do_resize": False},
        max_new_tokens=32768,
        attributes={"total_pixels": None, "fps": 2, "nframe": 128, "FRAME_FACTOR": 2},
    ),
)
