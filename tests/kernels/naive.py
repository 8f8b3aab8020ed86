"""Loop-by-loop float64 references, independent of the package, and random ragged stores to try them on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Rounding of the result (half a unit in the last place of outputs of size 1 to 4), of the probabilities before they
# meet the values (16 bit only), and for float32 the order of the sums.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


@dataclass
class Store:
    """A ragged store whose unused rows are NaN: reading one shows in the result."""

    keys: torch.Tensor
    values: torch.Tensor
    start: torch.Tensor
    length: torch.Tensor
    capacity: torch.Tensor

    def to(self, device: str) -> Store:
        return Store(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def clone(self) -> Store:
        return Store(*(getattr(self, name).clone() for name in self.__dataclass_fields__))

    def rows(self, b: int, h: int) -> range:
        first = int(self.start[b, h])
        return range(first, first + int(self.length[b, h]))


def make_store(
    lengths: list[list[int]],
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    room: int = 3,
    shuffle: bool = True,
    seed: int = 0,
) -> Store:
    """Segments of the given lengths with `room` free rows each, in random order, one unused row between them."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor(lengths, dtype=torch.int32)
    capacity = length + room
    order = torch.randperm(length.numel(), generator=generator) if shuffle else torch.arange(length.numel())
    start = torch.zeros(length.numel(), dtype=torch.int32)
    slots = 1
    for segment in order.tolist():
        start[segment] = slots
        slots += int(capacity.flatten()[segment]) + 1
    start = start.view_as(length)
    keys, values = (torch.full((slots, head_dim), float("nan"), dtype=dtype) for _ in range(2))
    store = Store(keys, values, start, length, capacity)
    for b in range(length.shape[0]):
        for h in range(length.shape[1]):
            rows = list(store.rows(b, h))
            keys[rows] = torch.randn(len(rows), head_dim, generator=generator).to(dtype)
            values[rows] = torch.randn(len(rows), head_dim, generator=generator).to(dtype)
    return store


def append(store: Store, new_keys: torch.Tensor, new_values: torch.Tensor, count: list[int] | None) -> bool:
    """Appends in place; True when a segment had no room."""
    tokens, overflow = new_keys.shape[2], False
    for b in range(new_keys.shape[0]):
        for h in range(new_keys.shape[1]):
            number = tokens if count is None else count[b]
            used = int(store.length[b, h])
            if used + number > int(store.capacity[b, h]):
                overflow = True
                continue
            for j in range(number):
                row = int(store.start[b, h]) + used + j
                store.keys[row] = new_keys[b, h, tokens - number + j]
                store.values[row] = new_values[b, h, tokens - number + j]
            store.length[b, h] += number
    return overflow


def softmax(logits: torch.Tensor, softcap: float | None, sink: torch.Tensor | None) -> torch.Tensor:
    """Probabilities of capped logits beside a sink, which takes its share of them; float64 `[n]`."""
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if sink is None:
        return torch.softmax(logits, 0)
    return torch.softmax(torch.cat([logits, sink.double().view(1)]), 0)[:-1]


def decode(
    query: torch.Tensor,
    store: Store,
    scaling: float,
    count: list[int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each new token over the rows it may see, in float64; sinks `[q_heads]`."""
    batch, q_heads, tokens, _ = query.shape
    group = q_heads // store.start.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for b in range(batch):
        for head in range(q_heads):
            rows = store.rows(b, head // group)
            for i in range(tokens):
                seen = list(rows)[: max(len(rows) - tokens + i + 1, 0)]
                if not seen or (count is not None and i < tokens - count[b]):
                    continue
                logits = store.keys[seen].double() @ query[b, head, i].double() * scaling
                p = softmax(logits, softcap, None if sinks is None else sinks[head])
                out[b, head, i] = p @ store.values[seen].double()
    return out


def window_score(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    kernel_size: int,
    pooling: str,
    gqa_func: str,
    pad: list[int] | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Window scores of each sequence without its padding, in float64; -inf there; sinks `[batch, q_heads]`."""
    batch, q_heads, window, _ = query.shape
    kv_heads, n = key.shape[1:3]
    group, length = q_heads // kv_heads, n - window
    out = torch.full((batch, kv_heads, length), float("-inf"), dtype=torch.float64)
    for b in range(batch):
        hidden = 0 if pad is None else pad[b]
        for h in range(kv_heads):
            heads = []
            for g in range(group):
                mean = torch.zeros(length - hidden, dtype=torch.float64)
                for w in range(window):
                    visible = key[b, h, hidden : length + w + 1].double()
                    sink = None if sinks is None else sinks[b, h * group + g]
                    p = softmax(visible @ query[b, h * group + g, w].double() * scaling, softcap, sink)
                    mean += p[: length - hidden] / window
                heads.append(mean)
            stacked = torch.stack(heads)
            score = stacked.mean(0) if gqa_func == "mean" else stacked.amax(0)
            for c in range(length - hidden):
                near = score[max(0, c - kernel_size // 2) : c + kernel_size // 2 + 1]
                out[b, h, hidden + c] = near.sum() / kernel_size if pooling == "avgpool" else near.max()
    return out
