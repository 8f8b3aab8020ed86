"""KeyDiff (https://arxiv.org/abs/2504.15364): keys that differ from the mean key stay."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.window_attention import WindowAttention


@dataclass(frozen=True)
class KeyDiff(WindowAttention):
    """Minus the similarity of a key with the mean of the head's normalised keys, at the scale of window attention.

    The order is that of minus the cosine and looks at no query. The scale is MixKV's, so that the two can be added.
    """

    comparable = False
    papers = (("KeyDiff", "2504.15364"),)

    def score(self, view: LayerView) -> Tensor:
        keys, mean, norms = view.mean_direction()
        unlike = -(keys[:, :, : view.length] @ mean.mT)[..., 0] / norms[..., : view.length]
        return view.rescaled(unlike, self.attention(view), epsilon=1e-8)
