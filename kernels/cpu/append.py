"""Appending on a CPU."""

from __future__ import annotations

import torch

from sparsemm_lmms.kernels.append import append_torch


def append(
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    capacity: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    overflow: torch.Tensor,
    new_count: torch.Tensor | None = None,
) -> None:
    """The usual decode step, one token for each segment with room for it, in few operators; else `append_torch`."""
    tokens, head_dim = new_keys.shape[2:]
    if tokens > 1 or new_count is not None or bool((length >= capacity).any()):
        append_torch(keys, values, start, length, capacity, new_keys, new_values, overflow, new_count)
        return
    rows = (start + length).flatten().long()
    keys.index_copy_(0, rows, new_keys.reshape(-1, head_dim))
    values.index_copy_(0, rows, new_values.reshape(-1, head_dim))
    length += 1
