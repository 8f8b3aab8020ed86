"""LLaVA-OneVision (llava-hf/llava-onevision-*): a whole view and tiles of any resolution, pooled when they are many."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults

FAMILY = Family(
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    pretrained="llava-hf/llava-onevision-qwen2-7b-ov-hf",
    vision_tokens=("image_token_index",),
    grid="anyres",
    lmms_eval=LmmsEvalDefaults(prompts_of="llava_hf", max_new_tokens=1024),  # `llava_onevision` runs other checkpoints
)
