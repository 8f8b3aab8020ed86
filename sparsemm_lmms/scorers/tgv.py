"""TGV-KV's token score (https://arxiv.org/abs/2606.03075): what the text that other text looks at sees of the images.

As in the published code: the scores are those of a layer, the same for all its heads, and text is kept before images.
Deviations: image tokens are told by their ids, so that several images and text between them are told apart, and the
question is what lies behind the last of them (the published code takes as many columns from the first one on). A prompt
without images or with nothing behind the last one, tokens whose kind is not known, and a prompt that is chosen from
again are ranked by `post_vision`, which looks at the window's queries then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemm_lmms.scorers.base import CriticalScorer, LayerView
from sparsemm_lmms.scorers.post_vision import first_judge, post_vision_attention

TEXT_FIRST = 100.0  # added to text, whose scores follow from another rule
SINKS = 4  # the first tokens, which stay before all others


@dataclass(frozen=True)
class TGV(CriticalScorer):
    """Images by the question's attention, each of its tokens weighted by what the question pays to it; text first.

    With A the mean attention of the layer's heads and Q the question (all behind the images): w_t = mean of A[s, t]
    over the s >= t in Q, and an image token i has the sum of A[t, i] w_t over the t in Q. A text token has what all
    queries pay to it, plus 100; the first four tokens have the length of the prompt more.
    """

    reads_vision = True
    papers = (("TGV-KV", "2606.03075"),)

    def score(self, view: LayerView) -> Tensor:
        mass = post_vision_attention(view).mass
        asked = _asked(view)
        if not asked.any():
            return mass[..., : view.length]
        assert view.vision is not None  # there is an image
        columns, device = view.key.shape[2], view.key.device
        places = torch.arange(columns, device=device)
        paid = mass.double().sum(1) / view.query.shape[1]
        first = first_judge(view)
        start = int(first.min())
        question = (places >= first[:, None]) & view.real()
        weight = torch.where(question, paid / (columns - places), 0.0)
        received, weighted = torch.zeros_like(paid), torch.zeros_like(paid)
        seen = (view.real() & ~view.vision.to(device)).any(0).nonzero()[:, 0]  # columns of text in some sequence
        for begin, attention in view.attention_blocks(view.query.shape[2]):
            rows, end = attention.shape[2:]
            texts = seen[: int((seen < end).sum())]
            received[:, texts] += attention[..., texts].sum(2, dtype=torch.float64).mean(1)
            if begin + rows > start:
                own = weight[:, None, None, begin : begin + rows].to(attention.dtype)
                weighted[:, :end] += (own @ attention).mean((1, 2))
        text, real = received.masked_fill(view.vision.to(device), 0.0) + TEXT_FIRST, view.real()
        sinks = (real.cumsum(-1) <= SINKS) & real
        scores = torch.where(view.vision.to(device), weighted, text)
        scores = torch.where(sinks, text + real.sum(-1, keepdim=True), scores).float()[:, None]
        return torch.where(asked[:, None, None], scores, mass)[..., : view.length]


def _asked(view: LayerView) -> Tensor:
    """bool `[batch]`: sequences with an image and something behind it."""
    if view.vision is None:
        return torch.zeros(view.key.shape[0], dtype=torch.bool, device=view.key.device)
    vision = view.vision.to(view.key.device)
    return vision.any(-1) & ~vision[:, -1]
