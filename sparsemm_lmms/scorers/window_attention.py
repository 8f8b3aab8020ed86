"""SnapKV's rule (https://arxiv.org/abs/2404.14469): what the queries of the local window attend to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsemm_lmms.kernels import window_score
from sparsemm_lmms.scorers.base import LayerView, Scorer
from sparsemm_lmms.settings import setting

POOLINGS = ("avgpool", "maxpool")
GQA_FUNCS = ("mean", "max")


@dataclass(frozen=True)
class WindowAttention(Scorer):
    """Mean attention of the window's queries, pooled over the query heads of a kv head and over positions."""

    comparable = True

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
        return window_score(
            view.query[:, :, -view.window :],
            view.key,
            scaling=view.scaling,
            softcap=view.softcap,
            sinks=view.sinks,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
            gqa_func=self.gqa_func,
            pad=view.pad,
            backend=view.backend,
        )
