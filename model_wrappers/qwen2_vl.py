"""Qwen2-VL with compressed caches: `qwen2_vl_sparsemm`, `qwen2_vl_snapkv`, ..."""

from __future__ import annotations

from sparsemm_lmms.model_wrappers.families import QWEN2_VL
from sparsemm_lmms.model_wrappers.lmms_eval.model import CompressedChatModel, method_variants


class Qwen2VL(CompressedChatModel):
    """Prompts and settings of lmms-eval's `qwen2_vl`."""

    family = QWEN2_VL


globals().update(method_variants(Qwen2VL))
