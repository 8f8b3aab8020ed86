"""MixKV (https://arxiv.org/abs/2510.20707), mixed head by head: the more alike a head's keys, the more KeyDiff counts.

The published code has the heads' similarities of one model as a table; without one they are computed from the prompt,
by a formula that is in that code as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.keydiff import KeyDiff
from sparsemm_lmms.scorers.mixkv import MixKV
from sparsemm_lmms.settings import Table, setting

ONLINE = "online"


@dataclass(frozen=True)
class HeadwiseMixKV(MixKV):
    """h KeyDiff + (1 - h) (window attention + the value's norm), with h how alike the head's keys are."""

    h: Table = setting(
        ONLINE,
        help="how alike the keys of each kv head are: `online` computes it from the prompt; else a table "
        "`[layers, kv_heads]`, or its JSON file",
    )

    def score(self, view: LayerView) -> Tensor:
        h = self._online(view) if self.h == ONLINE else self._of_table(view)
        rest = self.attention(view) + self.value_norms(view)
        return h * KeyDiff.score(self, view) + (1 - h) * rest

    def check(self, num_layers: int, kv_heads: int) -> None:
        if self.h != ONLINE and (len(self.h) not in (1, num_layers) or len(self.h[0]) != kv_heads):
            raise ValueError(
                f"h has shape {[len(self.h), len(self.h[0])]} but the model has {num_layers} layers x {kv_heads} kv "
                f"heads; use a table made for this model, or h={ONLINE}."
            )

    def _online(self, view: LayerView) -> Tensor:
        """Mean cosine of two different keys of a head: float32 `[batch, kv_heads, 1]`."""
        mean = view.mean_direction()[1][:, :, 0]
        tokens = view.real().sum(-1)[:, None, None]
        return (tokens * mean.square().sum(-1, keepdim=True) - 1) / (tokens - 1)

    def _of_table(self, view: LayerView) -> Tensor:
        batch, heads = view.key.shape[:2]
        row = torch.tensor(self.h[view.layer_idx if len(self.h) > 1 else 0], device=view.key.device)
        return row.repeat(batch * heads // len(row)).view(batch, heads, 1)  # also where each head is a sequence
