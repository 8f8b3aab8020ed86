"""LLaVA-1.5 (llava-hf/llava-1.5-*): one picture of a fixed size for every image."""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="llava",
    architecture="LlavaForConditionalGeneration",
    pretrained="llava-hf/llava-1.5-7b-hf",
    vision_tokens=("image_token_index",),
    grid="fixed",
    lmms_eval=LmmsEvalDefaults(prompts_of="llava_hf", max_new_tokens=1024),
    vlmevalkit=VLMEvalKit(
        stock="LLaVA",
        name="CompressedLLaVA",
        checkpoints={"LLaVA-1.5-7B": "llava_v1.5_7b", "LLaVA-1.5-13B": "llava_v1.5_13b"},
        repositories={
            "LLaVA-1.5-7B": "llava-hf/llava-1.5-7b-hf",
            "LLaVA-1.5-13B": "llava-hf/llava-1.5-13b-hf",
        },
        strips_answers=True,
    ),
)
