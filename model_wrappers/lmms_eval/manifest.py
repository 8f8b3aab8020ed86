"""What lmms-eval's entry point `lmms_eval.models` loads: the names of our models and where their classes are.

Every start of lmms-eval imports this module, and an exception here would disable all plugins loaded after it. It
therefore imports no torch, triton or transformers, and lmms-eval itself only when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsemm_lmms.families import ANY, FAMILIES, GENERIC
from sparsemm_lmms.presets import FREE, METHODS

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

MODELS = {f"{family}_{method}": (family, method) for family in (*FAMILIES, ANY) for method in (*METHODS, FREE)}
"""Registered name -> family (`ANY`: that of the checkpoint) and method."""


def _class_name(family: str, method: str) -> str:
    return FAMILIES[family].class_name(method) if family != ANY else "AnyCheckpoint" + method.title().replace("_", "")


CLASSES = {_class_name(family, method): (family, method) for family, method in MODELS.values()}
"""Name of a class in `model.py` -> family and method."""

FOUND: dict[str, str] = {}
"""Registered name of a model for any checkpoint -> lmms-eval's own id of the family that its newest model found."""


def manifests() -> list[ModelManifest]:
    """One chat model for each family and method, for example `llava_next_sparsemm`, and `vlm_sparsemm` for any."""
    from lmms_eval.models.registry_v2 import ModelManifest

    where = "sparsemm_lmms.model_wrappers.lmms_eval.model"
    return [
        ModelManifest(model_id=name, chat_class_path=f"{where}.{class_name}")
        for name, class_name in zip(MODELS, CLASSES, strict=True)
    ]


def stock_id(model_id: str) -> str:
    """lmms-eval's own id of the family of one of our names; other names as they are.

    Task files choose prompts by the literal `--model`, so ours must be looked up as the stock model would be.

    >>> stock_id("llava_next_local_window"), stock_id("qwen2_vl_sparsemm"), stock_id("qwen3_vl")
    ('llava_hf', 'qwen2_vl', 'qwen3_vl')
    """
    if model_id not in MODELS:
        return model_id
    family, _ = MODELS[model_id]
    return FAMILIES[family].lmms_eval.prompts_of if family != ANY else FOUND.get(model_id, GENERIC.prompts_of)
