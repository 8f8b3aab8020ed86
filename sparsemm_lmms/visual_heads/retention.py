"""Measure retention: what each kv head would hold of the attention of later answer tokens, by the tokens it keeps.

One teacher-forced forward over prompt and known answer. A head ranks the prompt by SnapKV's rule (the very scorer that
runs at inference, with its default window); a curve's value at k is the attention that the answer's queries give to the
k best tokens, a mean over the answer's tokens and the query heads of the kv head. What falls on the window, which is
always kept, and on the answer itself is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import Model
from sparsemm_lmms.retention import Retention
from sparsemm_lmms.scorers.base import LayerView, best_first
from sparsemm_lmms.selection import build_method, scored
from sparsemm_lmms.visual_heads.attention import CHUNK_ELEMENTS, Logits, rows_weights, watch
from sparsemm_lmms.visual_heads.inputs import Batch, with_answers

SNAPKV = CompressionConfig(method="snapkv")
WINDOW = SNAPKV.window_size
COUNTS = np.unique(np.round(2 ** (np.arange(4 * 16 + 1) / 4))).astype(int)
"""Where the curves have points (and at 0): four an octave, up to 65,536 tokens."""


@dataclass
class HeldMass:
    """A watcher (see ``attention.watch``) of one teacher-forced pass.

    prompt: columns of the padded prompt. pad: int32 ``[batch]``, those that are padding. answers: tokens of each
    sample's answer. held: per layer float64 ``[batch, kv_heads, points]``.
    """

    prompt: int
    pad: torch.Tensor
    answers: Sequence[int]
    held: dict[int, np.ndarray] = field(default_factory=dict)

    def look(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits
    ) -> None:
        """query ``[batch, q_heads, q, d]``, key ``[batch, kv_heads, q, d]`` after RoPE; mask as for sdpa."""
        view = LayerView(
            layer,
            query[:, :, : self.prompt],
            key[:, :, : self.prompt],
            logits.scaling,
            min(WINDOW, self.prompt),
            pad=self.pad,
            softcap=logits.softcap,
            sinks=logits.sinks,
        )
        if not view.length:
            self.held[layer] = np.zeros((*key.shape[:2], 1))
            return
        method = build_method(SNAPKV, Model(1, query.shape[1], key.shape[1]))
        held = np.broadcast_to(self.prompt - self.pad.cpu().numpy()[:, None], key.shape[:2])
        best = best_first(scored(method, view, held), view.length)
        mass = self._answer_mass(query, key.float(), mask, logits, view.length).gather(-1, best).cumsum(-1)
        points = np.minimum(COUNTS, view.length) - 1
        self.held[layer] = mass[..., torch.from_numpy(points).to(mass.device)].cpu().numpy()

    def _answer_mass(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits, length: int
    ) -> torch.Tensor:
        """float64 ``[batch, kv_heads, length]``: attention of the answer's queries, means over them and their heads."""
        (batch, q_heads, rows), kv_heads = query.shape[:3], key.shape[1]
        lengths = torch.tensor(self.answers, device=key.device)
        total = torch.zeros(batch, kv_heads, length, dtype=torch.float64, device=key.device)
        size = max(1, CHUNK_ELEMENTS // (batch * q_heads * rows))
        for start in range(self.prompt, rows, size):
            stop = min(start + size, rows)
            weights = rows_weights(query, key, mask, logits, start, stop)[..., :length]
            written = torch.arange(start, stop, device=key.device) - self.prompt < lengths[:, None]
            weights = weights.masked_fill_(~written[:, None, :, None], 0.0).double().sum(2)
            total += weights.unflatten(1, (kv_heads, -1)).mean(2)
        return total / lengths.clamp(min=1)[:, None, None]


def held_masses(model: Any, batch: Batch, tokenizer: Any, pad: int) -> list[np.ndarray | None]:
    """For each sample float64 ``[layers, kv_heads, points]``; None without an answer."""
    answers = [tokenizer(sample.answer, add_special_tokens=False)["input_ids"] for sample in batch.samples]
    if not any(answers):
        return [None] * len(answers)
    padding = batch.prompt - batch.inputs["attention_mask"].sum(-1)
    watcher = HeldMass(batch.prompt, padding.to(torch.int32), [len(answer) for answer in answers])
    with torch.no_grad(), watch(model, watcher):
        model(**with_answers(batch, answers, pad, model), use_cache=False, logits_to_keep=1)
    table = np.stack([watcher.held[layer] for layer in sorted(watcher.held)], axis=1)
    points = [_reached(batch.prompt - int(padding[row]) - WINDOW) for row in range(len(answers))]
    return [table[row, ..., : points[row]] if answers[row] else None for row in range(len(answers))]


def _reached(length: int) -> int:
    """Points that say something of a prompt with so many tokens outside the window."""
    return int(np.searchsorted(COUNTS, max(length, 1))) + 1


def retention_facts(held: Sequence[Any]) -> dict[str, Any]:
    """The provenance's part: mean curves over the samples, each flat from the end of its prompt on."""
    if not held:
        return {}
    points = max(len(sample[0][0]) for sample in held)
    tables = [np.asarray(sample) for sample in held]
    ends = [np.pad(table, ((0, 0), (0, 0), (0, points - table.shape[2])), mode="edge") for table in tables]
    mean = np.mean(ends, axis=0)
    start = np.zeros((*mean.shape[:2], 1))
    curves = Retention(np.array([0, *COUNTS[:points]]), np.concatenate([start, mean], axis=-1))
    return {"retention": {"images": len(held), "window_size": WINDOW, **curves.facts()}}
