"""Times, bytes and circumstances of a measurement, and its line in a results file."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import nn

from sparsemm_lmms._version import __version__
from sparsemm_lmms.source_commit import source_commit


@dataclass(frozen=True)
class Spread:
    """Median, least and most of repeated measurements."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.least:.3g}-{self.most:.3g})"


def milliseconds(function: Callable[[], Any], device: torch.device, repeats: int = 30, warmup: int = 5) -> Spread:
    """Time of a call, launches included: CUDA events on a GPU, the clock elsewhere."""
    for _ in range(warmup):
        function()
    return Spread.of([one_call(function, device) for _ in range(repeats)])


def one_call(function: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        begin_s = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin_s)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def in_turn(functions: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each function in every round; the order changes from round to round, so that none profits."""
    names = list(functions)
    for name in names:
        functions[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for name in rotated(names, turn):
            times[name].append(one_call(functions[name], device))
    return times


def rotated(names: list[str], turn: int) -> list[str]:
    """Another order for every turn: each name comes first in its turn, and every second turn runs backwards."""
    start = turn % len(names)
    order = names[start:] + names[:start]
    return order[::-1] if turn % 2 else order


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    spent = milliseconds(lambda: target.copy_(source), device, repeats=20, warmup=3)
    return 2 * source.numel() / spent.median * 1e3


def streamed_bytes(model: Any) -> int:
    """Bytes of weights that every decode step reads: the text decoder and the head, not the embedding table."""
    parts: list[nn.Module] = [*model.get_decoder().layers, model.get_decoder().norm, model.lm_head]
    return sum(x.numel() * x.element_size() for part in parts for x in part.parameters())


def pick_device(name: str) -> torch.device:
    """CUDA before CPU when `name` is empty."""
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name} was asked for, but torch sees no GPU here; use --device cpu.")
    return device


def circumstances(device: torch.device) -> dict[str, Any]:
    """What every number depends on."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "triton": triton_version,
        "sparsemm_lmms": __version__,
        "commit": source_commit(),
    }


def cpu_name() -> str:
    """The processor as Linux names it, else its architecture."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} CPU"


def plain(row: Any) -> dict[str, Any]:
    """A dataclass (or dict) as JSON values, floats to five digits."""
    values = dataclasses.asdict(row) if dataclasses.is_dataclass(row) and not isinstance(row, type) else dict(row)
    return {key: _rounded(value) for key, value in values.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(x) for key, x in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def write_row(output: Path | None, row: Any) -> None:
    """Append one line; rows that are written stay when a later measurement is killed."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(plain(row)) + "\n")
