"""Attention over segments of different lengths on a CPU: lengths are at hand, and each operator costs its call.

Equal segments laid out regularly are read in place. A small store of one sequence is read as it is, every head over
all rows. Short segments are padded to the longest. Segments of very different lengths are padded in groups, each within
a factor of two. The attention itself is that of the reference.
"""

from __future__ import annotations

import torch

from sparsemm_lmms.kernels.ragged_decode import attend, attention, gather, rows_of_segments, visible

FEW = 2**17  # numbers in padded keys that a CPU reads sooner than it sorts segments into groups
WHOLE = 2**19  # products of all queries with all keys of a store that a CPU forms sooner than it copies segments


def uniform_stride(start: torch.Tensor, capacity: torch.Tensor) -> int | None:
    """Rows from one segment's start to the next, if the segments `[batch, kv_heads]` are alike and evenly laid out."""
    first, room = start.flatten(), int(capacity[0, 0])
    if bool((capacity != room).any()):
        return None
    steps = first.diff()
    if not len(steps):
        return room
    return int(steps[0]) if int(steps[0]) > 0 and bool((steps == steps[0]).all()) else None


def whole_store_places(
    start: torch.Tensor, capacity: torch.Tensor, slots: int, q_heads: int, head_dim: int
) -> torch.Tensor | None:
    """For `whole_store`: int32 `[kv_heads, slots]`, each row's place in each segment, or a number no length reaches.

    None for several sequences, and for a store so large that masked products of all heads with all rows (WHOLE) cost
    more than copies of the segments.
    """
    if start.shape[0] > 1 or q_heads * slots * head_dim > WHOLE:
        return None
    place = torch.arange(slots, dtype=torch.int32) - start.view(-1, 1)
    return place.masked_fill_((place < 0) | (place >= capacity.view(-1, 1)), torch.iinfo(torch.int32).max)


def whole_store(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """A decode step of one sequence: every head over all rows of the store, of which it sees its own segment.

    All rows must be finite, those outside of segments too.
    """
    heads, seen = query.shape[1], places < length.view(-1, 1)
    if heads > len(seen):
        seen = seen.repeat_interleave(heads // len(seen), 0)
    rows, key, value = query.reshape(1, 1, heads, -1), keys.view(1, 1, *keys.shape), values.view(1, 1, *values.shape)
    own = None if sinks is None else sinks.view(1, 1, heads, 1)
    return attention(rows, key, value, seen, scaling, softcap, own).view(query.shape)


def decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    scaling: float,
    new_count: torch.Tensor | None,
    stride: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`ragged_decode_torch` with as few copies and operators as the lengths and the `stride` allow."""
    kv_heads, tokens, head_dim = start.shape[1], *query.shape[2:]
    shortest, longest = (int(x) for x in length.aminmax())
    if longest <= 0:
        return query.new_zeros(query.shape)
    even, segments = shortest == longest, length.numel()
    few = segments * longest * head_dim <= FEW
    rows, own = rows_of_segments(query, kv_heads, sinks)
    if tokens == 1 and new_count is None and shortest > 0 and few and not (even and stride is not None):
        return _one_token(rows, keys, values, start, length, longest, scaling, softcap, own).view(query.shape)
    # Without a limit every new token sees all of its segment.
    limit = None if even and tokens == 1 and new_count is None else visible(length, tokens, new_count)
    if even and stride is not None:
        key, value = _in_place(keys, values, start, segments, longest, stride)
        return attend(rows, key, value, limit, scaling, softcap, own).view(query.shape)
    first, count = start.flatten().long(), length.flatten().long()
    if even or few or segments * longest <= 2 * int(length.sum()):
        key, value = gather(keys, values, first, count, longest)
        return attend(rows, key, value, limit, scaling, softcap, own).view(query.shape)
    out = torch.zeros_like(rows)
    group = (longest / count.clamp(min=1)).log2().floor().clamp(max=6)
    for number in group.unique().tolist():  # at most seven groups, whatever the number of heads
        members = (group == number).nonzero().squeeze(1)
        key, value = gather(keys, values, first[members], count[members], max(int(count[members].max()), 1))
        seen = None if limit is None else limit[members]
        sink = None if own is None else own[members]
        out[members] = attend(rows[members], key, value, seen, scaling, softcap, sink)
    return out.view(query.shape)


def _one_token(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    start: torch.Tensor,
    length: torch.Tensor,
    longest: int,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """One token over short segments, none empty. The padding repeats a segment's first row (see `gather`)."""
    j = torch.arange(longest, dtype=start.dtype)
    first = start.view(-1, 1)
    seen = j < length.view(-1, 1)
    index = torch.where(seen, first + j, first).view(-1)
    size = (len(rows), 1, longest, -1)
    key, value = keys.index_select(0, index).view(size), values.index_select(0, index).view(size)
    return attention(rows, key, value, seen[:, None, None], scaling, softcap, sinks)


def _in_place(
    keys: torch.Tensor, values: torch.Tensor, start: torch.Tensor, segments: int, longest: int, stride: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Segments that start `stride` rows apart, as views `[segments, 1, longest, head_dim]`."""
    dim = keys.shape[1]
    size, steps, offset = (segments, 1, longest, dim), (stride * dim, dim, dim, 1), int(start[0, 0]) * dim
    return (
        keys.as_strided(size, steps, keys.storage_offset() + offset),
        values.as_strided(size, steps, values.storage_offset() + offset),
    )
