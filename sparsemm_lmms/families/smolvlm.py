"""SmolVLM2, and Idefics3 and the first SmolVLM: square tiles and the whole image. lmms-eval has no model of their own.

Images only: the host's model for any checkpoint leaves to the processor which frames of a video are read, which may be
all. SmolVLM2's processor needs the package `num2words` (`pip install sparsemm-lmms[smolvlm]`).
"""

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

FAMILY = Family(
    model_type="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    also={"idefics3": "Idefics3ForConditionalGeneration"},
    pretrained="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
    vision_tokens=("image_token_id",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="huggingface", max_new_tokens=4096),
    vlmevalkit=VLMEvalKit(
        stock="SmolVLM2",
        name="CompressedSmolVLM2",
        checkpoints={
            "SmolVLM2-256M": "SmolVLM2-256M",
            "SmolVLM2-500M": "SmolVLM2-500M",
            "SmolVLM2-2.2B": "SmolVLM2",
        },
        writes_prompts=True,
        writes_turns=True,
        strips_answers=True,
        attributes={"sampling_frames": 64, "resolution": 512},
        also=(
            VLMEvalKit(
                stock="IDEFICS2",
                name="CompressedIdefics3",
                checkpoints={"Idefics3-8B-Llama3": "Idefics3-8B-Llama3"},
                writes_prompts=True,
                writes_turns=True,
                strips_answers=True,
                max_new_tokens=1024,
            ),
            VLMEvalKit(
                stock="SmolVLM",
                name="CompressedSmolVLM",
                checkpoints={
                    "SmolVLM-256M": "SmolVLM-256M",
                    "SmolVLM-500M": "SmolVLM-500M",
                    "SmolVLM-2B": "SmolVLM",
                    "SmolVLM-2B-DPO": "SmolVLM-DPO",
                    "SmolVLM-2B-Synthetic": "SmolVLM-Synthetic",
                },
                writes_prompts=True,
                writes_turns=True,
                strips_answers=True,
            ),
        ),
    ),
)
