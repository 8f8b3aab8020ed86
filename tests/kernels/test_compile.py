"""Every variant compiles for sm_80 and sm_90 on a machine without a GPU; what copies and decodes does not spill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparsemm_lmms.kernels as kernels

from . import naive
from .compile_variants import jobs, variants

pytest.importorskip("triton", reason="triton is not installed")
SCRIPT = Path(__file__).with_name("compile_variants.py")


def compile_in_a_process(which):
    """The kernels of this process may belong to the interpreter."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), which], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(results, which):
    assert len(results) == len(jobs(which))
    for result in results:
        # An H100 gives a program up to 227 KiB of shared memory, an A100 163.
        assert result["shared"] <= (227 if result["sm"] == 90 else 163) * 1024, result
        # The two passes of window_score may keep a few bytes on the stack: ptxas trades them for occupancy (8 bytes at
        # 168 registers), and the float32 products run on registers. Real spilling takes kilobytes.
        allowed = 128 if result["kernel"] in ("_statistics_kernel", "_mean_kernel") else 0
        assert result["stack"] <= allowed, f"spills: {result}"


def test_most_variants_compile():
    check(compile_in_a_process("most"), "most")


@pytest.mark.slow
def test_the_other_variants_compile():
    check(compile_in_a_process("rest"), "rest")


class Recorder:
    """Stands in for a kernel and notes the constants it is launched with."""

    def __init__(self, name, found):
        self.name, self.found = name, found

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, **constants):
        rows = next(x for x in arguments if isinstance(x, torch.Tensor))
        if self.name == "ragged_decode._merge_kernel":
            rows = arguments[1]
        dtype = {
            torch.int16: "i16",
            torch.int32: "i32",
            torch.float16: "fp16",
            torch.bfloat16: "bf16",
            torch.float32: "fp32",
        }[rows.dtype]
        constants = {k: x for k, x in constants.items() if k not in ("softcap", "sinks") or x is None}
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages", 3)  # 3: triton's default
        self.found.append((self.name, dtype, constants, warps, stages))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_launchers_choose_only_compiled_variants(dtype, monkeypatch):
    """So the list in compile_variants.py is complete, for every head_dim, group size and number of new tokens."""
    found = []
    for variant in {name for name, *_ in variants()}:
        module, function = variant.split(".")
        module = sys.modules[f"sparsemm_lmms.kernels.{module}"]
        monkeypatch.setattr(module, function, Recorder(variant, found))
        monkeypatch.setattr(module, "resolve_backend", lambda *_: "triton")
    for head_dim in (32, 64, 80, 96, 128):
        for group, tokens in ((1, 1), (4, 1), (7, 1), (8, 1), (4, 8), (7, 100)):
            store = naive.make_store([[40, 50]], head_dim, dtype)
            new = torch.zeros(1, 2, tokens, head_dim, dtype=dtype)
            overflow, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)
            place = (store.start, store.length)
            kernels.append(store.keys, store.values, *place, store.capacity, new, new, overflow)
            index = torch.zeros(1, 2, 5, dtype=torch.int32)
            kernels.evict(new, new, index, count, store.start, store.keys, store.values)
            query = torch.zeros(1, 2 * group, tokens, head_dim, dtype=dtype)
            key = torch.zeros(1, 2, 200, head_dim, dtype=dtype)
            both = dict(softcap=1.0, sinks=torch.zeros(2 * group))
            kernels.window_score(query, key, scaling=1.0)
            kernels.window_score(query, key, scaling=1.0, **both)
            spare = torch.zeros(5000, head_dim, dtype=dtype)
            for max_length in (500, 5000):
                kernels.ragged_decode(query, spare, spare, *place, scaling=1.0, max_length=max_length)
                kernels.ragged_decode(query, spare, spare, *place, scaling=1.0, max_length=max_length, **both)
    assert {name for name, *_ in found} == {name for name, *_ in variants()}
    strange = [launch for launch in found if launch not in variants()]
    assert not strange, strange[0]
