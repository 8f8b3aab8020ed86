"""Qwen2-VL with compressed caches: `qwen2_vl_sparsemm`, `qwen2_vl_snapkv`, ..."""

from __future__ import annotations

from .arguments import Family
from .base import CompressedChatModel, method_variants


class Qwen2VL(CompressedChatModel):
    """Settings of the host's `qwen2_vl`: its system prompt and pixel limits (at most 768 tokens an image)."""

    family = Family(
        name="qwen2_vl",
        model_type="qwen2_vl",
        architecture="Qwen2VLForConditionalGeneration",
        pretrained="Qwen/Qwen2-VL-7B-Instruct",
        max_new_tokens=128,
        strip_answers=True,
        system_prompt="You are a helpful assistant.",
        pixel_limits=(3136, 602112),
    )


globals().update(method_variants(Qwen2VL))
