"""Attention of new tokens over segments of different lengths: the decode step of a cache compressed per head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import check_device, check_int32, check_rows, check_store, resolve_backend


def ragged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    *,
    scaling: float,
    new_count: torch.Tensor | None = None,
    max_length: int | None = None,
    uniform_stride: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of t new tokens over their kv head's segment, `[batch, q_heads, t, head_dim]` in query's dtype.

    The new tokens are already appended: with `end = length[b, h // G]`, query token i sees the first `end - t + i + 1`
    rows of the segment. Rows that see nothing are 0.

    Args:
        query: `[batch, q_heads, t, head_dim]`, any strides but a contiguous last dimension; head h reads kv head
            h // G with G = q_heads / kv_heads.
        keys, values: `[slots, head_dim]`, contiguous, query's dtype; the store. Rows behind `length` are never read.
        start, length: int32 `[batch, kv_heads]`, rows.
        scaling: factor of the logits, usually head_dim ** -0.5.
        new_count: int32 `[batch]`: the new tokens are LEFT padded, only the last `new_count[b]` were appended; the
            rows of the others are 0.
        max_length: an upper bound of `length` known on the host. It fixes the launch, so a CUDA graph replays while
            the lengths stay below it; a length above it gives a wrong result. None: the rows of the store (triton), or
            the true maximum (torch; on CUDA that synchronises).
        uniform_stride: a promise that segment (b, h) starts `uniform_stride` rows behind the previous one. The torch
            form then reads equally long segments in place, without gathering them; triton has no use for it.

    >>> store = torch.tensor([[0.0], [2.0], [4.0]])
    >>> start, length = torch.tensor([[1]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    >>> ragged_decode(torch.zeros(1, 1, 1, 1), store, store, start, length, scaling=1.0)
    tensor([[[[3.]]]])
    """
    check_rows("query", query)
    batch, q_heads, tokens, head_dim = query.shape
    check_store(keys, values, head_dim, query.dtype)
    if start.ndim != 2:
        raise ValueError(f"start must have shape [batch, kv_heads], got {tuple(start.shape)}")
    kv_heads = start.shape[1]
    check_int32("start", start, (batch, kv_heads))
    check_int32("length", length, (batch, kv_heads))
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are no multiple of {kv_heads} kv heads")
    if new_count is not None:
        check_int32("new_count", new_count, (batch,))
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}")
    if uniform_stride is not None and uniform_stride < 1:
        raise ValueError(f"uniform_stride must be positive, got {uniform_stride}")
    check_device(query, keys, values, start, length, new_count)
    if query.numel() == 0 or keys.shape[0] == 0 or max_length == 0:
        return query.new_zeros(query.shape)
    resolve_backend(backend, query)
    return ragged_decode_torch(query, keys, values, start, length, scaling, new_count, max_length, uniform_stride)


def ragged_decode_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    new_count: torch.Tensor | None = None,
    max_length: int | None = None,
    uniform_stride: int | None = None,
) -> torch.Tensor:
    """The torch form of `ragged_decode`: segments gathered to a padded batch, then torch's attention.

    On a CPU the lengths are at hand, so equal segments laid out regularly are read in place, and segments of very
    different lengths are padded in groups (each within a factor of two) rather than all to the longest.
    """
    batch, q_heads, tokens, head_dim = query.shape
    kv_heads = start.shape[1]
    segments = batch * kv_heads
    rows = query.reshape(segments, 1, -1, head_dim)  # the G x t rows of a kv head share its keys
    flat_start, flat_length = start.flatten().long(), length.flatten().long()
    limit = flat_length[:, None] - tokens + 1 + torch.arange(tokens, device=query.device)
    if new_count is not None:
        padding = torch.arange(tokens, device=query.device) < tokens - new_count[:, None]
        limit = limit.masked_fill(padding.repeat_interleave(kv_heads, 0), 0)

    if query.is_cuda:
        longest = shortest = int(length.max()) if max_length is None else max_length
        even = False
    else:
        shortest, longest = (int(x) for x in flat_length.aminmax())
        even = shortest == longest
    if longest <= 0:
        return query.new_zeros(query.shape)
    if even and uniform_stride is not None:
        size, stride = (segments, 1, longest, head_dim), (uniform_stride * head_dim, head_dim, head_dim, 1)
        offset = int(flat_start[0]) * head_dim
        key, value = (x.as_strided(size, stride, x.storage_offset() + offset) for x in (keys, values))
        causal = tokens > 1 or new_count is not None
        out = _attend(rows, key, value, limit if causal else None, scaling)
    elif even or query.is_cuda or segments * longest <= 2 * int(flat_length.sum()):
        key, value = _gather(keys, values, flat_start, flat_length, longest)
        out = _attend(rows, key, value, limit, scaling)
    else:
        out = torch.zeros_like(rows)
        group = (longest / flat_length.clamp(min=1)).log2().floor().clamp(max=6)
        for number in group.unique().tolist():  # at most seven groups, whatever the number of heads
            members = (group == number).nonzero().squeeze(1)
            lengths = flat_length[members]
            key, value = _gather(keys, values, flat_start[members], lengths, max(int(lengths.max()), 1))
            out[members] = _attend(rows[members], key, value, limit[members], scaling)
    return out.view(query.shape)


def _gather(
    keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, length: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments padded to `[segments, 1, longest, head_dim]`.

    The padding repeats each segment's last valid row: rows behind it may hold NaN, and 0 * NaN would reach the output.
    """
    j = torch.arange(longest, device=keys.device)
    index = start[:, None] + torch.minimum(j, (length - 1).clamp(min=0)[:, None])
    index = index.clamp_(0, keys.shape[0] - 1).flatten()
    key, value = (x.index_select(0, index).view(len(start), 1, longest, -1) for x in (keys, values))
    return key, value


def _attend(
    rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, limit: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """rows `[segments, 1, G * t, d]` over the first `limit[segment, i]` columns each; None: over all."""
    if limit is None:
        return F.scaled_dot_product_attention(rows, key, value, scale=scaling)
    group = rows.shape[2] // limit.shape[1]
    limit = limit.repeat(1, group)[:, None, :, None]
    seen = torch.arange(key.shape[2], device=key.device) < limit
    out = F.scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scaling)
    return torch.where(limit > 0, out, 0)  # a row without columns is NaN or 0, depending on the kernel torch picks
