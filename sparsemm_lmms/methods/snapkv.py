"""SnapKV (https://arxiv.org/abs/2404.14469): the same budget for every head."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.methods.base import LayerPrompt, Method


@dataclass(frozen=True)
class SnapKV(Method):
    """Every head keeps its `budget - window_size` best tokens by the window's attention."""

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> int:
        return self.config.base
