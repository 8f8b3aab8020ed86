"""Gemma 4: one picture of the image's shape; sliding layers between the full ones.

lmms-eval's own model sends images as JPEG of quality 85; here they stay as they are. Images only: that model
samples and sizes frames of videos by rules of its own, which are not here.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="gemma4",
    architecture="Gemma4ForConditionalGeneration",
    pretrained="google/gemma-4-31B-it",
    vision_tokens=("image_token_id",),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(prompts_of="gemma4", max_new_tokens=128, system_prompt="You are a helpful assistant."),
    vlmevalkit=VLMEvalKit(
        stock="Gemma4",
        name="CompressedGemma4",
        checkpoints={"Gemma4-31B": "Gemma4-31B-it"},
        writes_prompts=True,
        extracts_answers="extract_response_for_eval",
        max_new_tokens=4096,
        attributes={"enable_thinking": False},
    ),
)
