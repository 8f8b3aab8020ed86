"""How much attention the last tokens of a prompt pay to each earlier position, per kv head.

The observation-window score of SnapKV (https://arxiv.org/abs/2404.14469), used alike by PyramidKV, AdaKV and SparseMM.
With n tokens, a window of the last W queries and G query heads per kv head:

    p = softmax(q k^T * scaling) over all n columns, causal inside the window, in float32
    s = mean or max over the G heads of (mean over the W rows of p[..., :n - W])
    score = avgpool or maxpool of s, stride 1, padding kernel_size // 2

avgpool pads with zeros and always divides by kernel_size; maxpool pads with -inf. Deviation: the published code casts p
back to the dtype of q before the means; scores stay float32 here, which breaks the many ties that bfloat16 scores have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .backend import check_device, check_int32, check_rows, resolve_backend

POOLINGS = ("avgpool", "maxpool")
GQA_FUNCS = ("mean", "max")


def window_score(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
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
        kernel_size: odd width of the pooling; 1 leaves the scores as they are.
        pooling: `"avgpool"` or `"maxpool"`.
        gqa_func: `"mean"` or `"max"` over the G query heads of a kv head, before the pooling.
        pad: int32 `[batch]`, number of left-padding columns of each sequence. They get no attention, act on the
            pooling exactly as the edge of the sequence does, and score -inf. Sequences with n - pad <= W should be
            kept whole by the caller: their scores are free of NaN and mean nothing.

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
    check_device(query, key, pad)
    if n == window or batch == 0:
        return torch.empty(batch, kv_heads, n - window, dtype=torch.float32, device=key.device)
    resolve_backend(backend, key)
    return window_score_torch(query, key, scaling, kernel_size, pooling, gqa_func, pad)


def window_score_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    gqa_func: str,
    pad: torch.Tensor | None,
) -> torch.Tensor:
    """The torch form of `window_score`; it holds `[batch, q_heads, W, n]` in float32."""
    batch, q_heads, window, head_dim = query.shape
    kv_heads, n = key.shape[1:3]
    length = n - window
    rows = query.float().reshape(batch, kv_heads, -1, head_dim)  # the G heads of a kv head share its keys
    logits = (rows @ key.float().transpose(2, 3)).view(batch, q_heads, window, n).mul_(scaling)
    column = torch.arange(n, device=key.device)
    hidden = column > length + torch.arange(window, device=key.device)[:, None]
    if pad is not None:
        hidden = hidden | (column < pad[:, None, None, None])
    logits.masked_fill_(hidden, float("-inf"))
    # Rows that are padding themselves see nothing: softmax gives NaN there.
    mean = logits.softmax(-1)[..., :length].nan_to_num_(nan=0.0).mean(2)
    mean = mean.view(batch, kv_heads, -1, length)
    score = mean.mean(2) if gqa_func == "mean" else mean.amax(2)
    if pad is None:
        return _pool_torch(score, kernel_size, pooling)
    padding = column[:length] < pad[:, None, None]
    if pooling == "maxpool":
        score = score.masked_fill(padding, float("-inf"))
    return _pool_torch(score, kernel_size, pooling).masked_fill_(padding, float("-inf"))


def _pool_torch(score: torch.Tensor, kernel_size: int, pooling: str) -> torch.Tensor:
    pool = F.avg_pool1d if pooling == "avgpool" else F.max_pool1d
    return pool(score, kernel_size, stride=1, padding=kernel_size // 2)
