"""Append new tokens to every segment of a ragged store, in place: the cache update of a decode step.

The published implementation (SparseMM, https://arxiv.org/abs/2506.05344, `tiny_api_cuda.update_flatten_klenN_view`)
allocates a new flat cache and copies all of it at every token. Here a segment has room for the tokens still to come,
so an append writes only the new rows, and addresses never move: a CUDA graph can replay it.
"""

from __future__ import annotations

import torch

from sparsemm_lmms.kernels.backend import (
    DecodePlan,
    bits,
    block_head_dim,
    check_device,
    check_int32,
    check_rows,
    check_same,
    check_store,
    jit,
    on_device_of,
    resolve_backend,
    tl,
)


@jit(do_not_specialize=["heads", "tokens", "has_count"])
def _append_kernel(
    keys,
    values,
    start,
    length,
    capacity,
    new_keys,
    new_values,
    new_count,
    overflow,
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    head_dim,
    heads,
    tokens,
    has_count,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program a segment: the only reader and writer of its length, so no atomics are needed."""
    segment = tl.program_id(0)
    b = (segment // heads).to(tl.int64)
    h = (segment % heads).to(tl.int64)
    used = tl.load(length + segment)
    room = tl.load(capacity + segment) - used
    first = tl.load(start + segment).to(tl.int64) + used
    count = tl.load(new_count + b, mask=has_count != 0, other=tokens)
    # A count outside 0..tokens would read other sequences' rows; it is treated like an overflow.
    fits = (count <= room) & (count >= 0) & (count <= tokens)
    rows = tl.where(fits, count, 0)
    skip = tokens - rows  # left padding

    # All threads must have read `length` before one of them rewrites it below.
    tl.debug_barrier()
    d = tl.arange(0, BLOCK_D)
    for begin in range(0, rows, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        mask = (t < rows)[:, None] & (d < head_dim)[None, :]
        source = (skip + t).to(tl.int64)[:, None]
        target = (first + t)[:, None] * head_dim + d[None, :]
        key = tl.load(
            new_keys + b * key_stride_b + h * key_stride_h + source * key_stride_t + d[None, :], mask, other=0
        )
        tl.store(keys + target, key, mask)
        value = tl.load(
            new_values + b * value_stride_b + h * value_stride_h + source * value_stride_t + d[None, :],
            mask,
            other=0,
        )
        tl.store(values + target, value, mask)
    tl.store(length + segment, used + rows)
    tl.store(overflow, 1, mask=fits == 0)


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
    *,
    plan: DecodePlan | None = None,
    backend: str = "auto",
) -> None:
    """Write new tokens behind the valid rows of every segment and grow the lengths, in place.

    Args:
        keys, values: `[slots, head_dim]`, contiguous, float16, bfloat16 or float32; the store, written.
        start, length, capacity: int32 `[batch, kv_heads]`, rows; `length` is updated. Segments must not overlap.
        new_keys, new_values: `[batch, kv_heads, tokens, head_dim]`, the store's dtype, any strides but a contiguous
            last dimension.
        overflow: int32 `[1]`, set to 1 when a segment had no room (never reset here). Nothing is written for such a
            segment and its length stays, so an overflow never corrupts a neighbour. Read it when the host
            synchronises anyway.
        new_count: int32 `[batch]`: the new tokens are LEFT padded and only the last `new_count[b]` are written. A
            count outside 0..tokens counts as an overflow.
        plan: of this store, see `ragged_decode`.

    No host synchronisation and no allocation on the triton path: safe inside a CUDA graph.

    >>> keys, values = torch.zeros(4, 2), torch.zeros(4, 2)
    >>> start, length, capacity = (torch.tensor([[x]], dtype=torch.int32) for x in (0, 1, 4))
    >>> append(keys, values, start, length, capacity, torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2),
    ...        torch.zeros(1, dtype=torch.int32))
    >>> length.item(), keys[:, 0].tolist()
    (3, [0.0, 1.0, 1.0, 0.0])
    """
    if plan is None or not plan.checked or new_keys.ndim != 4 or new_keys.shape[2] != 1:
        _check(keys, values, start, length, capacity, new_keys, new_values, overflow, new_count)
    heads, tokens, head_dim = new_keys.shape[1:]
    if new_keys.numel() == 0:
        return
    if resolve_backend(backend, keys) == "torch":
        write = append_torch if plan is None else plan.append
        write(keys, values, start, length, capacity, new_keys, new_values, overflow, new_count)
        return
    block_t = 1 if tokens == 1 else 32
    with on_device_of(keys):
        _append_kernel[(length.numel(),)](
            bits(keys),
            bits(values),
            start,
            length,
            capacity,
            bits(new_keys),
            bits(new_values),
            length if new_count is None else new_count,
            overflow,
            *new_keys.stride()[:3],
            *new_values.stride()[:3],
            head_dim,
            heads,
            tokens,
            int(new_count is not None),
            BLOCK_D=block_head_dim(head_dim),
            BLOCK_T=block_t,
            num_warps=1 if block_t == 1 else 4,  # a decode step moves one row: one warp starts fastest
        )


def _check(
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    capacity: torch.Tensor,
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    overflow: torch.Tensor,
    new_count: torch.Tensor | None,
) -> None:
    check_rows("new_keys", new_keys)
    check_rows("new_values", new_values)
    check_same("new_keys and new_values", new_keys, new_values)
    batch, heads, _, head_dim = new_keys.shape
    check_store(keys, values, head_dim, new_keys.dtype)
    for name, tensor in (("start", start), ("length", length), ("capacity", capacity)):
        check_int32(name, tensor, (batch, heads))
    check_int32("overflow", overflow, (1,))
    if new_count is not None:
        check_int32("new_count", new_count, (batch,))
    check_device(keys, values, start, length, capacity, new_keys, new_values, overflow, new_count)


def append_torch(
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
    """The torch form of `append`: same arguments, same effect; on CUDA tensors it synchronises."""
    tokens = new_keys.shape[2]
    count = new_count[:, None].expand_as(length) if new_count is not None else torch.full_like(length, tokens)
    fits = (count <= capacity - length) & (count >= 0) & (count <= tokens)
    first = start.long() + length
    offset = torch.arange(tokens, device=keys.device)
    rows_kept = torch.where(fits, count, 0)
    skip = (tokens - rows_kept)[:, :, None]
    written = offset >= skip
    rows = (first[:, :, None] + offset - skip)[written]
    keys[rows] = new_keys[written]
    values[rows] = new_values[written]
    length += rows_kept
    overflow.masked_fill_(~fits.all(), 1)
