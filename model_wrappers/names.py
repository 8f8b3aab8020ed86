"""The registered names. Imported at every start of lmms-eval, so nothing heavy may be imported here."""

from __future__ import annotations

FAMILIES = {"llava_next": "LlavaNext", "qwen2_vl": "Qwen2VL"}
"""Module in this folder -> class in it."""

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
