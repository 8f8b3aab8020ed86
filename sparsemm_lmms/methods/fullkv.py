"""FullKV: everything is kept. The uncompressed baseline, through the same cache as all other methods."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.methods.base import LayerPrompt, Method


@dataclass(frozen=True)
class FullKV(Method):
    """Keep every token of every head."""

    compresses = False
    scorer = "none"

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> int:
        return length
