"""InternVL3 and 3.5 in transformers' format (`*-hf`, `*-HF`): square tiles and a thumbnail.

Images only: its processor refuses videos of fewer frames than the 32 that lmms-eval's own model asks for, samples
others by a rule of its own, and takes videos of one batch only if all have the same number of frames.
"""

from __future__ import annotations

from typing import Any

from sparsemm_lmms.families.base import Family, LmmsEvalDefaults, VLMEvalKit

SIZES = ("1B", "2B", "8B", "14B", "38B")


def _tiles(stock: Any, dataset: str | None, images: int) -> dict[str, int]:
    """VLMEvalKit's limits for each dataset."""
    stock.set_max_num(dataset)
    return {"max_patches": max(1, min(stock.max_num, stock.total_max_num // images))}


FAMILY = Family(
    model_type="internvl",
    architecture="InternVLForConditionalGeneration",
    pretrained="OpenGVLab/InternVL3_5-8B-HF",
    vision_tokens=("image_token_id",),
    grid="tiles",
    lmms_eval=LmmsEvalDefaults(prompts_of="internvl_hf", max_new_tokens=1024),
    vlmevalkit=VLMEvalKit(
        stock="InternVLChat",
        name="CompressedInternVL",
        checkpoints={
            **{f"InternVL3-{size}": f"InternVL3-{size}" for size in (*SIZES, "78B")},
            **{f"InternVL35-{size}": f"InternVL3_5-{size}" for size in (*SIZES, "4B")},
        },
        repositories={
            **{f"InternVL3-{size}": f"OpenGVLab/InternVL3-{size}-hf" for size in (*SIZES, "78B")},
            **{f"InternVL35-{size}": f"OpenGVLab/InternVL3_5-{size}-HF" for size in (*SIZES, "4B")},
        },
        spread=("InternVL3-38B", "InternVL3-78B", "InternVL35-38B"),
        writes_prompts=True,
        image_settings=_tiles,
        max_new_tokens=4096,
        attributes={
            "version": "V2.0",
            "use_mpo_prompt": False,
            "use_cot": False,
            "use_postprocess": False,
            "cot_prompt": None,
            "system_prompt": None,
            "screen_parse": True,
            "best_of_n": 1,
            "use_lmdeploy": False,
        },
    ),
)
