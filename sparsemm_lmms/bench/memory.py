"""`bench memory`: many prompts in a row, and what is still alive after them."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsemm_lmms.bench.measure import circumstances, pick_device, write_row
from sparsemm_lmms.bench.presets import build, find, prompt
from sparsemm_lmms.bench.runs import Variant, generate

WARM = 5  # prompts after which nothing may grow
SLACK = 32 * 2**20  # bytes that the process may grow on a CPU: allocators keep freed pages in varying shapes
CONTEXTS, NEW_TOKENS = (160, 96, 224, 128), 6


@dataclass(frozen=True)
class Alive:
    """What is alive: tensors that Python knows and their bytes, bytes of the process, bytes of the GPU."""

    tensors: int
    tensor_bytes: int
    process: int
    gpu: int


@dataclass(frozen=True)
class Row:
    """The same after the fifth and after the last prompt."""

    command: str
    preset: str
    method: str
    budget: int
    prompts: int
    early: Alive
    late: Alive
    grew: bool
    circumstances: dict[str, Any]


def alive(device: torch.device) -> Alive:
    """Count after a collection. Storages are counted once, however many views they have."""
    gc.collect()
    # type(), not isinstance(): lazy modules answer isinstance by importing what they stand for
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    storages = {
        x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors if x.device.type != "meta"
    }
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    gpu = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return Alive(len(tensors), sum(storages.values()), resident, gpu)


def measure(
    preset: str, prompts: int, method: str, budget: int, device_name: str, dtype_name: str, output: Path | None
) -> bool:
    """Answer `prompts` prompts of four lengths; True when the last leaves no more alive than the fifth."""
    variant, device = Variant(method), pick_device(device_name)
    find(preset)
    model = build(preset, device, getattr(torch, dtype_name or ("bfloat16" if device.type == "cuda" else "float32")))
    early = late = None
    for number in range(1, prompts + 1):
        inputs = prompt(preset, model, CONTEXTS[number % len(CONTEXTS)], 1, seed=number)
        generate(model, inputs, variant, budget, NEW_TOKENS)
        del inputs
        if number == WARM:
            early = alive(device)
        if number == prompts:
            late = alive(device)
    assert early is not None and late is not None  # at least six prompts
    grew = (
        late.tensors > early.tensors
        or late.tensor_bytes > early.tensor_bytes
        or late.gpu > early.gpu
        or late.process > early.process + SLACK
    )
    row = Row("memory", preset, method, budget, prompts, early, late, grew, circumstances(device))
    write_row(output, row)
    print(f"{preset}, {method}, budget {budget}, on {row.circumstances['device']}")
    for name, found in ((f"after {WARM} prompts", early), (f"after {prompts} prompts", late)):
        print(
            f"  {name:18} {found.tensors} tensors, {found.tensor_bytes / 2**20:.2f} MiB in them; "
            f"process {found.process / 2**20:.1f} MiB, GPU {found.gpu / 2**20:.1f} MiB"
        )
    print("Memory GREW." if grew else "Memory did not grow.")
    return not grew
