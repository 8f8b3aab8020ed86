"""VL-Cache's token score (https://arxiv.org/abs/2410.23317): attention of the queries behind the images, added up.

As in the re-implementation of EffiVLM-Bench with heads that choose for themselves: VL-Cache's own code is not public.
Deviations: where nothing lies behind the last image that code raises; here a prompt without images, one that ends with
an image, tokens whose kind is not known, and a prompt that is chosen from again are judged by the window's queries.
The window is `window_size` tokens, as in all methods, not a tenth of the budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import CriticalScorer, LayerView

THRESHOLD = 0.01  # of the row's maximum: what counts as attention at all


@dataclass(frozen=True)
class PostVisionAttention:
    """What the judging queries of a layer attend to.

    Attributes:
        mass: float32 `[batch, kv_heads, n]`, their attention to each column, added up with that of the head's group.
        density: float64 `[batch]`, share of the columns they can see that have at least 1 % of the row's maximum,
            mean over the query heads: 1 minus VL-Cache's sparsity.
    """

    mass: Tensor
    density: Tensor


def first_judge(view: LayerView) -> Tensor:
    """Column of the first query that judges, int64 `[batch]`: the one behind the last image or video token.

    The first of the window where no image is known, or nothing lies behind the last.
    """
    columns, queries = view.key.shape[2], view.query.shape[2]
    window = torch.full((view.key.shape[0],), columns - min(view.window, queries), device=view.key.device)
    if view.vision is None:
        return window
    places = torch.arange(1, columns + 1, device=view.key.device)
    behind = (view.vision.to(places.device) * places).amax(-1)
    return torch.where((behind == 0) | (behind == columns), window, behind.clamp(min=columns - queries))


def post_vision_attention(view: LayerView) -> PostVisionAttention:
    """Judge a layer, once for a view. Memory is that of one block of rows (`LayerView.attention_blocks`)."""
    if "post_vision" not in view.memo:
        view.memo["post_vision"] = _judge(view)
    return view.memo["post_vision"]


def _judge(view: LayerView) -> PostVisionAttention:
    (batch, heads, columns), q_heads, device = view.key.shape[:3], view.query.shape[1], view.key.device
    first, real = first_judge(view), view.real()
    mass = torch.zeros(batch, heads, columns, dtype=torch.float64, device=device)
    dense = torch.zeros(batch, dtype=torch.float64, device=device)
    for begin, attention in view.attention_blocks(columns - int(first.min())):
        places = torch.arange(begin, begin + attention.shape[2], device=device)
        judges = ((places >= first[:, None]) & real[:, places]).to(attention.dtype)[:, None, None]
        enough = attention.amax(-1, keepdim=True).mul_(THRESHOLD)
        mass[..., : attention.shape[-1]] += (judges @ attention).unflatten(1, (heads, -1)).sum((2, 3))
        dense += (judges @ attention.ge_(enough)).sum((1, 2, 3), dtype=torch.float64)  # 1 or 0 in place of a weight
    judges = real & (torch.arange(columns, device=device) >= first[:, None])
    visible = (real.cumsum(-1) * judges).sum(-1)
    return PostVisionAttention(mass.float(), dense / (visible * q_heads))


@dataclass(frozen=True)
class PostVision(CriticalScorer):
    """Attention of the queries behind the last image, added up over them and a kv head's query heads (VL-Cache)."""

    comparable = True
    reads_vision = True
    papers = (("VL-Cache", "2410.23317"),)

    def score(self, view: LayerView) -> Tensor:
        return post_vision_attention(view).mass[..., : view.length]
