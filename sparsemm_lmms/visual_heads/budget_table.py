"""How many tokens each head keeps, with the very allocation code that the cache runs."""

from __future__ import annotations

import numpy as np

from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores


def budget_table(
    scores: HeadScores, kv_heads: int, config: CompressionConfig, prompt_length: int | None = None
) -> np.ndarray:
    """Tokens of each layer and kv head under a method of head scores, int64 ``[layers, kv_heads]``, window included.

    prompt_length: a prompt to clamp to (a head can't keep more than there is); None: the nominal capacities.

    >>> table = budget_table(HeadScores.uniform(2, 4), 4, CompressionConfig(budget=64))
    >>> table.shape, int(table.sum())
    ((2, 4), 512)
    """
    import torch

    from sparsemm_lmms.methods import LayerPrompt, Method, Model

    if kv_heads < 1 or scores.heads % kv_heads:
        raise ValueError(f"kv_heads={kv_heads} must divide the {scores.heads} query heads of these scores.")
    method = Method(config, Model(scores.layers, scores.heads, kv_heads), scores.values, scores.retention)
    if not method.parts.needs_head_scores:
        raise ValueError(f"method={config.method!r} does not share out by head scores; use sparsemm or waterfill.")
    if prompt_length is None and (config.redistribute or method.parts.allocator.needs_retention):
        what = "redistribute" if config.redistribute else f"method={config.method!r}"
        raise ValueError(f"{what} depends on the prompt; give its length.")
    window, length = config.window_size, 0
    if prompt_length is not None:
        window = min(config.window_size, prompt_length)
        length = prompt_length - window
    rows = []
    for layer in range(scores.layers):
        prompt = LayerPrompt(layer, torch.empty(0), (length,))
        rows.append((method.capacities if prompt_length is None else method.counts)(prompt)[0])
    return np.stack(rows).astype(np.int64) + window
