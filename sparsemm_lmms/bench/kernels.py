"""`bench kernels`: what each kernel reaches of the copy bandwidth, measured in the same process.

On a GPU: in bfloat16, alone and in a CUDA graph (what a replayed decode step pays), beside varlen_attn where torch has
it. On a CPU: the torch forms on small shapes, to see that everything runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemm_lmms.bench.measure import Spread, circumstances, copy_bandwidth, milliseconds, pick_device, write_row
from sparsemm_lmms.kernels import append, evict, ragged_decode, window_score

GRAPH_CALLS = 10  # calls that one captured graph holds


@dataclass(frozen=True)
class Row:
    """One kernel on one shape; share: achieved bandwidth over that of a large copy; moved: bytes read and written."""

    command: str
    kernel: str
    shape: dict[str, Any]
    dtype: str
    ms: Spread
    moved: int | None
    gb_per_s: float | None
    share: float | None
    note: str | None
    circumstances: dict[str, Any]


@dataclass
class Bench:
    """Where rows go, and what they share."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    bandwidth: float
    output: Path | None

    def report(
        self,
        kernel: str,
        function: Callable[[], Any],
        shape: dict[str, Any],
        moved: int | None = None,
        graph: bool = True,
        note: str | None = None,
    ) -> None:
        """Time `function`, and on a GPU its graph too."""
        self._row(kernel, milliseconds(function, self.device, self.repeats), shape, moved, note)
        if graph and self.device.type == "cuda":
            captured = torch.cuda.CUDAGraph()
            function()
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(captured):
                for _ in range(GRAPH_CALLS):
                    function()
            spent = milliseconds(captured.replay, self.device, self.repeats)
            one = Spread(*(x / GRAPH_CALLS for x in (spent.median, spent.least, spent.most)))
            self._row(f"{kernel} graph", one, shape, moved, note)

    def _row(self, kernel: str, ms: Spread, shape: dict[str, Any], moved: int | None, note: str | None) -> None:
        speed = None if moved is None else moved / ms.median * 1e3
        row = Row(
            "kernels", kernel, shape, str(self.dtype).removeprefix("torch."), ms, moved,
            None if speed is None else speed / 1e9, None if speed is None else speed / self.bandwidth, note,
            circumstances(self.device),
        )  # fmt: skip
        write_row(self.output, row)
        reached = "" if speed is None else f"{speed / 1e9:9.1f} GB/s {speed / self.bandwidth:6.1%} of copy"
        sizes = " ".join(f"{name}={value}" for name, value in shape.items())
        print(f"{kernel:28} {ms.median:9.4f} ms {reached:36} {sizes} {note or ''}".rstrip(), flush=True)

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)


def uneven(segments: int, mean: int, exponent: float = 0.7, least: int = 32) -> Tensor:
    """Zipf-like lengths of the given mean, shuffled."""
    weight = torch.arange(1, segments + 1).double() ** -exponent
    length = (weight / weight.sum() * (mean - least) * segments + least).round().int()
    return length[torch.randperm(segments, generator=torch.Generator().manual_seed(0))]


