"""Local window: the most recent tokens only (the first row of SparseMM's Table 2; StreamingLLM without sinks)."""

from __future__ import annotations

from dataclasses import dataclass

from sparsemm_lmms.methods.base import LayerPrompt, Method


@dataclass(frozen=True)
class LocalWindow(Method):
    """Every head keeps the last `budget` tokens."""

    scorer = "recency"

    def sequence_capacities(self, prompt: LayerPrompt, b: int, length: int) -> int:
        return self.config.base
