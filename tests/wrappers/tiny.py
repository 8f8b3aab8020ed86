"""The tiny checkpoints of most tests, and the methods that run on them."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.model_wrappers.matrix import makers
from sparsemm_lmms.model_wrappers.matrix.tiny import LAYERS, Q_HEADS, TURNS, ends, picture, save, tokenizer
from sparsemm_lmms.presets import METHODS
from sparsemm_lmms.retention import Retention

__all__ = ["LAYERS", "Q_HEADS", "TURNS", "ends", "picture", "save", "tokenizer"]
MAKERS = {name: makers.MAKERS[name] for name in ("llava_next", "qwen2_vl")}
llava_next, qwen2_vl = MAKERS.values()


def head_scores(path: Path, seed: int = 0) -> Path:
    """A score file for the models above, with retention curves."""
    values = torch.rand(LAYERS, Q_HEADS, generator=torch.Generator().manual_seed(seed)).numpy()
    return HeadScores(values, provenance={"retention": Retention.random(LAYERS, Q_HEADS, seed).facts()}).save(path)


BY_TURNS = [(list(MAKERS)[number % 2], method) for number, method in enumerate(METHODS)]
"""(family, method): every method once, the families by turns."""
NAMES = [f"{family}_{method}" for family, method in BY_TURNS]
REPRESENTATIVE = (
    *("sparsemm", "snapkv", "pyramidkv", "adakv", "random", "local_window", "fullkv", "mask", "mask_random"),
    *("waterfill", "adakv_bacon", "headwisemixkv", "expected_attention"),
)
"""The classic methods, and those of the others that differ from them in more than a formula."""
