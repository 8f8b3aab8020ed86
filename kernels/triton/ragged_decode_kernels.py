"""The two kernels of `ragged_decode`: attention over equal runs of tiles, and the merge of shared items.

The published code (SparseMM, https://arxiv.org/abs/2506.05344) calls FlashAttention's varlen kernel, one "sequence" a
kv head. Here the work is cut differently: an ITEM is (segment, block of query rows), a TILE is BLOCK_N rows of an item,
and each of a fixed number of programs takes an equal run of consecutive tiles, whatever items they belong to. One
long head then costs its bytes and no more ("Lean Attention", https://arxiv.org/abs/2405.10480), and the grid does not
depend on the lengths, so a CUDA graph replays it. Items cut between programs leave normalised partial outputs with
their log-sum-exp, merged by the second kernel (Flash-Decoding). Short caches need neither: one program an item.

A sink is a column without a value: the piece that holds an item's first tile starts from it, so the merge finds it in
one log-sum-exp. `softcap` and `sinks` that are None are no part of the compiled kernel.
"""

from __future__ import annotations

from sparsemm_lmms.kernels.backend import capped, jit, tl


@jit()
def _item_rows(length, item, items, row_blocks, group, tokens, block_m):
    """How many rows of the segment the last query row of an item sees; 0 behind the last item."""
    last_row = tl.minimum((item % row_blocks + 1) * block_m, group * tokens) - 1
    end = tl.load(length + item // row_blocks, mask=item < items, other=0)
    return tl.where(item < items, tl.maximum(end - tokens + last_row // group + 1, 0), 0)


@jit(do_not_specialize=["q_heads", "kv_heads", "tokens", "items", "row_blocks", "direct", "has_count"])
def _decode_kernel(
    query,
    keys,
    values,
    start,
    length,
    new_count,
    out,
    part_out,
    part_lse,
    query_stride_b,
    query_stride_h,
    query_stride_t,
    scale,
    head_dim,
    q_heads,
    kv_heads,
    tokens,
    items,
    row_blocks,
    direct,
    has_count,
    softcap,
    sinks,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """`scale` and `softcap` include log2(e): the softmax runs on exp2.

    Query rows are ordered token by token, then by head.
    """
    pid = tl.program_id(0)
    group = q_heads // kv_heads
    item = 0
    item_begin = 0  # tiles of all items before `item`
    position = 0
    stop = 0
    if direct != 0:
        item = pid
        stop = 1
    else:
        total = 0
        for first in range(0, items, ITEMS):
            ids = first + tl.arange(0, ITEMS)
            total += tl.sum(tl.cdiv(_item_rows(length, ids, items, row_blocks, group, tokens, BLOCK_M), BLOCK_N))
        programs = tl.minimum(tl.num_programs(0), total)  # nobody gets an empty run: the merge relies on it
        if pid < programs:
            position = (pid.to(tl.int64) * total // programs).to(tl.int32)
            stop = ((pid + 1).to(tl.int64) * total // programs).to(tl.int32)
        before = 0
        for first in range(0, items, ITEMS):
            ids = first + tl.arange(0, ITEMS)
            tiles = tl.cdiv(_item_rows(length, ids, items, row_blocks, group, tokens, BLOCK_M), BLOCK_N)
            ends = before + tl.cumsum(tiles, 0)
            passed = (ends <= position) & (ids < items)
            item += tl.sum(passed.to(tl.int32))
            item_begin = tl.maximum(item_begin, tl.max(tl.where(passed, ends, 0)))
            before += tl.sum(tiles)

    d = tl.arange(0, BLOCK_D)
    while position < stop:
        visible = _item_rows(length, item, items, row_blocks, group, tokens, BLOCK_M)
        tiles = tl.cdiv(visible, BLOCK_N)
        low = position - item_begin
        high = tl.minimum(stop - item_begin, tiles)
        if direct != 0:
            high = tiles
        segment = item // row_blocks
        block = item % row_blocks
        b = (segment // kv_heads).to(tl.int64)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        token = row // group
        head = (segment % kv_heads) * group + row % group
        row_valid = row < group * tokens
        row_mask = row_valid[:, None] & (d < head_dim)[None, :]
        q = tl.load(
            query
            + b * query_stride_b
            + head.to(tl.int64)[:, None] * query_stride_h
            + token.to(tl.int64)[:, None] * query_stride_t
            + d[None, :],
            row_mask,
            other=0.0,
        )
        count = tl.load(new_count + b, mask=has_count != 0, other=tokens)
        limit = tl.load(length + segment) - tokens + token + 1
        limit = tl.where(row_valid & (token >= tokens - count), limit, 0)
        base = tl.load(start + segment).to(tl.int64)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total_p = tl.zeros([BLOCK_M], tl.float32)
        if sinks is not None:
            if low == 0:
                top = tl.load(sinks + head, row_valid, other=float("-inf")).to(tl.float32) * 1.4426950408889634
                total_p += 1.0
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for tile in range(low, high):
            n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            offset = (base + n) * head_dim
            k = tl.load(
                keys + offset[None, :] + d[:, None], (n < visible)[None, :] & (d < head_dim)[:, None], other=0.0
            )
            logits = tl.dot(q, k, input_precision="ieee") * scale
            if softcap is not None:
                logits = capped(logits, softcap)
            logits = tl.where(n[None, :] < limit[:, None], logits, float("-inf"))
            new_top = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
            p = tl.exp2(logits - finite[:, None])
            shrink = tl.exp2(top - finite)
            total_p = total_p * shrink + tl.sum(p, 1)
            v = tl.load(
                values + offset[:, None] + d[None, :], (n < visible)[:, None] & (d < head_dim)[None, :], other=0.0
            )
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            top = new_top
        safe = tl.where(total_p == 0.0, 1.0, total_p)
        acc = acc / safe[:, None]
        if (low == 0) & (high == tiles):
            target = ((b * q_heads + head) * tokens + token) * head_dim
            tl.store(out + target[:, None] + d[None, :], acc.to(out.dtype.element_ty), row_mask)
        else:
            # At most two pieces of a program are incomplete: its first (slot 0), its last if it starts an item (1).
            slot = pid.to(tl.int64) * 2 + (low == 0).to(tl.int64)
            rows = tl.minimum(BLOCK_M, group * tokens)
            local = tl.arange(0, BLOCK_M)
            target = slot * rows + local
            tl.store(part_out + target[:, None] * head_dim + d[None, :], acc, row_mask)
            lse = tl.where(total_p == 0.0, float("-inf"), top + tl.log2(safe))
            tl.store(part_lse + target, lse, row_valid)
        position = item_begin + high
        item_begin += tiles
        item += 1
        if direct != 0:
            position = stop


@jit(do_not_specialize=["q_heads", "kv_heads", "tokens", "items", "row_blocks", "programs", "block_m", "block_n"])
def _merge_kernel(
    length,
    out,
    part_out,
    part_lse,
    head_dim,
    q_heads,
    kv_heads,
    tokens,
    items,
    row_blocks,
    programs,
    block_m,
    block_n,
    BLOCK_D: tl.constexpr,
    ITEMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program an output row: merges the pieces of an item that several programs share, zeroes empty items."""
    item = tl.program_id(0)
    group = q_heads // kv_heads
    before = 0
    total = 0
    for first in range(0, items, ITEMS):
        ids = first + tl.arange(0, ITEMS)
        tiles = tl.cdiv(_item_rows(length, ids, items, row_blocks, group, tokens, block_m), block_n)
        total += tl.sum(tiles)
        before += tl.sum(tl.where(ids < item, tiles, 0))
    own = tl.cdiv(_item_rows(length, item, items, row_blocks, group, tokens, block_m), block_n)
    d = tl.arange(0, BLOCK_D)
    local = tl.program_id(1)
    row = (item % row_blocks) * block_m + local
    segment = item // row_blocks
    head = (segment % kv_heads) * group + row % group
    target = (((segment // kv_heads).to(tl.int64) * q_heads + head) * tokens + row // group) * head_dim + d
    mask = d < tl.where(row < group * tokens, head_dim, 0)

    # Program p starts at tile p * total // programs; solved for the programs that hold this item's ends.
    programs = tl.minimum(programs, total)
    low = 0
    high = 0
    if own > 0:
        low = (((before + 1).to(tl.int64) * programs - 1) // total).to(tl.int32)
        high = (((before + own).to(tl.int64) * programs - 1) // total).to(tl.int32)
    if (high > low) | (own == 0):
        rows = tl.minimum(block_m, group * tokens)
        top = float("-inf")
        weight = 0.0
        acc = tl.zeros([BLOCK_D], tl.float32)
        if own > 0:
            for first in range(low, high + 1, PARTS):
                p = first + tl.arange(0, PARTS)
                part = (p.to(tl.int64) * 2 + (p == low).to(tl.int64)) * rows + local
                lse = tl.load(part_lse + part, p <= high, other=float("-inf"))
                new_top = tl.maximum(top, tl.max(lse, 0))
                finite = tl.where(new_top == float("-inf"), 0.0, new_top)
                w = tl.exp2(lse - finite)
                shrink = tl.exp2(top - finite)
                partial = tl.load(
                    part_out + part[:, None] * head_dim + d[None, :],
                    (p <= high)[:, None] & (d < head_dim)[None, :],
                    other=0.0,
                )
                acc = acc * shrink + tl.sum(w[:, None] * partial, 0)
                weight = weight * shrink + tl.sum(w, 0)
                top = new_top
        acc = acc / tl.where(weight == 0.0, 1.0, weight)
        tl.store(out + target, acc.to(out.dtype.element_ty), mask)
