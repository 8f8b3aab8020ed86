"""LLaVA-NeXT (llava-hf/llava-v1.6-*) with compressed caches: `llava_next_sparsemm`, `llava_next_snapkv`, ..."""

from __future__ import annotations

from sparsemm_lmms.model_wrappers.families import LLAVA_NEXT
from sparsemm_lmms.model_wrappers.lmms_eval.model import CompressedChatModel, method_variants


class LlavaNext(CompressedChatModel):
    """Prompts and settings of lmms-eval's `llava_hf`."""

    family = LLAVA_NEXT


globals().update(method_variants(LlavaNext))
