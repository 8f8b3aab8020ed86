"""Idefics3 and the first SmolVLM: square tiles and the whole image. lmms-eval has no model of its own for them."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="idefics3",
    architecture="Idefics3ForConditionalGeneration",
    pretrained="HuggingFaceM4/Idefics3-8B-Llama3",
    vision_tokens=("image_token_id",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="huggingface", max_new_tokens=4096),
)
