"""Gemma 3 (4B and up): one picture of a fixed size; sliding layers between the full ones."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    pretrained="google/gemma-3-4b-it",
    vision_tokens=("image_token_index",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="gemma3", max_new_tokens=128, system_prompt="You are a helpful assistant."),
)
