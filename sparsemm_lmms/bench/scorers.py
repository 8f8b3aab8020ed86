"""`bench compression`, second part: each scorer's share of a layer's compression, beside SnapKV's in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsemm_lmms.bench.measure import Spread, circumstances, in_turn, pick_device, write_row
from sparsemm_lmms.bench.tensor_log import TensorLog
from sparsemm_lmms.cache import DEFAULT_HEADROOM, Prompt, RaggedLayer, Step
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.methods import Model
from sparsemm_lmms.registry import scorer_names
from sparsemm_lmms.selection import build_method

SNAPKV = "window_attention"


@dataclass(frozen=True)
class Row:
    """A scorer's share of one layer's compression with a uniform budget; ratios to SnapKV's: medians over the rounds.

    Attributes:
        ms: scores, selection and the copy into the store.
        ratio: of `ms`, round by round.
        peak_bytes: alive at most at a time of what the compression makes; ratio_of_bytes to SnapKV's.
    """

    command: str
    scorer: str
    heads: int
    context: int
    head_dim: int
    budget: int
    dtype: str
    repeats: int
    ms: Spread
    ratio: float
    peak_bytes: int
    ratio_of_bytes: float
    circumstances: dict[str, Any]


@dataclass
class Layer:
    """Seeded tensors of one layer `[1, heads, n, head_dim]`, turned by nothing, and what else a scorer may read."""

    heads: int
    context: int
    head_dim: int
    device: torch.device
    dtype: torch.dtype
    state: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        random, hidden = torch.Generator().manual_seed(0), self.heads * self.head_dim
        shape = 1, self.heads, self.context, self.head_dim
        made = [torch.randn(*size, generator=random) for size in (shape, shape, shape, (hidden, hidden))]
        self.query, self.key, self.value, self.output = (x.to(self.device, self.dtype) for x in made)

    def turn(self, places: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(1, places.shape[-1], self.head_dim, device=self.device)
        return ones, torch.zeros_like(ones)

    def compress(self, scorer: str, config: CompressionConfig) -> RaggedLayer:
        """One compression; what a scorer remembers of layers before stays from call to call."""
        places = torch.arange(self.context, device=self.device)[None]
        state = self.state.setdefault(scorer, {})
        image = (places >= places.shape[1] // 32) & (places < places.shape[1] - places.shape[1] // 16)  # text around it
        prompt = Prompt(image, rotary=self.turn, state=state, turn=self.turn(places), position=places[:, -1])
        made = RaggedLayer(0, build_method(config, Model(1, self.heads, self.heads)), DEFAULT_HEADROOM)
        step = Step((self.context,), self.context, prompt=prompt)
        made.fill(self.query, self.key, self.value, self.head_dim**-0.5, step, output=self.output)
        return made


def measure(
    heads: int,
    context: int,
    head_dim: int,
    budget: int,
    repeats: int,
    device_name: str,
    dtype_name: str,
    output: Path | None,
) -> list[Row]:
    """All scorers in turns on the same tensors; SnapKV's once more with the two steps of CriticalKV."""
    device = pick_device(device_name)
    dtype = getattr(torch, dtype_name or ("bfloat16" if device.type == "cuda" else "float32"))
    layer = Layer(heads, context, head_dim, device, dtype)
    names = sorted(scorer_names(), key=lambda name: name != SNAPKV)
    configs = {name: CompressionConfig(method=f"{name}+uniform", budget=budget) for name in names}
    configs[f"{SNAPKV}, critical"] = CompressionConfig(method=f"{SNAPKV}+uniform", budget=budget, critical=True)
    calls: dict[str, Callable[[], Any]] = {
        name: partial(layer.compress, name, config) for name, config in configs.items()
    }
    times = in_turn(calls, device, repeats)
    peaks = {}
    for name, call in calls.items():
        with TensorLog() as log:
            call()
        peaks[name] = log.peak
    rows = [
        Row(
            command="scorers", scorer=name, heads=heads, context=context, head_dim=head_dim, budget=budget,
            dtype=str(dtype).removeprefix("torch."), repeats=repeats, ms=Spread.of(own),
            ratio=Spread.of([a / b for a, b in zip(own, times[SNAPKV], strict=True)]).median,
            peak_bytes=peaks[name], ratio_of_bytes=peaks[name] / peaks[SNAPKV], circumstances=circumstances(device),
        )
        for name, own in times.items()
    ]  # fmt: skip
    print("scorer, with a uniform budget     ms a layer                 / SnapKV   peak MiB   / SnapKV")
    for row in rows:
        write_row(output, row)
        peak = f"{row.peak_bytes / 2**20:8.1f}   {row.ratio_of_bytes:8.2f}"
        print(f"  {row.scorer:30}  {row.ms!s:26} {row.ratio:8.2f}   {peak}")
    return rows
