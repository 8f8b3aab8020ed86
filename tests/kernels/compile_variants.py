"""Compile every variant that the launchers can choose, without a GPU; one JSON line each with registers and stack.

Run by test_compile.py in a process without TRITON_INTERPRET; also a command: `compile_variants.py [most|rest|all]`.
`most` is those of bfloat16 (and 16-bit copies), and for sm_90 every variant without soft cap and sinks; `rest` the
others. The split only bounds the time of an ordinary test run: each variant takes about a second.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ARCHITECTURES = (80, 90)
INT32 = {"start", "length", "capacity", "count", "index", "new_count", "overflow", "pad"}
FLOAT32 = {"part_out", "part_lse", "partial", "mean"}
SCALAR_FLOAT = {"scale", "scaling", "softcap"}
ABSENT = {  # arguments that may be None
    "window_score._statistics_kernel": ("sinks", "softcap"),
    "window_score._mean_kernel": ("softcap",),
    "ragged_decode._decode_kernel": ("sinks", "softcap"),
}
ROWS = {"keys", "values", "new_keys", "new_values", "key", "value", "out_keys", "out_values", "query", "out", "sinks"}


def variants() -> list[tuple[str, str, dict[str, int | None], int, int]]:
    """(kernel, dtype, constexprs, num_warps, num_stages), written out: head_dims 32 to 128, every group size.

    test_compile.py checks that what the launchers launch is in this list. Of the kernels that know them, each variant
    comes without soft cap and sinks, which are None then, and with both.
    """
    found = []
    for block_d in (64, 128):
        for bits in ("i16", "i32"):
            found.append(("append._append_kernel", bits, dict(BLOCK_D=block_d, BLOCK_T=1), 1, 3))
            found.append(("append._append_kernel", bits, dict(BLOCK_D=block_d, BLOCK_T=32), 4, 3))
            found.append(("evict._evict_kernel", bits, dict(BLOCK_D=block_d, BLOCK_M=32), 4, 3))
        for dtype, size in (("fp16", 2), ("bf16", 2), ("fp32", 4)):
            tile = 32768 // (block_d * size)  # columns of 32 KiB of keys; float32 scores and all decodes take half
            rows, columns = (32, min(tile, 128)) if size == 2 else (16, tile // 2)
            score = dict(BLOCK_D=block_d, BLOCK_W=rows, BLOCK_N=columns)
            found.append(("window_score._statistics_kernel", dtype, score, 4, 3))
            found.append(("window_score._mean_kernel", dtype, {**score, "MAX_SPLITS": 32}, 4, 3))
            decode = dict(BLOCK_D=block_d, BLOCK_N=tile // 2, ITEMS=256)
            found.append(("ragged_decode._decode_kernel", dtype, {**decode, "BLOCK_M": 16}, 4 if size == 2 else 8, 3))
            if size == 2:
                found.append(("ragged_decode._decode_kernel", dtype, {**decode, "BLOCK_M": 64}, 8, 3))
            found.append(("ragged_decode._merge_kernel", dtype, dict(BLOCK_D=block_d, ITEMS=256, PARTS=16), 4, 3))
    found.append(("window_score._pool_kernel", "fp32", dict(BLOCK_P=1024), 4, 3))
    for name, dtype, constants, warps, stages in found[:]:
        if name in ABSENT:
            none = dict.fromkeys(ABSENT[name])
            found.append((name, dtype, {**constants, **none}, warps, stages))
    return found


def compile_one(job: tuple[tuple[str, str, dict[str, int | None], int, int], int]) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    import sparsemm_lmms.kernels  # noqa: F401

    (name, dtype, constants, warps, stages), architecture = job
    module, function = name.split(".")
    kernel = getattr(sys.modules[f"sparsemm_lmms.kernels.{module}"], function)
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in INT32:
            signature[argument] = "*i32"
        elif argument in FLOAT32 or (function == "_pool_kernel" and argument == "out"):
            signature[argument] = "*fp32"
        elif argument in ROWS:
            signature[argument] = f"*{dtype}"
        else:
            signature[argument] = "fp32" if argument in SCALAR_FLOAT else "i32"
    # What triton finds out about real arguments: allocations and rows of 16 or more numbers are aligned.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if signature[argument].startswith("*") or "stride" in argument or argument == "head_dim"
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    usage = resource_usage(compiled.asm["cubin"])
    return dict(
        kernel=function,
        dtype=dtype,
        **constants,
        sm=architecture,
        shared=compiled.metadata.shared,
        num_warps=warps,
        **usage,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack a thread of a cubin, read by the cuobjdump that comes with triton; spills live on
    the stack. (`CompiledKernel.n_spills` needs a device.)"""
    import triton.backends.nvidia as nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    fields = dict(field.split(":") for field in line.split() if ":" in field)
    return {"registers": int(fields["REG"]), "stack": int(fields["STACK"])}


def jobs(which: str) -> list[tuple[tuple[str, str, dict[str, int | None], int, int], int]]:
    every = [(variant, architecture) for variant in variants() for architecture in ARCHITECTURES]
    most = []
    for (name, dtype, constants, *rest), architecture in every:
        plain = name not in ABSENT or "softcap" in constants
        if dtype in ("bf16", "i16") or (architecture == 90 and plain):
            most.append(((name, dtype, constants, *rest), architecture))
    return {"all": every, "most": most, "rest": [job for job in every if job not in most]}[which]


def main(which: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        for result in pool.map(compile_one, jobs(which)):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "all")
