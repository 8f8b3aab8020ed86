"""Qwen2.5-VL: patches of images and videos of any size, merged two by two; windowed attention in the vision tower."""

from sparsemm_lmms.families.base import Family, FrameLimits, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="qwen2_5_vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    pretrained="Qwen/Qwen2.5-VL-3B-Instruct",
    vision_tokens=("image_token_id", "video_token_id"),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(
        prompts_of="qwen2_5_vl",
        max_new_tokens=128,
        # No system prompt: the checkpoints' template writes "You are a helpful assistant." itself.
        pixel_limits=(200704, 1605632),  # 256 to 2048 tokens an image
        frame_limits=FrameLimits(),
    ),
    vlmevalkit=VLMEvalKit(
        stock="Qwen2VLChat",
        name="CompressedQwen25VL",
        checkpoints={
            "Qwen25VL-3B-Instruct": "Qwen2.5-VL-3B-Instruct",
            "Qwen25VL-7B-Instruct": "Qwen2.5-VL-7B-Instruct",
            "Qwen25VL-32B-Instruct": "Qwen2.5-VL-32B-Instruct",
            "Qwen25VL-72B-Instruct": "Qwen2.5-VL-72B-Instruct",
        },
        spread=("Qwen25VL-32B-Instruct", "Qwen25VL-72B-Instruct"),
        prepares_content=True,
        attributes={"total_pixels": None, "fps": 2, "nframe": 128, "FRAME_FACTOR": 2},  # datasets set fps or nframe
    ),
    reads_video=True,
)
