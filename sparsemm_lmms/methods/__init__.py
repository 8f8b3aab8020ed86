"""The methods by name. A new method is one file beside these and one line here."""

from .adakv import AdaKV
from .base import LayerPrompt, Method, Model
from .fullkv import FullKV
from .local_window import LocalWindow
from .mask import Mask, MaskRandom
from .pyramidkv import PyramidKV
from .random import Random
from .snapkv import SnapKV
from .sparsemm import SparseMM

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
