"""Attention of new tokens over segments of different lengths: the decode step of a cache compressed per head.

Kernels and their layout of work: `ragged_decode_kernels`. This file has the checks, the launch and the plain reference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from sparsemm_lmms.kernels.backend import (
    DecodePlan,
    block_head_dim,
    check_device,
    check_int32,
    check_logits,
    check_rows,
    check_store,
    multiprocessors,
    on_device_of,
    resolve_backend,
)
from sparsemm_lmms.kernels.ragged_decode_kernels import _decode_kernel, _merge_kernel

LOG2E = 1.4426950408889634
PROGRAMS_PER_SM = 2  # 96 KiB of pipelined tiles each: two fill the shared memory of an H100
DIRECT_LENGTH = 1024  # up to here one program an item is done before a second launch would have started
MAX_ITEMS = 4096  # every program sums the tiles of all items: beyond this the sum costs more than the balance saves
ITEMS = 256  # items summed at once
MERGE_PARTS = 16  # partial outputs merged at once


class Launch(NamedTuple):
    """How a call is cut into programs; fixed by shapes, `max_length` and the device, never by the lengths."""

    block_m: int
    block_n: int
    block_d: int
    row_blocks: int
    items: int
    programs: int
    direct: bool


def launch(segments: int, rows: int, head_dim: int, itemsize: int, max_length: int, sms: int) -> Launch:
    """Blocks and grid of `_decode_kernel` for `rows` = G x t query rows a segment.

    BLOCK_M is 16, the least that tensor cores take; 64 and twice the warps for more rows, but not in float32, which
    has no tensor cores and would spill; it takes twice the warps already for 16 (four spill on sm_80). BLOCK_N makes a
    tile of keys 16 KiB (at most 128 rows): the pipelined tiles are 64 to 96 KiB a program. One program an item, and no
    merge, when `max_length` is at most DIRECT_LENGTH, when there are more items than MAX_ITEMS, or when long prompts
    are appended (several row blocks an item) and the items alone fill the device; else PROGRAMS_PER_SM equal runs of
    tiles for each SM.

    >>> launch(segments=32, rows=1, head_dim=128, itemsize=2, max_length=300, sms=132).direct
    True
    >>> launch(segments=256, rows=1, head_dim=128, itemsize=2, max_length=30000, sms=132).programs
    264
    """
    block_m = 16 if rows <= 16 or itemsize == 4 else 64
    block_d = block_head_dim(head_dim)
    block_n = max(16, min(128, 16384 // (block_d * itemsize)))
    row_blocks = -(-rows // block_m)
    items = segments * row_blocks
    programs = min(PROGRAMS_PER_SM * sms, items * -(-max_length // block_n))
    direct = max_length <= DIRECT_LENGTH or items > MAX_ITEMS or (row_blocks > 1 and items >= programs)
    return Launch(block_m, block_n, block_d, row_blocks, items, items if direct else programs, direct)


def ragged_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    new_count: torch.Tensor | None = None,
    max_length: int | None = None,
    plan: DecodePlan | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Softmax attention of t new tokens over their kv head's segment, `[batch, q_heads, t, head_dim]` in query's dtype.

    The new tokens are already appended: with `end = length[b, h // G]`, query token i sees the first `end - t + i + 1`
    rows of the segment. Rows that see nothing are 0. With z = q.k * scaling of the rows it sees, all in float32,

        z = softcap * tanh(z / softcap)                          (Gemma 2, https://arxiv.org/abs/2408.00118)
        weights = exp(z) / (sum of exp(z) + exp(sinks[head]))    (GPT-OSS, https://arxiv.org/abs/2508.10925)

    Args:
        query: `[batch, q_heads, t, head_dim]`, any strides but a contiguous last dimension; head h reads kv head
            h // G with G = q_heads / kv_heads.
        keys, values: `[slots, head_dim]`, contiguous, query's dtype; the store. Rows behind `length` are never read.
        start, length: int32 `[batch, kv_heads]`, rows.
        scaling: factor of the logits, usually head_dim ** -0.5.
        softcap: bound of the logits; None: they have none.
        sinks: `[q_heads]`, contiguous, any float dtype: a logit without a value; None: no sinks.
        new_count: int32 `[batch]`: the new tokens are LEFT padded, only the last `new_count[b]` were appended; the
            rows of the others are 0.
        max_length: an upper bound of `length` known on the host. It only picks the launch (see `launch`), which a CUDA
            graph then replays; beyond it the triton form gets slow, the torch form on CUDA wrong. None: the rows of
            the store (triton), or the true maximum (torch; on CUDA that synchronises).
        plan: of this store (see `sparsemm_lmms.cpu_kernels.decode_plan`): it computes where triton does not run, and
            spares decode steps the checks of the arguments, which would take 6 % of one of the tiny preset on a CPU.
            None: every call is checked, and the plain reference computes.

    Raises:
        ValueError: for shapes, dtypes, strides or devices other than these, or a softcap that is not positive.

    >>> store = torch.tensor([[0.0], [2.0], [4.0]])
    >>> start, length = torch.tensor([[1]], dtype=torch.int32), torch.tensor([[2]], dtype=torch.int32)
    >>> ragged_decode(torch.zeros(1, 1, 1, 1), store, store, start, length, scaling=1.0)
    tensor([[[[3.]]]])
    """
    one_token = query.ndim == 4 and query.shape[2] == 1
    if plan is None or not plan.checked or not one_token:
        _check(query, keys, values, start, length, new_count, max_length, softcap, sinks)
    if plan is not None:
        plan.checked = one_token
    if query.numel() == 0 or keys.shape[0] == 0 or max_length == 0:
        return query.new_zeros(query.shape)
    if resolve_backend(backend, query) == "torch":
        decode = ragged_decode_torch if plan is None else plan.decode
        return decode(query, keys, values, start, length, scaling, new_count, max_length, softcap, sinks)
    longest = keys.shape[0] if max_length is None else min(max_length, keys.shape[0])
    return _ragged_decode_triton(query, keys, values, start, length, scaling, new_count, longest, softcap, sinks)


