"""SnapKV's rule (https://arxiv.org/abs/2404.14469): what the queries of the local window attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsemm_lmms.kernels import window_score
from sparsemm_lmms.scorers.base import CriticalScorer, LayerView
from sparsemm_lmms.settings import setting

POOLINGS = ("avgpool", "maxpool")
GQA_FUNCS = ("mean", "max")


@dataclass(frozen=True)
class WindowAttention(CriticalScorer):
    """Mean attention of the window's queries, pooled over the query heads of a kv head and over positions."""

    comparable = True
    papers = (("SnapKV", "2404.14469"),)

    kernel_size: int = setting(5, help="width of the pooling over positions (odd)", word="k", odd=True, shared=True)
    pooling: str = setting(
        "avgpool",
        help="`avgpool` or `maxpool` over positions",
        words={"maxpool": "maxpool"},
        choices=POOLINGS,
        shared=True,
    )
    gqa_func: str = setting(
        "mean",
        help="`mean` or `max` over the query heads of one kv head",
        words={"gqamax": "max"},
        choices=GQA_FUNCS,
        shared=True,
    )

    def score(self, view: LayerView) -> Tensor:
        return self.attention(view)

    def attention(self, view: LayerView) -> Tensor:
        """float32 `[batch, kv_heads, L]`, computed once for a view; for scorers that build on it."""
        key = (self.kernel_size, self.pooling, self.gqa_func)
        if key not in view.memo:
            view.memo[key] = self._of_rows(view, view.window, self.kernel_size)
        return view.memo[key]

    def _of_rows(self, view: LayerView, rows: int, kernel_size: int) -> Tensor:
        """Mean attention of the newest `rows` queries to the columns before them."""
        return window_score(
            view.query[:, :, -rows:],
            view.key,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            kernel_size=kernel_size,
            pooling=self.pooling,
            gqa_func=self.gqa_func,
            pad=view.pad,
            backend=view.backend,
        )
