"""CAKE's token score (https://arxiv.org/abs/2503.12491): how much the window attends, and how much that varies.

As in the published code. Deviations: attention stays float32, where that code casts it to the dtype of the model before
mean and variance; `pooling`, `kernel_size` and `gqa_func`, which it fixes to avgpool, 5 and mean, are settings.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.scorers.window_attention import WindowAttention
from sparsemm_lmms.settings import setting

EPSILON = 1e-10  # inside the logarithm


@dataclass(frozen=True)
class WindowStatistics:
    """Of the attention A of the window's queries to the columns before it.

    Attributes:
        mean, variance: over the window's rows (with Bessel's correction), float32 `[batch, q_heads, L]`.
        entropy: float64 `[batch]`, minus the sum of A log A over heads, rows and columns.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor


def window_statistics(view: LayerView) -> WindowStatistics:
    """The statistics of a layer, once for a view; of one row alone the variance is 0."""
    if "cake" not in view.memo:
        attention = view.attention_rows(min(view.window, view.query.shape[2]))[..., : view.length]
        mean = attention.mean(2)
        variance = attention.var(2) if attention.shape[2] > 1 else torch.zeros_like(mean)
        terms = (attention + EPSILON).log_().mul_(attention)
        view.memo["cake"] = WindowStatistics(mean, variance, -terms.sum((1, 2, 3), dtype=torch.float64))
    return view.memo["cake"]


@dataclass(frozen=True)
class Cake(WindowAttention):
    """Mean plus `gamma` times the variance of the attention of the window's queries, pooled as window attention is."""

    comparable = False
    papers = (("CAKE", "2503.12491"),)

    gamma: float = setting(
        200.0, help="how much the variance of the window's attention counts beside its mean (CAKE)", word="gamma", low=0
    )

    def score(self, view: LayerView) -> Tensor:
        statistics = window_statistics(view)
        scores = view.pooled(statistics.mean + self.gamma * statistics.variance, self.gqa_func)
        pool = avg_pool1d if self.pooling == "avgpool" else max_pool1d  # no score is negative, and padding has 0
        return pool(scores, self.kernel_size, stride=1, padding=self.kernel_size // 2)
