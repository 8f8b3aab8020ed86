"""Calls of `select` on plain tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsemm_lmms.methods import Method
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.selection import Selection, select


def view(method: Method, layer_idx: int, query: Tensor, key: Tensor, scaling: float, **more: Any) -> LayerView:
    window = min(method.config.window_size, key.shape[2])
    return LayerView(layer_idx, query, key, scaling, window, **more)


def of_prompt(
    method: Method, layer_idx: int, query: Tensor, key: Tensor, scaling: float, lengths: tuple[int, ...], **more: Any
) -> Selection:
    """What a layer keeps of left-padded prompts of these lengths."""
    pads = torch.tensor([key.shape[2] - length for length in lengths], dtype=torch.int32)
    seen = view(method, layer_idx, query, key, scaling, pad=pads if pads.any() else None, **more)
    return select(method, seen, np.broadcast_to(np.array(lengths)[:, None], key.shape[:2]), lengths)


def again(
    method: Method,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    scaling: float,
    held: np.ndarray,
    seen: int,
    **more: Any,
) -> Selection:
    """What a layer keeps of what the heads of one sequence hold."""
    return select(method, view(method, layer_idx, query, key, scaling, **more), held[None], (seen,))
