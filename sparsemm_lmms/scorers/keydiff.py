"""KeyDiff (https://arxiv.org/abs/2504.15364): keys that differ from the mean key stay, without looking at any query."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from sparsemm_lmms.scorers.base import LayerView, Scorer


@dataclass(frozen=True)
class KeyDiff(Scorer):
    """Minus the cosine similarity of a key with the mean of the head's normalised keys."""

    def score(self, view: LayerView) -> Tensor:
        keys = view.key.float()
        return -cosine_similarity(keys, view.mean(normalize(keys, dim=-1)), dim=-1)[..., : view.length]