def store(bench: Bench, length: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments without gaps, which is what varlen_attn wants."""
    start = (length.cumsum(0) - length).int()
    keys, values = (bench.randn(int(length.sum()), head_dim) for _ in range(2))
    return keys, values, start.to(bench.device), length.to(bench.device)


def decode(bench: Bench, batch: int, heads: int, group: int, mean: int, tokens: int = 1, even: bool = False) -> None:
    """`ragged_decode` over even or uneven segments; varlen_attn on the same store."""
    head_dim = 128
    length = torch.full((batch * heads,), mean, dtype=torch.int32) if even else uneven(batch * heads, mean)
    keys, values, start, device_length = store(bench, length, head_dim)
    longest = int(length.max())
    query = bench.randn(batch, heads * group, tokens, head_dim)
    place = (start.view(batch, heads), device_length.view(batch, heads))
    moved = 2 * keys.numel() * keys.element_size()
    shape = dict(batch=batch, kv_heads=heads, group=group, tokens=tokens, mean=mean, longest=longest)

    def ours() -> Tensor:
        return ragged_decode(query, keys, values, *place, scaling=head_dim**-0.5, max_length=longest)

    bench.report("ragged_decode", ours, shape, moved)
    if tokens > 1 or bench.device.type != "cuda":  # causal among the new tokens: not what the call below computes
        return
    try:
        varlen_attn = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        print(f"varlen_attn                  not in this torch: {error}")
        return
    # One "sequence" a kv head; its G query heads are G query rows, so no enable_gqa is needed (torch 2.11 lacks it).
    rows = query.view(batch * heads * group, 1, head_dim)
    bounds_q = torch.arange(0, batch * heads * group + 1, group, dtype=torch.int32, device=bench.device)
    bounds_k = torch.cat([start, device_length.sum().view(1).int()])
    peer_keys, peer_values = keys.view(-1, 1, head_dim), values.view(-1, 1, head_dim)

    def peer() -> Tensor:
        return varlen_attn(rows, peer_keys, peer_values, bounds_q, bounds_k, group, longest)

    with torch.no_grad():
        difference = (peer().view(-1).float() - ours().view(-1).float()).abs().max().item()
        bench.report("varlen_attn", peer, shape, moved, note=f"largest difference {difference:.2g}")


def compress(bench: Bench, q_heads: int, kv_heads: int, budget: int, n: int, head_dim: int = 128) -> None:
    """Scores, then compaction, of one layer of a long prompt; against the layer's causal attention over it."""
    key, value = (bench.randn(1, kv_heads, n, head_dim) for _ in range(2))
    query = bench.randn(1, q_heads, 32, head_dim)
    shape = dict(q_heads=q_heads, kv_heads=kv_heads, n=n, budget=budget)
    size = key.element_size()
    bench.report(
        "window_score",
        lambda: window_score(query, key, scaling=head_dim**-0.5),
        shape,
        2 * key.numel() * size,  # two passes over the keys
        graph=False,
    )
    count = uneven(kv_heads, budget, exponent=0.5).clamp(max=n)
    index = torch.zeros(1, kv_heads, int(count.max()), dtype=torch.int32)
    for head, number in enumerate(count.tolist()):
        index[0, head, :number] = torch.randperm(n)[:number].sort().values
    keys, values, start, length = store(bench, count, head_dim)
    moving = (index.to(bench.device), length.view(1, -1), start.view(1, -1), keys, values)
    bench.report("evict", lambda: evict(key, value, *moving), shape, 4 * keys.numel() * size, graph=False)
    full = bench.randn(1, q_heads, n, head_dim)
    gqa = q_heads != kv_heads
    bench.report(
        "sdpa prefill of the layer",
        lambda: F.scaled_dot_product_attention(full, key, value, is_causal=True, enable_gqa=gqa),
        shape,
        graph=False,
    )


def append_step(bench: Bench, segments: int) -> None:
    """One new token for every segment; lengths are set back so that there is always room."""
    room, device = 4096, bench.device
    length = torch.full((1, segments), 100, dtype=torch.int32, device=device)
    capacity = torch.full_like(length, room)
    start = (torch.arange(segments, device=device, dtype=torch.int32) * room).view(1, -1)
    keys, values = (bench.randn(segments * room, 128) for _ in range(2))
    new = bench.randn(1, segments, 1, 128)
    overflow = torch.zeros(1, dtype=torch.int32, device=device)

    def step() -> None:
        append(keys, values, start, length, capacity, new, new, overflow)

    bench.report("append", step, dict(segments=segments))
    if int(overflow):
        raise RuntimeError("append ran out of room: its times are those of refusals.")


def measure(device_name: str, repeats: int, output: Path | None) -> None:
    """All kernels on the shapes of 7B models (GPU) or on small ones (CPU)."""
    device = pick_device(device_name)
    large = device.type == "cuda"
    bench = Bench(device, torch.bfloat16 if large else torch.float32, repeats, copy_bandwidth(device), output)
    names = circumstances(device)
    print(f"{names['device']}, torch {names['torch']}, copy {bench.bandwidth / 1e9:.1f} GB/s")
    if not large:
        decode(bench, batch=1, heads=8, group=1, mean=256)
        decode(bench, batch=1, heads=8, group=1, mean=256, even=True)
        decode(bench, batch=2, heads=2, group=7, mean=256, tokens=4)
        append_step(bench, 8)
        compress(bench, 8, 8, 128, n=1024)
        compress(bench, 14, 2, 128, n=1024)
        return
    for even in (False, True):
        decode(bench, batch=8, heads=32, group=1, mean=4096, even=even)
    decode(bench, batch=8, heads=8, group=4, mean=4096)
    decode(bench, batch=8, heads=4, group=7, mean=8192)
    decode(bench, batch=1, heads=32, group=1, mean=256)
    decode(bench, batch=1, heads=32, group=1, mean=1024)
    decode(bench, batch=1, heads=32, group=1, mean=32768, even=True)
    decode(bench, batch=1, heads=4, group=7, mean=32768)
    decode(bench, batch=1, heads=8, group=4, mean=8192, tokens=8)
    decode(bench, batch=1, heads=32, group=1, mean=4096, tokens=256)
    append_step(bench, 32)
    append_step(bench, 256)
    compress(bench, 32, 32, 256, n=32768)
    compress(bench, 28, 4, 2048, n=32768)
