"""InternVL3 and 3.5 in transformers' format (`*-hf`, `*-HF`): square tiles and a thumbnail."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    pretrained="OpenGVLab/InternVL3_5-8B-HF",
    vision_tokens=("image_token_id",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="internvl_hf", max_new_tokens=1024),
)
