"""What single heads look at and what the cache keeps of it, drawn over the image (SparseMM, Figure 1).

One greedy answer is generated under ``watch`` with the attention rows of a few heads kept: the k best visual heads and
k others, drawn at random from the lower half. Then the same prompt is prefilled under ``compress`` and the image tokens
that each of these heads' kv head still holds are read from the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.visual_heads.attention import Logits, Watcher, step_weights, watch
from sparsemm_lmms.visual_heads.chase import text_shape
from sparsemm_lmms.visual_heads.inputs import make_batch
from sparsemm_lmms.visual_heads.passes import GREEDY, end_tokens, pad_token
from sparsemm_lmms.visual_heads.samples import Box, CalibrationSample
from sparsemm_lmms.visual_heads.token_grid import HIGH, TokenGrid, grid_for

Head = tuple[int, int]


@dataclass(frozen=True, eq=False)
class HeadView:
    """One question and what the chosen heads did.

    tokens: texts of the answer. heads: (layer, query head), the ``visual`` best first. grid: the prompt's image tokens.
    attention: float32 ``[heads, tokens, image tokens]``, weights of the row that predicted the token.
    kept: bool ``[heads, image tokens]``, what the head's kv head holds after compression; None without a budget.
    """

    image: Image.Image
    tokens: list[str]
    heads: list[Head]
    visual: int
    grid: TokenGrid
    attention: np.ndarray
    kept: np.ndarray | None


class _Rows(Watcher):
    """Keeps the last row of the chosen heads, over the prompt, pass by pass."""

    def choose(self, heads: Sequence[Head]) -> None:
        self.heads = list(heads)
        self.steps: list[dict[Head, np.ndarray]] = []

    def look(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits
    ) -> None:
        if layer == 0:
            self.steps.append({})
        if any(chosen == layer for chosen, _ in self.heads):
            weights = step_weights(query, key, mask, logits)[0, :, 0, : self.words.shape[-1]]
            for chosen, head in self.heads:
                if chosen == layer:
                    self.steps[-1][chosen, head] = weights[head].cpu().numpy()


def choose_heads(scores: HeadScores, count: int, seed: int = 0) -> list[Head]:
    """The ``count`` best heads, then ``count`` drawn from the lower half."""
    flat = np.argsort(-scores.values, axis=None, kind="stable")
    lower = flat[len(flat) // 2 :]
    if not 1 <= count <= len(lower):
        raise ValueError(f"heads={count} must lie between 1 and {len(lower)}, half of this model's heads.")
    others = np.random.default_rng(seed).choice(lower, count, replace=False)
    return [divmod(int(index), scores.heads) for index in (*flat[:count], *others)]


def view_heads(
    model: Any,
    processor: Any,
    image: Image.Image,
    question: str,
    scores: HeadScores,
    *,
    count: int = 3,
    max_tokens: int = 6,
    compression: CompressionConfig | None = None,
    seed: int = 0,
) -> HeadView:
    """Ask ``question`` about ``image``; watch ``count`` visual heads and as many others for ``max_tokens`` tokens."""
    layers, q_heads, _ = text_shape(model.config)
    scores.check_shape(layers, q_heads, model.config.model_type)
    heads = choose_heads(scores, count, seed)
    image = image.convert("RGB")
    whole = Box("", (0.0, 0.0, float(image.width), float(image.height)))
    sample = CalibrationSample(image, question, "", (whole,))
    family = grid_for(model.config)
    batch = make_batch([sample], processor, family, "high", model)
    inputs = {key: value.cpu() for key, value in batch.inputs.items()}
    (grid,) = family.grids(inputs, [image.size], processor=processor)
    options = {**GREEDY, "pad_token_id": pad_token(processor.tokenizer)}
    with torch.no_grad(), watch(model, _Rows(batch.words)) as rows:
        assert isinstance(rows, _Rows)
        rows.choose(heads)
        output = model.generate(**batch.inputs, max_new_tokens=max_tokens, **options)
    answer = output[0, batch.prompt :].tolist()
    ends = end_tokens(model, processor.tokenizer)
    answer = answer[: next((index for index, token in enumerate(answer) if token in ends), len(answer))]
    if not answer:
        raise ValueError("The model answers with nothing to this question; ask another one.")
    attention = np.array([[step[head][grid.positions] for step in rows.steps[: len(answer)]] for head in heads])
    kept = None if compression is None else _kept(model, batch.inputs, scores, compression, heads, grid, options)
    texts = [processor.tokenizer.decode([token]) for token in answer]
    return HeadView(image, texts, heads, count, grid, attention, kept)


def _kept(
    model: Any,
    inputs: dict[str, torch.Tensor],
    scores: HeadScores,
    compression: CompressionConfig,
    heads: Sequence[Head],
    grid: TokenGrid,
    options: dict[str, Any],
) -> np.ndarray:
    """Which image tokens each head's kv head holds after the prompt, bool ``[heads, image tokens]``."""
    from sparsemm_lmms.session import compress, model_shape

    shape = model_shape(model)
    with torch.no_grad(), compress(model, compression, scores) as session:
        model.generate(**inputs, max_new_tokens=1, **options)
        cache = session.cache
        assert cache is not None  # generate has just filled it
        held = [
            cache.kept_positions(layer)[0][head // (shape.q_heads // shape.kv_heads)].cpu().numpy()
            for layer, head in heads
        ]
    return np.array([np.isin(grid.positions, positions) for positions in held])


def paint(grid: TokenGrid, values: np.ndarray, width: int, height: int) -> np.ndarray:
    """Spread one value a token over the pixels of its box: float ``[height, width]``, high-resolution tokens only."""
    canvas = np.zeros((height, width))
    shown = (grid.view == HIGH) & (grid.frame == 0) & (grid.item == 0)
    for value, box in zip(values[shown], grid.boxes[shown], strict=True):
        left, top, right, bottom = np.rint(box).astype(int)
        canvas[top:bottom, left:right] = value
    return canvas
