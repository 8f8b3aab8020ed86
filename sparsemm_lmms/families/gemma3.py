"""Gemma 3 (4B and up): one picture of a fixed size; sliding layers between the full ones.

lmms-eval's own model sends images as JPEG of quality 85; here they stay as they are. Images only: its videos
would be 32 images in a prompt.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    pretrained="google/gemma-3-27b-it",
    vision_tokens=("image_token_index",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="gemma3", max_new_tokens=128, system_prompt="You are a helpful assistant."),
    vlmevalkit=VLMEvalKit(
        stock="Gemma3",
        name="CompressedGemma3",
        checkpoints={"Gemma3-4B": "Gemma3-4B", "Gemma3-12B": "Gemma3-12B", "Gemma3-27B": "Gemma3-27B"},
        writes_prompts=True,
        max_new_tokens=4096,
        attributes={"system_prompt": "You are a helpful assistant. "},
    ),
)
