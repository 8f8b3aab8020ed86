"""`bench compression`: one layer's compression beside the way of the published research code.

`research_layer` is written from the description of the published algorithm (SparseMM, arXiv 2506.05344, on AdaKV's flat
cache, 2407.11550): the scores of all heads as one matrix, a full sort of every head, and for each head in a Python loop
a gather and a concatenation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_lmms.bench.measure import Spread, circumstances, in_turn, pick_device, write_row
from sparsemm_lmms.cache import DEFAULT_HEADROOM, RaggedLayer, Step
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method

LAYERS, LAYER = 32, 12  # of the model whose budget is shared out, and the layer that is compressed


@dataclass(frozen=True)
class Row:
    """Milliseconds of one layer's compression; ratio: median over the rounds of ours / theirs in the same round."""

    command: str
    heads: int
    context: int
    head_dim: int
    budget: int
    dtype: str
    repeats: int
    kept_tokens: float
    ours_ms: Spread
    research_ms: Spread
    ratio: float
    ratio_of_medians: float
    circumstances: dict[str, Any]


def research_layer(
    query: Tensor, key: Tensor, value: Tensor, capacities: np.ndarray, window: int, kernel_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Flat keys and values `[tokens, head_dim]` of all heads one after the other, and their boundaries.

    Args:
        query, key, value: `[1, heads, n, head_dim]`.
        capacities: tokens that each head keeps outside the window.
    """
    head_dim = key.shape[-1]
    weights = torch.matmul(query[:, :, -window:], key.transpose(2, 3)) / head_dim**0.5
    lowest = torch.finfo(weights.dtype).min
    mask = torch.full((window, window), lowest, dtype=weights.dtype, device=key.device).triu(1)
    weights[:, :, -window:, -window:] += mask
    weights = torch.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    scores = weights[:, :, -window:, :-window].mean(dim=-2)
    scores = F.avg_pool1d(scores, kernel_size, stride=1, padding=kernel_size // 2)
    order = scores.sort(dim=-1, descending=True).indices
    keys: list[Tensor] = []
    values: list[Tensor] = []
    bounds = [0]
    for head in range(key.shape[1]):
        index = order[:, head : head + 1, : int(capacities[head])].unsqueeze(-1).expand(-1, -1, -1, head_dim)
        for full, kept in ((key, keys), (value, values)):
            own = full[:, head : head + 1]
            best = own[:, :, :-window].gather(dim=2, index=index)
            kept.append(torch.cat([best, own[:, :, -window:]], dim=2).reshape(-1, head_dim))
        bounds.append(bounds[-1] + keys[-1].shape[0])
    return torch.cat(keys), torch.cat(values), torch.tensor(bounds, dtype=torch.int32, device=key.device)


def measure(
    heads: int,
    context: int,
    head_dim: int,
    budget: int,
    repeats: int,
    device_name: str,
    dtype_name: str,
    output: Path | None,
) -> Row:
    """Both ways in turns on the same tensors; they keep the same tokens, which is checked first."""
    device = pick_device(device_name)
    dtype = getattr(torch, dtype_name or ("bfloat16" if device.type == "cuda" else "float32"))
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, context, head_dim, generator=random).to(device, dtype) for _ in range(3))
    config = CompressionConfig(method="sparsemm", budget=budget)
    uneven = 1.0 / (torch.randperm(LAYERS * heads, generator=random).numpy() + 20.0)
    method = build_method(config, Model(LAYERS, heads, heads), uneven.reshape(LAYERS, heads))

    def ours() -> RaggedLayer:
        layer = RaggedLayer(LAYER, method, DEFAULT_HEADROOM)
        layer.fill(query, key, value, head_dim**-0.5, Step((context,), context))
        return layer

    layer = ours()
    capacities = layer.kept[0] - config.window_size

    def theirs() -> tuple[Tensor, Tensor, Tensor]:
        return research_layer(query, key, value, capacities, config.window_size, config.kernel_size)

    check_same_tokens(layer, *theirs())
    times = in_turn({"ours": ours, "research": theirs}, device, repeats)
    mine, other = Spread.of(times["ours"]), Spread.of(times["research"])
    row = Row(
        command="compression", heads=heads, context=context, head_dim=head_dim, budget=budget,
        dtype=str(dtype).removeprefix("torch."), repeats=repeats, kept_tokens=float(layer.kept.mean()),
        ours_ms=mine, research_ms=other,
        ratio=Spread.of([a / b for a, b in zip(times["ours"], times["research"], strict=True)]).median,
        ratio_of_medians=mine.median / other.median,
        circumstances=circumstances(device),
    )  # fmt: skip
    write_row(output, row)
    print(f"{heads} heads x {context} tokens x {head_dim}, {row.dtype}, {row.circumstances['device']}, budget {budget}")
    print(f"  scores, budgets, eviction   {mine} ms")
    print(f"  research code's way         {other} ms")
    print(f"  ratio {row.ratio:.2f} (median of {repeats} rounds; of the medians {row.ratio_of_medians:.2f})")
    return row


def check_same_tokens(layer: RaggedLayer, keys: Tensor, values: Tensor, bounds: Tensor) -> None:
    """Both keep the same rows (in float32; half precision breaks ties differently), or the comparison means nothing."""
    if keys.dtype != torch.float32:
        return
    for head in range(layer.kept.shape[1]):
        first, last = int(bounds[head]), int(bounds[head + 1])
        begin = int(layer.start[0, head])
        for flat, store in ((keys, layer.keys), (values, layer.values)):
            theirs = {tuple(row) for row in flat[first:last, :4].tolist()}
            mine = {tuple(row) for row in store[begin : begin + last - first, :4].tolist()}
            if theirs != mine:
                raise RuntimeError(f"Head {head}: the two ways keep different tokens; the comparison means nothing.")
