"""What the kernels reach on this GPU, one JSON line a measurement: `python tests/kernels/bench_gpu.py`.

Not a test. Times are medians of CUDA events, launches included; `graph` times are one replay of a captured call.
`share` is the achieved bandwidth over that of a large device copy measured in the same process.
"""

from __future__ import annotations

import json
import statistics

import torch

from sparsemm_lmms.kernels import append, evict, ragged_decode, window_score

DEVICE, DTYPE = "cuda", torch.bfloat16


def milliseconds(fn, repeats: int = 30, warmup: int = 5) -> float:
    for _ in range(warmup):
        fn()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        fn()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def in_graph(fn, calls: int = 10) -> float:
    """Milliseconds a call when captured: what a decode step that replays a CUDA graph pays."""
    fn()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            fn()
    return milliseconds(graph.replay) / calls


def report(name: str, ms: float, moved: int = 0, copy: float = 0.0, **more: object) -> None:
    row: dict[str, object] = {"name": name, "ms": round(ms, 5)}
    if moved:
        row["GB/s"] = round(moved / ms / 1e6, 1)
        if copy:
            row["share"] = round(moved / ms / 1e6 / copy, 3)
    print(json.dumps({**row, **more}), flush=True)


def copy_bandwidth() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source))
    moved = 2 * source.numel()
    report("copy 1 GiB", ms, moved)
    return moved / ms / 1e6


def uneven(segments: int, mean: int, exponent: float = 0.7, least: int = 32) -> torch.Tensor:
    """Zipf-like lengths of the given mean, shuffled."""
    weight = torch.arange(1, segments + 1).double() ** -exponent
    length = (weight / weight.sum() * (mean - least) * segments + least).round().int()
    return length[torch.randperm(segments, generator=torch.Generator().manual_seed(0))]


def store(length: torch.Tensor, head_dim: int):
    """Segments without gaps, which is what varlen_attn wants."""
    start = (length.cumsum(0) - length).int()
    keys, values = (torch.randn(int(length.sum()), head_dim, dtype=DTYPE, device=DEVICE) for _ in range(2))
    return keys, values, start.to(DEVICE), length.to(DEVICE)


def decode(copy: float, batch: int, heads: int, group: int, mean: int, tokens: int = 1, even: bool = False) -> None:
    head_dim = 128
    length = torch.full((batch * heads,), mean, dtype=torch.int32) if even else uneven(batch * heads, mean)
    keys, values, start, device_length = store(length, head_dim)
    longest = int(length.max())
    query = torch.randn(batch, heads * group, tokens, head_dim, dtype=DTYPE, device=DEVICE)
    shape = (batch, heads)
    moved = 2 * keys.numel() * keys.element_size()
    label = dict(batch=batch, kv_heads=heads, group=group, tokens=tokens, mean=mean, longest=longest)

    def ours():
        return ragged_decode(
            query, keys, values, start.view(shape), device_length.view(shape), scaling=128**-0.5, max_length=longest
        )

    report("ragged_decode", milliseconds(ours), moved, copy, **label)
    report("ragged_decode graph", in_graph(ours), moved, copy, **label)
    if tokens > 1:  # causal among the new tokens: not what the call below computes
        return
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        print(json.dumps({"name": "varlen_attn", "missing": str(error)}))
        return
    # One "sequence" a kv head; its G query heads are G query rows, so no enable_gqa is needed (torch 2.11 lacks it).
    rows = query.view(batch * heads * group, 1, head_dim)
    bounds_q = torch.arange(0, batch * heads * group + 1, group, dtype=torch.int32, device=DEVICE)
    bounds_k = torch.cat([start, device_length.sum().view(1).int()])
    peer_keys, peer_values = keys.view(-1, 1, head_dim), values.view(-1, 1, head_dim)

    def peer():
        return varlen_attn(rows, peer_keys, peer_values, bounds_q, bounds_k, group, longest)

    with torch.no_grad():
        difference = (peer().view(-1).float() - ours().view(-1).float()).abs().max().item()
        report("varlen_attn", milliseconds(peer), moved, copy, **label, difference=difference)
        report("varlen_attn graph", in_graph(peer), moved, copy, **label)


