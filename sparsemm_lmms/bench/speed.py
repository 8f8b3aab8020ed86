"""`sparsemm-lmms bench decode|prefill|kernels|compression|memory`: the command lines; torch is imported on use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.families import FAMILIES

PRESETS = [name for family in FAMILIES.values() for name in family.bench]
SMALLEST = next(name for name in FAMILIES[DEMO_FAMILIES[0]].bench if name.startswith("tiny-"))
Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")]
Contexts = Annotated[str, typer.Option(help="Comma-separated tokens in the prompt, image tokens included.")]
Batches = Annotated[str, typer.Option(help="Comma-separated batch sizes.")]
Budget = Annotated[int, typer.Option(min=33, help="Tokens kept per kv head on average, the window of 32 included.")]
Methods = Annotated[
    str,
    typer.Option(help="Comma-separated: stock, stock-static, methods of ours, and <method>-eager without a graph."),
]
NewTokens = Annotated[int, typer.Option(min=2, help="Tokens generated in every run.")]
Repeats = Annotated[int, typer.Option(min=1, help="Runs of every method, in turns.")]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, cpu; default CUDA before CPU.")]
Dtype = Annotated[str, typer.Option(help="float32, float16, bfloat16; default bfloat16 on CUDA, float32 elsewhere.")]
Compiled = Annotated[bool, typer.Option(help="Compile stock-static on a CPU too (minutes).")]
Output = Annotated[Path | None, typer.Option(help="JSON lines, appended; the plot stands beside them.")]

SIDE_BY_SIDE = "stock,stock-static,fullkv-eager,fullkv,snapkv,sparsemm"


def numbers(name: str, text: str) -> list[int]:
    """`1,8` as integers."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}={text!r} must be positive numbers with commas between them, for example 2048,8192.")
    return [int(part) for part in parts]


def decode(
    preset: Preset = SMALLEST,
    context: Contexts = "512,1024",
    batch: Batches = "1",
    budget: Budget = 256,
    methods: Methods = SIDE_BY_SIDE,
    new_tokens: NewTokens = 64,
    repeats: Repeats = 5,
    device: Device = "",
    dtype: Dtype = "",
    compiled: Compiled = False,
    output: Output = None,
) -> None:
    """Time of a decode step, memory of the cache, and the limit that memory bandwidth sets."""
    from sparsemm_lmms.bench.generation import measure

    measure(
        "decode", preset, numbers("context", context), numbers("batch", batch), budget, _names(methods), new_tokens,
        repeats, device, _dtype(dtype), compiled, output,
    )  # fmt: skip


def prefill(
    preset: Preset = SMALLEST,
    context: Contexts = "512,1024",
    batch: Batches = "1",
    budget: Budget = 256,
    methods: Methods = "stock,fullkv,snapkv,sparsemm",
    repeats: Repeats = 5,
    device: Device = "",
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """Time to the first token, the part of it that compression takes, and the peak of memory."""
    from sparsemm_lmms.bench.generation import measure

    measure(
        "prefill", preset, numbers("context", context), numbers("batch", batch), budget, _names(methods), 1, repeats,
        device, _dtype(dtype), False, output,
    )  # fmt: skip


def kernels(
    device: Device = "",
    repeats: Annotated[int, typer.Option(min=1, help="Calls of every kernel.")] = 30,
    output: Output = None,
) -> None:
    """What each kernel reaches of the copy bandwidth; on a GPU also in a graph and beside varlen_attn."""
    from sparsemm_lmms.bench.kernels import measure

    measure(device, repeats, output)


def compression(
    heads: Annotated[int, typer.Option(min=1, help="Heads of the layer (query and kv).")] = 32,
    context: Annotated[int, typer.Option(min=64, help="Tokens in the prompt.")] = 2048,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    budget: Budget = 256,
    repeats: Repeats = 31,
    device: Device = "",
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """One layer's compression beside the way of the published research code, and every scorer's beside SnapKV's."""
    from sparsemm_lmms.bench import compression, scorers

    for part in (compression, scorers):
        part.measure(heads, context, head_dim, budget, repeats, device, _dtype(dtype), output)


def memory(
    preset: Preset = SMALLEST,
    prompts: Annotated[int, typer.Option(min=6, help="Prompts in a row.")] = 500,
    method: Annotated[str, typer.Option(help="A method of ours, or stock.")] = "sparsemm",
    budget: Budget = 64,
    device: Device = "",
    dtype: Dtype = "",
    output: Output = None,
) -> None:
    """Many prompts in a row: what is alive after the last must be what was alive after the fifth."""
    from sparsemm_lmms.bench.memory import measure

    if not measure(preset, prompts, method, budget, device, _dtype(dtype), output):
        raise typer.Exit(1)


def _names(text: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ValueError(f"methods={text!r} names none; for example {SIDE_BY_SIDE}.")
    return names


def _dtype(name: str) -> str:
    if name not in ("", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype={name!r} is unknown; use float32, float16 or bfloat16.")
    return name
