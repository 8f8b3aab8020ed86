"""LLaVA-NeXT (llava-hf/llava-v1.6-*) with compressed caches: `llava_next_sparsemm`, `llava_next_snapkv`, ..."""

from __future__ import annotations

from .arguments import Family
from .base import CompressedChatModel, method_variants


class LlavaNext(CompressedChatModel):
    """Settings of the host's `llava_hf`: no system prompt, 1024 new tokens, answers as they come."""

    family = Family(
        name="llava_next",
        model_type="llava_next",
        architecture="LlavaNextForConditionalGeneration",
        pretrained="llava-hf/llava-v1.6-vicuna-7b-hf",
        max_new_tokens=1024,
    )


globals().update(method_variants(LlavaNext))