def compress(copy: float, q_heads: int, kv_heads: int, budget: int, n: int = 32768, head_dim: int = 128) -> None:
    """Scores, then compaction, of one layer of a 32K prompt; against one layer's causal attention over the prompt."""
    key, value = (torch.randn(1, kv_heads, n, head_dim, dtype=DTYPE, device=DEVICE) for _ in range(2))
    query = torch.randn(1, q_heads, 32, head_dim, dtype=DTYPE, device=DEVICE)
    label = dict(q_heads=q_heads, kv_heads=kv_heads, n=n)
    moved = 2 * key.numel() * key.element_size()  # two passes over the keys
    ms = milliseconds(lambda: window_score(query, key, scaling=head_dim**-0.5))
    report("window_score", ms, moved, copy, **label)

    count = uneven(kv_heads, budget, exponent=0.5).clamp(max=n)
    index = torch.zeros(1, kv_heads, int(count.max()), dtype=torch.int32)
    for head, number in enumerate(count.tolist()):
        index[0, head, :number] = torch.randperm(n)[:number].sort().values
    keys, values, start, length = store(count, head_dim)
    arguments = (key, value, index.to(DEVICE), length.view(1, -1), start.view(1, -1), keys, values)
    moved = 4 * keys.numel() * keys.element_size()
    report("evict", milliseconds(lambda: evict(*arguments)), moved, copy, **label, budget=budget)

    full = torch.randn(1, q_heads, n, head_dim, dtype=DTYPE, device=DEVICE)
    attention = torch.nn.functional.scaled_dot_product_attention
    ms = milliseconds(lambda: attention(full, key, value, is_causal=True, enable_gqa=q_heads != kv_heads), repeats=5)
    report("sdpa prefill of the layer", ms, **label)


def append_step(copy: float, segments: int) -> None:
    length = torch.full((1, segments), 100, dtype=torch.int32, device=DEVICE)
    capacity = length + 10**6
    start = (torch.arange(segments, device=DEVICE, dtype=torch.int32) * 4096).view(1, -1)
    keys, values = (torch.zeros(segments * 4096, 128, dtype=DTYPE, device=DEVICE) for _ in range(2))
    new = torch.randn(1, segments, 1, 128, dtype=DTYPE, device=DEVICE)
    overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def step():
        append(keys, values, start, length, capacity, new, new, overflow)

    report("append", milliseconds(step), segments=segments)
    length.fill_(100)
    report("append graph", in_graph(step), segments=segments)


def main() -> None:
    import triton

    properties = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps({"name": "device", "gpu": properties.name, "sms": properties.multi_processor_count, **versions}))
    copy = copy_bandwidth()
    decode(copy, batch=8, heads=32, group=1, mean=4096)
    decode(copy, batch=8, heads=32, group=1, mean=4096, even=True)
    decode(copy, batch=8, heads=8, group=4, mean=4096)
    decode(copy, batch=8, heads=4, group=7, mean=8192)
    decode(copy, batch=1, heads=32, group=1, mean=256)
    decode(copy, batch=1, heads=32, group=1, mean=1024)
    decode(copy, batch=1, heads=32, group=1, mean=32768, even=True)
    decode(copy, batch=1, heads=4, group=7, mean=32768)
    decode(copy, batch=1, heads=8, group=4, mean=8192, tokens=8)
    decode(copy, batch=1, heads=32, group=1, mean=4096, tokens=256)
    append_step(copy, 32)
    append_step(copy, 256)
    compress(copy, 32, 32, 256)
    compress(copy, 28, 4, 2048)


if __name__ == "__main__":
    main()