def _check(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    new_count: torch.Tensor | None,
    max_length: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> None:
    check_rows("query", query)
    batch, q_heads, _, head_dim = query.shape
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
    check_logits(softcap, sinks, ((q_heads,),))
    check_device(query, keys, values, start, length, new_count, sinks)


def _ragged_decode_triton(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    new_count: torch.Tensor | None,
    max_length: int,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, q_heads, tokens, head_dim = query.shape
    kv_heads = start.shape[1]
    rows = q_heads // kv_heads * tokens
    sms = multiprocessors(query.device)
    cut = launch(batch * kv_heads, rows, head_dim, query.element_size(), max_length, sms)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    rows_kept = min(rows, cut.block_m)
    parts = 0 if cut.direct else 2 * cut.programs * rows_kept
    part_out = torch.empty(parts * head_dim, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(parts, dtype=torch.float32, device=query.device)
    sizes = (head_dim, q_heads, kv_heads, tokens, cut.items, cut.row_blocks)
    with on_device_of(query):
        _decode_kernel[(cut.programs,)](
            query,
            keys,
            values,
            start,
            length,
            length if new_count is None else new_count,
            out,
            part_out,
            part_lse,
            *query.stride()[:3],
            scaling * LOG2E,
            *sizes,
            int(cut.direct),
            int(new_count is not None),
            softcap=None if softcap is None else softcap * LOG2E,
            sinks=sinks,
            BLOCK_D=cut.block_d,
            BLOCK_M=cut.block_m,
            BLOCK_N=cut.block_n,
            ITEMS=ITEMS,
            num_warps=4 if cut.block_m == 16 and query.element_size() == 2 else 8,
            num_stages=3,
        )
        if not cut.direct:
            _merge_kernel[(cut.items, rows_kept)](
                length,
                out,
                part_out,
                part_lse,
                *sizes,
                cut.programs,
                cut.block_m,
                cut.block_n,
                BLOCK_D=cut.block_d,
                ITEMS=ITEMS,
                PARTS=MERGE_PARTS,
                num_warps=4,
            )
    return out


def ragged_decode_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    new_count: torch.Tensor | None = None,
    max_length: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The torch form of `ragged_decode`: all segments padded to the longest, then torch's attention."""
    kv_heads, tokens = start.shape[1], query.shape[2]
    longest = max_length if query.is_cuda and max_length is not None else int(length.max())
    if longest <= 0:
        return query.new_zeros(query.shape)
    key, value = gather(keys, values, start.flatten().long(), length.flatten().long(), longest)
    rows, own = rows_of_segments(query, kv_heads, sinks)
    return attend(rows, key, value, visible(length, tokens, new_count), scaling, softcap, own).view(query.shape)


def rows_of_segments(
    query: torch.Tensor, kv_heads: int, sinks: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Queries `[segments, 1, G * t, head_dim]`, since the G x t rows of a kv head share its keys, and their sinks."""
    batch, _, tokens, head_dim = query.shape
    if sinks is not None:
        sinks = sinks.view(1, kv_heads, -1, 1).expand(batch, -1, -1, tokens).reshape(batch * kv_heads, 1, -1, 1)
    return query.reshape(batch * kv_heads, 1, -1, head_dim), sinks


def visible(length: torch.Tensor, tokens: int, new_count: torch.Tensor | None) -> torch.Tensor:
    """How many rows of its segment each new token sees: int64 `[segments, tokens]`, 0 for padding."""
    token = torch.arange(tokens, device=length.device)
    limit = length.flatten().long()[:, None] - tokens + 1 + token
    if new_count is not None:
        padding = token < tokens - new_count[:, None]
        limit = limit.masked_fill(padding.repeat_interleave(length.shape[1], 0), 0)
    return limit


def gather(
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


def attend(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    limit: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """rows `[segments, 1, G * t, d]` over the first `limit[segment, i]` columns each; None: over all."""
    if limit is None:
        return attention(rows, key, value, None, scaling, softcap, sinks)
    group = rows.shape[2] // limit.shape[1]
    limit = limit.repeat(1, group)[:, None, :, None]
    seen = torch.arange(key.shape[2], device=key.device) < limit
    out = attention(rows, key, value, seen, scaling, softcap, sinks)
    return torch.where(limit > 0, out, 0)  # a row without columns is NaN or 0, depending on the kernel torch picks


def attention(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """torch's attention where it can; it knows neither soft caps nor sinks (`[..., rows, 1]`)."""
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(rows, key, value, attn_mask=seen, scale=scaling)
    logits = rows.float() @ key.float().transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if seen is not None:
        logits = logits.masked_fill(~seen, float("-inf"))
    total = logits.logsumexp(-1, keepdim=True)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.float())
    weights = (logits - total.masked_fill(total == float("-inf"), 0)).exp()  # rows that see nothing: 0, not NaN
    return (weights @ value.float()).to(rows.dtype)
