"""Qwen3-VL, dense: patches merged two by two, whose features also enter the first layers of the text model.

Images only: its videos carry a time stamp before each frame.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="qwen3_vl",
    architecture="Qwen3VLForConditionalGeneration",
    pretrained="Qwen/Qwen3-VL-4B-Instruct",
    vision_tokens=("image_token_id",),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(
        prompts_of="qwen3_vl",
        max_new_tokens=128,
        system_prompt="You are a helpful assistant.",
        pixel_limits=(200704, 1605632),
    ),
)
