"""LLaVA-OneVision (llava-hf/llava-onevision-*): a whole view and tiles of any resolution, pooled when they are many.

Images only: lmms-eval's own chat model hands videos to the processor without sampling: all their frames are read.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="llava_onevision",
    architecture="LlavaOnevisionForConditionalGeneration",
    pretrained="llava-hf/llava-onevision-qwen2-7b-ov-hf",
    vision_tokens=("image_token_index",),
    grid="anyres",
    lmms_eval=LmmsEvalDefaults(prompts_of="llava_hf", max_new_tokens=1024),  # `llava_onevision` runs other checkpoints
    vlmevalkit=VLMEvalKit(
        stock="LLaVA_OneVision_HF",
        name="CompressedLLaVAOneVision",
        checkpoints={
            "LLaVA-OneVision-0.5B": "llava-onevision-qwen2-0.5b-ov-hf",
            "LLaVA-OneVision-7B": "llava-onevision-qwen2-7b-ov-hf",
            "LLaVA-OneVision-0.5B-SI": "llava-onevision-qwen2-0.5b-si-hf",
            "LLaVA-OneVision-7B-SI": "llava-onevision-qwen2-7b-si-hf",
        },
        writes_prompts=True,
    ),
)
