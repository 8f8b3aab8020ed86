"""MixKV (https://arxiv.org/abs/2510.20707): attention, the size of the value and the difference of the key.

Deviation: a head whose values are all of one size (models that normalise them) scores 0 for them, where the published
code divides by zero or ranks by rounding errors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.keydiff import KeyDiff

SHARE = 0.33


@dataclass(frozen=True)
class MixKV(KeyDiff):
    """A third each of KeyDiff, window attention and the value's norm, at one scale; heads share by attention."""

    comparable = True
    papers = (("MixKV", "2510.20707"),)

    def score(self, view: LayerView) -> Tensor:
        return SHARE * super().score(view) + SHARE * self.attention(view) + SHARE * self.value_norms(view)

    def shares(self, view: LayerView, scores: Tensor) -> Tensor:
        return self.attention(view)

    def value_norms(self, view: LayerView) -> Tensor:
        """float32 `[batch, kv_heads, L]`, at the scale of window attention."""
        norms = view.value[:, :, : view.length].float().norm(dim=-1)
        precision = max(torch.finfo(view.value.dtype).eps, 1e-5)
        return view.rescaled(norms, self.attention(view), precision=precision)
