"""GLM-4.1V, 4.5V (with experts) and 4.6V: patches of images of any size, merged two by two.

lmms-eval's own model sends images as JPEG of quality 85; here they stay as they are. It reads no video, nor do these.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="glm4v",
    architecture="Glm4vForConditionalGeneration",
    also={"glm4v_moe": "Glm4vMoeForConditionalGeneration", "glm46v": "Glm46VForConditionalGeneration"},
    pretrained="zai-org/GLM-4.6V-Flash",
    vision_tokens=("image_token_id",),
    grid="patches",
    lmms_eval=LmmsEvalDefaults(prompts_of="glm4v", max_new_tokens=8192),
    vlmevalkit=VLMEvalKit(
        stock="GLMThinking",
        name="CompressedGLM4V",
        checkpoints={
            "GLM41V-9B-Thinking": "GLM4_1VThinking-9b",
            "GLM45V": "GLM4_5V",
            "GLM46V": "GLM4_6V",
            "GLM46V-Flash": None,
        },
        repositories={"GLM46V-Flash": "zai-org/GLM-4.6V-Flash"},
        spread=("GLM45V", "GLM46V"),
        writes_prompts=True,
        extracts_answers="extract_answer",
        max_new_tokens=8192,
    ),
)
