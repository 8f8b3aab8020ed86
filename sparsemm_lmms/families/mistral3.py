"""Mistral Small 3.1 and Ministral 3: a picture of the image's shape, a break token after each row."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    pretrained="mistralai/Ministral-3-8B-Instruct-2512",
    vision_tokens=("image_token_index",),
    grid="rows",
    lmms_eval=LmmsEvalDefaults(prompts_of="mistral3_vl", max_new_tokens=512, strip_answers=True),
)
