"""PyramidKV (https://arxiv.org/abs/2406.02069): less with depth, as in the SparseMM code.

Deviation: that code computes the capacities for the first prompt of a process and reuses them; here each prompt gets
its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.budgets import pyramid_capacities_exact, pyramid_capacity
from sparsemm_lmms.methods.base import LayerPrompt, Method


@dataclass(frozen=True)
class PyramidKV(Method):
    """Every head of a layer keeps the same number; shallow layers keep more."""

    arguments = ("beta",)

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> int:
        base, beta, layers = self.config.base, self.config.beta, self.model.num_layers
        if self.config.redistribute:
            return int(pyramid_capacities_exact(layers, base, length, beta)[prompt.layer_idx])
        return pyramid_capacity(prompt.layer_idx, layers, base, length, beta)
