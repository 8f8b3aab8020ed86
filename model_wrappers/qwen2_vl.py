"""Qwen2-VL with compressed caches: `qwen2_vl_sparsemm`, `qwen2_vl_snapkv`, ..."""

from __future__ import annotations

from sparsemm_lmms.model_wrappers.base import CompressedChatModel, method_variants
from sparsemm_lmms.model_wrappers.families import QWEN2_VL


class Qwen2VL(CompressedChatModel):
    """Prompts and settings of lmms-eval's `qwen2_vl`."""

    family = QWEN2_VL


globals().update(method_variants(Qwen2VL))
