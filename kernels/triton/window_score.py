"""How much attention the last tokens of a prompt pay to each earlier position, per kv head.

The observation-window score of SnapKV (https://arxiv.org/abs/2404.14469), used alike by PyramidKV, AdaKV and SparseMM.
With n tokens, a window of the last W queries and G query heads per kv head:

    p = softmax(q k^T * scaling) over all n columns, causal inside the window, in float32
    s = mean or max over the G heads of (mean over the W rows of p[..., :n - W])
    score = avgpool or maxpool of s, stride 1, padding kernel_size // 2

Where a model caps its logits z = q k^T * scaling, z becomes softcap * tanh(z / softcap); where its heads have a sink,
p = exp(z) / (sum of exp(z) + exp(sink)), so a row of p adds up to less than 1 (see `ragged_decode`).

avgpool pads with zeros and always divides by kernel_size; maxpool pads with -inf. Deviation: the published code casts p
back to the dtype of q before the means; scores stay float32 here, which breaks the many ties that bfloat16 scores have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sparsemm_lmms.kernels.backend import (
    block_head_dim,
    capped,
    check_device,
    check_int32,
    check_logits,
    check_rows,
    jit,
    multiprocessors,
    on_device_of,
    resolve_backend,
    tl,
    triton,
)

POOLINGS = ("avgpool", "maxpool")
GQA_FUNCS = ("mean", "max")
MAX_SPLITS = 32  # partial statistics a row; every program of the second pass reads them all, on registers
BLOCK_P = 1024  # positions a program pools


@jit(do_not_specialize=["q_heads", "group", "window", "n", "chunk", "splits"])
def _statistics_kernel(
    query,
    key,
    pad,
    partial,
    query_stride_b,
    query_stride_h,
    query_stride_w,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    scaling,
    head_dim,
    q_heads,
    group,
    window,
    n,
    chunk,
    splits,
    softcap,
    sinks,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Log-sum-exp of a block of rows over one chunk of columns -> partial `[batch * q_heads, window, splits]`.

    The first chunk's holds the sink as well.
    """
    split = tl.program_id(0)
    b = (tl.program_id(1) // q_heads).to(tl.int64)
    head = tl.program_id(1) % q_heads
    w = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    d = tl.arange(0, BLOCK_D)
    query += b * query_stride_b + head.to(tl.int64) * query_stride_h
    key += b * key_stride_b + (head // group).to(tl.int64) * key_stride_h
    q = tl.load(
        query + w.to(tl.int64)[:, None] * query_stride_w + d[None, :],
        (w < window)[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    hidden = tl.load(pad + b)
    begin = split * chunk
    end = tl.minimum(begin + chunk, n)
    begin = tl.maximum(begin, hidden // BLOCK_N * BLOCK_N)

    top = tl.full([BLOCK_W], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_W], tl.float32)
    if sinks is not None:
        if split == 0:
            top = tl.zeros([BLOCK_W], tl.float32) + tl.load(sinks + tl.program_id(1)).to(tl.float32)
            total += 1.0
    for first in range(begin, end, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        k = tl.load(
            key + column.to(tl.int64)[None, :] * key_stride_n + d[:, None],
            (column < end)[None, :] & (d < head_dim)[:, None],
            other=0.0,
        )
        # "ieee": float32 inputs would go through tf32 otherwise, whose 10 bits reorder close scores.
        logits = tl.dot(q, k, input_precision="ieee") * scaling
        if softcap is not None:
            logits = capped(logits, softcap)
        seen = (column >= hidden) & (column < end)
        causal = column[None, :] <= (n - window + w)[:, None]
        logits = tl.where(seen[None, :] & causal, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf would be NaN
        total = total * tl.exp(top - finite) + tl.sum(tl.exp(logits - finite[:, None]), 1)
        top = new_top
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    row = tl.program_id(1).to(tl.int64) * window + w
    tl.store(partial + row * splits + split, lse, mask=w < window)


@jit(do_not_specialize=["kv_heads", "group", "window", "n", "splits", "use_max"])
def _mean_kernel(
    query,
    key,
    partial,
    mean,
    query_stride_b,
    query_stride_h,
    query_stride_w,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    scaling,
    head_dim,
    kv_heads,
    group,
    window,
    n,
    splits,
    use_max,
    softcap,
    BLOCK_D: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Column means of one tile of keys over all rows of its query heads -> mean `[batch * kv_heads, n - window]`.

    The tile is read once for all heads; the probabilities live in registers only. All columns are before the window,
    so no causal mask is needed; those of the padding come out wrong, and `_pool_kernel` does not read them.
    """
    length = n - window
    b = (tl.program_id(1) // kv_heads).to(tl.int64)
    h = (tl.program_id(1) % kv_heads).to(tl.int64)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, MAX_SPLITS)
    k = tl.load(
        key + b * key_stride_b + h * key_stride_h + column.to(tl.int64)[None, :] * key_stride_n + d[:, None],
        (column < length)[None, :] & (d < head_dim)[:, None],
        other=0.0,
    )
    result = tl.zeros([BLOCK_N], tl.float32)
    for g in range(0, group):
        head = h * group + g
        column_sum = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, window, BLOCK_W):
            w = first + tl.arange(0, BLOCK_W)
            row = (b * kv_heads * group + head) * window + w
            parts = tl.load(
                partial + row[:, None] * splits + s[None, :],
                (w < window)[:, None] & (s < splits)[None, :],
                other=float("-inf"),
            )
            top = tl.max(parts, 1)
            finite = tl.where(top == float("-inf"), 0.0, top)
            total = tl.sum(tl.exp(parts - finite[:, None]), 1)
            # Rows without columns (padding, or behind the window): +inf makes their probabilities 0.
            lse = tl.where(total == 0.0, float("inf"), finite + tl.log(tl.where(total == 0.0, 1.0, total)))
            q = tl.load(
                query
                + b * query_stride_b
                + head * query_stride_h
                + w.to(tl.int64)[:, None] * query_stride_w
                + d[None, :],
                (w < window)[:, None] & (d < head_dim)[None, :],
                other=0.0,
            )
            logits = tl.dot(q, k, input_precision="ieee") * scaling
            if softcap is not None:
                logits = capped(logits, softcap)
            column_sum += tl.sum(tl.exp(logits - lse[:, None]), 0)
        column_sum = column_sum / window
        result = tl.where(use_max != 0, tl.maximum(result, column_sum), result + column_sum / group)
    out = mean + tl.program_id(1).to(tl.int64) * length + column
    tl.store(out, result, mask=column < length)


@jit(do_not_specialize=["kv_heads", "positions", "kernel_size", "use_max"])
def _pool_kernel(mean, pad, out, kv_heads, positions, kernel_size, use_max, BLOCK_P: tl.constexpr):
    """Pooling along the positions; padding columns act as the edge of the sequence does."""
    segment = tl.program_id(1)
    position = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    hidden = tl.load(pad + segment // kv_heads)
    base = segment.to(tl.int64) * positions
    total = tl.zeros([BLOCK_P], tl.float32)
    top = tl.full([BLOCK_P], float("-inf"), tl.float32)
    for offset in range(0, kernel_size):
        source = position + offset - kernel_size // 2
        inside = (source >= hidden) & (source < positions)
        total += tl.load(mean + base + source, inside, other=0.0)
        top = tl.maximum(top, tl.load(mean + base + source, inside, other=float("-inf")))
    result = tl.where(use_max != 0, top, total / kernel_size)
    result = tl.where(position >= hidden, result, float("-inf"))
    tl.store(out + base + position, result, mask=position < positions)


def window_score(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kernel_size: int = 5,
    pooling: str = "avgpool",
    gqa_func: str = "mean",
    pad: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Pooled window scores, float32 `[batch, kv_heads, n - W]`.

    Args:
        query: `[batch, q_heads, W, head_dim]`, the last W queries after RoPE; any strides but a contiguous last
            dimension, as for `key`.
        key: `[batch, kv_heads, n, head_dim]`, all keys after RoPE; query head h belongs to kv head h // G.
        scaling: factor of the logits, usually head_dim ** -0.5.
        softcap: bound of the logits; None: they have none.
        sinks: `[q_heads]` or `[batch, q_heads]`, contiguous, any float dtype: the sink of each query head; None: no
            sinks.
        kernel_size: odd width of the pooling; 1 leaves the scores as they are.
        pooling: `"avgpool"` or `"maxpool"`.
        gqa_func: `"mean"` or `"max"` over the G query heads of a kv head, before the pooling.
        pad: int32 `[batch]`, number of left-padding columns of each sequence. They get no attention, act on the
            pooling exactly as the edge of the sequence does, and score -inf. Sequences with n - pad <= W should be
            kept whole by the caller: their scores are free of NaN and mean nothing.

    Raises:
        ValueError: for shapes, dtypes, strides or devices other than these, or settings out of their range.

    >>> window_score(torch.zeros(1, 2, 1, 4), torch.zeros(1, 1, 4, 4), scaling=0.5, kernel_size=1)
    tensor([[[0.2500, 0.2500, 0.2500]]])
    """
    check_rows("query", query)
    check_rows("key", key)
    batch, q_heads, window, head_dim = query.shape
    kv_heads, n = key.shape[1:3]
    if key.shape[0] != batch or key.shape[3] != head_dim or key.dtype != query.dtype:
        raise ValueError(
            f"query {tuple(query.shape)} {query.dtype} and key {tuple(key.shape)} {key.dtype} "
            "must agree in batch, head_dim and dtype"
        )
    if kv_heads == 0 or q_heads % kv_heads:
        raise ValueError(f"{q_heads} query heads are no multiple of {kv_heads} kv heads")
    if not 1 <= window <= n:
        raise ValueError(f"the window of {window} queries must have between 1 and n={n} rows")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}; got {pooling!r}")
    if gqa_func not in GQA_FUNCS:
        raise ValueError(f"gqa_func must be one of {', '.join(GQA_FUNCS)}; got {gqa_func!r}")
    if pad is not None:
        check_int32("pad", pad, (batch,))
    check_logits(softcap, sinks, ((q_heads,), (batch, q_heads)))
    check_device(query, key, pad, sinks)
    if n == window or batch == 0:
        return torch.empty(batch, kv_heads, n - window, dtype=torch.float32, device=key.device)
    if resolve_backend(backend, key) == "torch":
        return window_score_torch(query, key, scaling, kernel_size, pooling, gqa_func, pad, softcap, sinks)
    return _window_score_triton(query, key, scaling, kernel_size, pooling, gqa_func, pad, softcap, sinks)


def tile(head_dim: int, itemsize: int) -> tuple[int, int]:
    """(query rows, columns) of one product: the published window of 32 rows with 32 KiB of keys, at most 128 columns.

    float32 takes half of both: its products run without tensor cores, on registers, and would spill.
    """
    rows, budget = (32, 32768) if itemsize == 2 else (16, 16384)
    return rows, max(16, min(128, budget // (block_head_dim(head_dim) * itemsize)))


def split_columns(n: int, programs: int, block_n: int, sms: int) -> tuple[int, int]:
    """(columns a split, number of splits) of the first pass.

    Four programs an SM hide the latency of the loads; a split has at least four tiles, or starting it costs more than
    it saves, and a row has at most MAX_SPLITS.
    """
    splits = max(1, min(-(-4 * sms // programs), MAX_SPLITS, n // (4 * block_n)))
    chunk = -(-n // (splits * block_n)) * block_n
    return chunk, -(-n // chunk)


def _window_score_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    gqa_func: str,
    pad: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    batch, q_heads, window, head_dim = query.shape
    kv_heads, n = key.shape[1:3]
    length, group = n - window, q_heads // kv_heads
    if pad is None:
        pad = torch.zeros(batch, dtype=torch.int32, device=key.device)
    block_w, block_n = tile(head_dim, key.element_size())
    blocks_w = triton.cdiv(window, block_w)
    chunk, splits = split_columns(n, batch * q_heads * blocks_w, block_n, multiprocessors(key.device))
    partial = torch.empty(batch * q_heads, window, splits, dtype=torch.float32, device=key.device)
    mean = torch.empty(batch, kv_heads, length, dtype=torch.float32, device=key.device)
    strides = (*query.stride()[:3], *key.stride()[:3])
    blocks = {
        "BLOCK_D": block_head_dim(head_dim),
        "BLOCK_W": block_w,
        "BLOCK_N": block_n,
        "num_warps": 4,
        "num_stages": 3,
    }
    with on_device_of(key):
        _statistics_kernel[(splits, batch * q_heads, blocks_w)](
            query,
            key,
            pad,
            partial,
            *strides,
            scaling,
            head_dim,
            q_heads,
            group,
            window,
            n,
            chunk,
            splits,
            softcap=softcap,
            sinks=None if sinks is None else sinks.expand(batch, -1).contiguous(),
            **blocks,
        )
        _mean_kernel[(triton.cdiv(length, block_n), batch * kv_heads)](
            query,
            key,
            partial,
            mean,
            *strides,
            scaling,
            head_dim,
            kv_heads,
            group,
            window,
            n,
            splits,
            int(gqa_func == "max"),
            softcap=softcap,
            MAX_SPLITS=MAX_SPLITS,
            **blocks,
        )
        score = torch.empty_like(mean)
        _pool_kernel[(triton.cdiv(length, BLOCK_P), batch * kv_heads)](
            mean, pad, score, kv_heads, length, kernel_size, int(pooling == "maxpool"), BLOCK_P=BLOCK_P, num_warps=4
        )
    return score


def window_score_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    gqa_func: str,
    pad: torch.Tensor | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """The torch form of `window_score`; it holds `[batch, q_heads, W, n]` in float32."""
    batch, q_heads, window, head_dim = query.shape
    kv_heads, n = key.shape[1:3]
    length = n - window
    rows = (query.float() * scaling).reshape(batch, kv_heads, -1, head_dim)  # the G heads of a kv head share its keys
    logits = (rows @ key.float().transpose(2, 3)).view(batch, q_heads, window, n)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    column = torch.arange(n, device=key.device)
    future = column[:window] > column[:window, None]
    logits[..., length:].masked_fill_(future, float("-inf"))
    if pad is not None:
        logits.masked_fill_(column < pad[:, None, None, None], float("-inf"))
    # In place: a second tensor of this size costs more to allocate than its softmax.
    if sinks is not None:
        total = torch.logaddexp(logits.logsumexp(-1, keepdim=True), sinks.float().view(-1, q_heads, 1, 1))
        probabilities = (logits - total).exp() if logits.requires_grad else logits.sub_(total).exp_()
    else:
        probabilities = logits.softmax(-1) if logits.requires_grad else torch.softmax(logits, -1, out=logits)
    if pad is not None:  # rows that are padding themselves see nothing: softmax gives NaN there
        probabilities.nan_to_num_(nan=0.0)
    mean = probabilities[..., :length].mean(2)
    mean = mean.view(batch, kv_heads, -1, length)
    score = mean.mean(2) if gqa_func == "mean" else mean.amax(2)
    if pad is None:
        return _pool_torch(score, kernel_size, pooling)
    padding = column[:length] < pad[:, None, None]
    # Padding has probability 0: for maxpool as good as the -inf of the edge, since no probability is smaller.
    return _pool_torch(score, kernel_size, pooling).masked_fill_(padding, float("-inf"))


def _pool_torch(score: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    pool = F.avg_pool1d if pooling == "avgpool" else F.max_pool1d
    return pool(score, kernel_size, stride=1, padding=kernel_size // 2)
