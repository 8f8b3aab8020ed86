"""LLaVA-NeXT (llava-hf/llava-v1.6-*): a whole view and tiles of any resolution, of a CLIP tower."""

from __future__ import annotations

from typing import Any

from sparsemm_lmms.families.base import BenchModel, Family, LmmsEvalDefaults, VLMEvalKit


def _config(vision: dict[str, int], side: int, text: dict[str, Any]) -> dict[str, Any]:
    """`side`: of a tile in patches of 14; a prompt's images have up to two by two tiles."""
    pixels = 14 * side
    return {
        "text_config": text,
        "vision_config": {"model_type": "clip_vision_model", **vision, "image_size": pixels, "patch_size": 14},
        "image_token_index": text["vocab_size"] - 1,
        "image_grid_pinpoints": [[pixels, 2 * pixels], [2 * pixels, pixels], [2 * pixels, 2 * pixels]],
    }


CLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
TINY_CLIP = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
VICUNA_7B = dict(
    model_type="llama", vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=32, rms_norm_eps=1e-5,
)  # fmt: skip
MISTRAL_7B = dict(
    model_type="mistral", vocab_size=32064, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, sliding_window=None,
    rope_parameters={"rope_type": "default", "rope_theta": 1e6},
)  # fmt: skip
TINY = dict(
    model_type="llama", vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4,
)  # fmt: skip

FAMILY = Family(
    model_type="llava_next",
    architecture="LlavaNextForConditionalGeneration",
    pretrained="llava-hf/llava-v1.6-vicuna-7b-hf",
    vision_tokens=("image_token_index",),
    grid="anyres",
    lmms_eval=LmmsEvalDefaults(prompts_of="llava_hf", max_new_tokens=1024),
    vlmevalkit=VLMEvalKit(
        stock="LLaVA_Next",
        name="CompressedLLaVANext",
        checkpoints={
            "LLaVA-NeXT-Vicuna-7B": "llava_next_vicuna_7b",
            "LLaVA-NeXT-Vicuna-13B": "llava_next_vicuna_13b",
            "LLaVA-NeXT-Mistral-7B": "llava_next_mistral_7b",
            "LLaVA-NeXT-Llama3-8B": "llava_next_llama3",
            "LLaVA-NeXT-Yi-34B": "llava_next_yi_34b",
            "LLaVA-NeXT-Qwen-72B": "llava_next_72b",
            "LLaVA-NeXT-Qwen-110B": "llava_next_110b",
            "LLaVA-NeXT-Demo": None,
        },
        spread=("LLaVA-NeXT-Yi-34B", "LLaVA-NeXT-Qwen-72B", "LLaVA-NeXT-Qwen-110B"),
        cuts_answers=True,
    ),
    in_papers={
        "llava-v1.6-vicuna-7b": "LLaVA-NeXT-Vicuna-7B",
        "llava-v1.6-mistral-7b": "LLaVA-NeXT-Mistral-7B",
    },
    bench={
        "llava-next-vicuna-7b": BenchModel(_config(CLIP_LARGE, 24, VICUNA_7B)),
        "llava-next-mistral-7b": BenchModel(_config(CLIP_LARGE, 24, MISTRAL_7B)),
        "tiny-llava-next": BenchModel(_config(TINY_CLIP, 4, TINY)),
    },
)
