"""The registered names. Imported at every start of lmms-eval, so nothing heavy may be imported here."""

from __future__ import annotations

FAMILIES = {"llava_next": "LlavaNext", "qwen2_vl": "Qwen2VL"}
"""Module in this folder -> class in it."""

STOCK = {"llava_next": "llava_hf"}
"""Family -> lmms-eval's own id of it, where the two differ."""

METHODS = (
    "sparsemm",
    "snapkv",
    "pyramidkv",
    "adakv",
    "random",
    "local_window",
    "fullkv",
    "mask",
    "mask_random",
)
"""`sparsemm_lmms.methods.METHODS`, repeated because that module imports torch; a test compares the two."""


def class_name(family_class: str, method: str) -> str:
    """Name of the class of one family and method.

    >>> class_name("LlavaNext", "local_window")
    'LlavaNextLocalWindow'
    """
    return family_class + "".join(word.capitalize() for word in method.split("_"))


def stock_id(model_id: str) -> str:
    """lmms-eval's own id of the family of one of our names; other names as they are.

    Task files choose prompts by the literal `--model`, so ours must be looked up as the stock model would be.

    >>> stock_id("llava_next_local_window"), stock_id("qwen2_vl_sparsemm"), stock_id("qwen3_vl")
    ('llava_hf', 'qwen2_vl', 'qwen3_vl')
    """
    for family in FAMILIES:
        if model_id.startswith(f"{family}_") and model_id.removeprefix(f"{family}_") in METHODS:
            return STOCK.get(family, family)
    return model_id
