"""The newest tokens: the first row of SparseMM's Table 2, and StreamingLLM (arXiv 2309.17453) without its sinks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import LayerView, Scorer


@dataclass(frozen=True)
class Recency(Scorer):
    """A token's place."""

    papers = (("StreamingLLM", "2309.17453"),)

    def score(self, view: LayerView) -> Tensor:
        places = torch.arange(view.length, dtype=torch.float32, device=view.key.device)
        return places.expand(*view.key.shape[:2], -1)
