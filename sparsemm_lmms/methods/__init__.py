"""The methods by name. A new method is one file beside these and one line here."""

from sparsemm_lmms.methods.adakv import AdaKV
from sparsemm_lmms.methods.base import LayerPrompt, Method, Model
from sparsemm_lmms.methods.fullkv import FullKV
from sparsemm_lmms.methods.local_window import LocalWindow
from sparsemm_lmms.methods.mask import Mask, MaskRandom
from sparsemm_lmms.methods.pyramidkv import PyramidKV
from sparsemm_lmms.methods.random import Random
from sparsemm_lmms.methods.snapkv import SnapKV
from sparsemm_lmms.methods.sparsemm import SparseMM

METHODS: dict[str, type[Method]] = {
    "sparsemm": SparseMM,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "adakv": AdaKV,
    "random": Random,
    "local_window": LocalWindow,
    "fullkv": FullKV,
    "mask": Mask,
    "mask_random": MaskRandom,
}

__all__ = ["METHODS", "LayerPrompt", "Method", "Model"]
