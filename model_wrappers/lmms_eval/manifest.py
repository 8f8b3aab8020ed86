"""What lmms-eval's entry point `lmms_eval.models` loads: the names of our models and where their classes are.

Every start of lmms-eval imports this module, and an exception here would disable all plugins loaded after it. It
therefore imports no torch, triton or transformers, and lmms-eval itself only when called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsemm_lmms.model_wrappers.names import FAMILIES, METHODS, class_name

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """One chat model for each family and method, for example `llava_next_sparsemm`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id=f"{family}_{method}",
            chat_class_path=f"sparsemm_lmms.model_wrappers.{family}.{class_name(family_class, method)}",
        )
        for family, family_class in FAMILIES.items()
        for method in METHODS
    ]
