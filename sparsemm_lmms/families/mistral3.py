"""Mistral Small 3.1 and Ministral 3: a picture of the image's shape, a break token after each row.

lmms-eval's own model defaults to a base model, which has no chat template. It writes `<s>[INST][IMG]`, a line break and
the question where ours uses the checkpoint's template, samples at temperature 0.6 where a task says nothing, and always
has a repetition penalty of 1.2 (`--gen_kwargs repetition_penalty=1.2` here). Pixtral 12B is a LLaVA to transformers:
its models are `llava_*`.
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="mistral3",
    architecture="Mistral3ForConditionalGeneration",
    pretrained="mistralai/Ministral-3-8B-Instruct-2512",
    vision_tokens=("image_token_index",),
    grid="rows",
    lmms_eval=LmmsEvalDefaults(prompts_of="mistral3_vl", max_new_tokens=512, strip_answers=True),
    vlmevalkit=VLMEvalKit(
        stock=None,
        name="CompressedMistral3",
        checkpoints={
            "Mistral-Small-3.1-24B": None,
            "Ministral-3-3B-Instruct": None,
            "Ministral-3-8B-Instruct": None,
            "Ministral-3-14B-Instruct": None,
        },
        repositories={
            "Mistral-Small-3.1-24B": "mistralai/Mistral-Small-3.1-24B-Instruct-2503",
            "Ministral-3-3B-Instruct": "mistralai/Ministral-3-3B-Instruct-2512",
            "Ministral-3-8B-Instruct": "mistralai/Ministral-3-8B-Instruct-2512",
            "Ministral-3-14B-Instruct": "mistralai/Ministral-3-14B-Instruct-2512",
        },
    ),
)
