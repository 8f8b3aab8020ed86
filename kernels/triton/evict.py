"""Copy the kept rows of a full K/V into the ragged store: eviction is compaction, one launch for all heads.

The published implementation (SparseMM, https://arxiv.org/abs/2506.05344) gathers head by head in a Python loop and
concatenates; here every (sequence, head, block of kept rows) is one program of a single launch.
"""

from __future__ import annotations

import torch

from sparsemm_lmms.kernels.backend import (
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
    triton,
)

BLOCK_M = 32  # rows a program copies: 8 KiB of K at head_dim 128 in 16 bit, and little waste on short segments


@jit(do_not_specialize=["heads", "n", "m", "slots"])
def _evict_kernel(
    key,
    value,
    index,
    count,
    start,
    out_keys,
    out_values,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    head_dim,
    heads,
    n,
    m,
    slots,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    segment = tl.program_id(0)
    kept = tl.minimum(tl.load(count + segment), m)
    begin = tl.program_id(1) * BLOCK_M
    if begin < kept:  # heads keep different numbers of rows: the grid covers the longest, the others leave here
        b = (segment // heads).to(tl.int64)
        h = (segment % heads).to(tl.int64)
        j = begin + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        source = tl.load(index + segment.to(tl.int64) * m + j, mask=j < kept, other=-1).to(tl.int64)
        row = tl.load(start + segment).to(tl.int64) + j
        # A row that does not exist is neither read nor written: a wrong index must not reach foreign memory.
        valid = (source >= 0) & (source < n) & (row >= 0) & (row < slots)
        mask = valid[:, None] & (d < head_dim)[None, :]
        source = source[:, None]
        target = row[:, None] * head_dim + d[None, :]
        rows = tl.load(key + b * key_stride_b + h * key_stride_h + source * key_stride_n + d[None, :], mask, other=0)
        tl.store(out_keys + target, rows, mask)
        rows = tl.load(
            value + b * value_stride_b + h * value_stride_h + source * value_stride_n + d[None, :], mask, other=0
        )
        tl.store(out_values + target, rows, mask)


def evict(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    start: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Write rows `index[b, h, :count[b, h]]` of key and value to rows `start[b, h] ...` of the store.

    Args:
        key, value: `[batch, kv_heads, n, head_dim]`, any strides but a contiguous last dimension.
        index: int32 `[batch, kv_heads, m]`, positions in 0..n-1; only the first `count[b, h]` are read.
        count: int32 `[batch, kv_heads]`, at most m.
        start: int32 `[batch, kv_heads]`, first row of each segment; segments must not overlap.
        out_keys, out_values: `[slots, head_dim]`, contiguous, key's dtype; the store, written.

    No host synchronisation on the triton path.

    >>> key = torch.arange(4.0).view(1, 1, 4, 1).expand(1, 1, 4, 2).contiguous()
    >>> store = torch.zeros(3, 2), torch.zeros(3, 2)
    >>> index, two, one = (torch.tensor(x, dtype=torch.int32) for x in ([[[1, 3]]], [[2]], [[1]]))
    >>> evict(key, key, index, two, one, *store)
    >>> store[0][:, 0].tolist()
    [0.0, 1.0, 3.0]
    """
    check_rows("key", key)
    check_rows("value", value)
    check_same("key and value", key, value)
    batch, heads, n, head_dim = key.shape
    check_store(out_keys, out_values, head_dim, key.dtype)
    if index.ndim != 3:
        raise ValueError(f"index must have shape [batch, kv_heads, m], got {tuple(index.shape)}")
    check_int32("index", index, (batch, heads, index.shape[2]))
    check_int32("count", count, (batch, heads))
    check_int32("start", start, (batch, heads))
    check_device(key, value, index, count, start, out_keys, out_values)
    m = index.shape[2]
    if batch * heads * m == 0:
        return
    if resolve_backend(backend, key) == "torch":
        evict_torch(key, value, index, count, start, out_keys, out_values)
        return
    with on_device_of(key):
        _evict_kernel[(batch * heads, triton.cdiv(m, BLOCK_M))](
            bits(key),
            bits(value),
            index,
            count,
            start,
            bits(out_keys),
            bits(out_values),
            *key.stride()[:3],
            *value.stride()[:3],
            head_dim,
            heads,
            n,
            m,
            out_keys.shape[0],
            BLOCK_D=block_head_dim(head_dim),
            BLOCK_M=BLOCK_M,
            num_warps=4,
        )


def evict_torch(
    key: torch.Tensor,
    value: torch.Tensor,
    index: torch.Tensor,
    count: torch.Tensor,
    start: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """The torch form of `evict`: same arguments, same effect; raises on positions outside the input."""
    heads, m = index.shape[1:]
    counts = count.flatten().clamp(max=m).long()
    segment = torch.repeat_interleave(counts)  # one entry a kept row, from here on
    j = torch.arange(len(segment), device=key.device) - (counts.cumsum(0) - counts)[segment]
    source = index.flatten().index_select(0, segment * m + j).long()
    if source.numel() and (int(source.min()) < 0 or int(source.max()) >= key.shape[2]):
        raise IndexError(f"index holds positions outside 0..{key.shape[2] - 1}")
    target = start.flatten().long().index_select(0, segment) + j
    b = segment // heads
    h = segment - b * heads
    for full, out in ((key, out_keys), (value, out_values)):
        out.index_copy_(0, target, _rows(full, b, h, source))


def _rows(full: torch.Tensor, b: torch.Tensor, h: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """`full[b, h, position]`, through one index of whole rows where the strides allow it (five times faster)."""
    dim = full.shape[-1]
    if any(stride % dim for stride in full.stride()[:3]):
        return full[b, h, position]
    step_b, step_h, step_n = (stride // dim for stride in full.stride()[:3])
    last = sum((size - 1) * step for size, step in zip(full.shape[:3], (step_b, step_h, step_n), strict=True))
    rows = full.as_strided((last + 1, dim), (dim, 1))
    return rows.index_select(0, b * step_b + h * step_h + position * step_n)
