"""`bench decode` and `bench prefill`: methods side by side on a preset, over contexts and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsemm_lmms.bench.measure import (
    Spread,
    circumstances,
    copy_bandwidth,
    pick_device,
    rotated,
    streamed_bytes,
    write_row,
)
from sparsemm_lmms.bench.presets import build, find, prompt
from sparsemm_lmms.bench.report import print_table, save_plot
from sparsemm_lmms.bench.runs import Run, Variant, compression_seconds, generate, prefill_peak


@dataclass(frozen=True)
class Row:
    """One method at one context and batch. Times in milliseconds, sizes in bytes.

    Attributes:
        ms_per_token: of a decode step (one token for every sequence); tokens_per_s over the batch.
        of_stock: the median over the rounds of its time a token over that of `stock` in the same round.
        prefill_ms: to the first token, vision tower included; compression_ms: the part that chooses and copies.
        limit_ms: (weights + KV bytes used) / copy bandwidth, the least that a step can take; over_limit: the ratio.
        error: why there are no numbers (out of memory), else None.
    """

    command: str
    preset: str
    method: str
    context: int
    batch: int
    budget: int | None
    new_tokens: int
    dtype: str
    repeats: int
    ms_per_token: Spread | None = None
    tokens_per_s: float | None = None
    of_stock: float | None = None
    prefill_ms: Spread | None = None
    compression_ms: float | None = None
    kv_bytes_allocated: int | None = None
    kv_bytes_used: int | None = None
    kv_bytes_ideal: int | None = None
    peak_memory: int | None = None
    limit_ms: float | None = None
    over_limit: float | None = None
    copy_gb_per_s: float | None = None
    error: str | None = None
    circumstances: dict[str, Any] | None = None


def measure(
    command: str,
    preset: str,
    contexts: Sequence[int],
    batches: Sequence[int],
    budget: int,
    methods: Sequence[str],
    new_tokens: int,
    repeats: int,
    device_name: str,
    dtype_name: str,
    compiled: bool,
    output: Path | None,
) -> list[Row]:
    """Measure, print a table, and write rows and plot."""
    variants = [Variant(name) for name in methods]
    find(preset)
    device = pick_device(device_name)
    dtype = getattr(torch, dtype_name or ("bfloat16" if device.type == "cuda" else "float32"))
    bandwidth = copy_bandwidth(device)
    model = build(preset, device, dtype)
    rows: list[Row] = []
    for context in contexts:
        for batch in batches:
            common = dict(
                command=command, preset=preset, context=context, batch=batch, new_tokens=new_tokens, repeats=repeats,
                dtype=str(dtype).removeprefix("torch."), copy_gb_per_s=bandwidth / 1e9,
                circumstances=circumstances(device),
            )  # fmt: skip
            inputs = prompt(preset, model, context, batch)
            for row in side_by_side(model, inputs, variants, budget, common, bandwidth, compiled):
                rows.append(row)
                write_row(output, row)
    print_table(rows)
    if output is not None:
        print(f"Written: {output} and {save_plot(rows, output.with_suffix('.png'))}")
    return rows


def side_by_side(
    model: Any,
    inputs: dict[str, torch.Tensor],
    variants: Sequence[Variant],
    budget: int,
    common: dict[str, Any],
    bandwidth: float,
    compiled: bool,
) -> list[Row]:
    """All variants on the same prompts, in turns; each run starts from a fresh state."""
    runs: dict[str, list[Run]] = {variant.name: [] for variant in variants}
    errors: dict[str, str] = {}
    new_tokens, prefill = common["new_tokens"], common["command"] == "prefill"
    by_name = {variant.name: variant for variant in variants}
    for turn in range(-1, common["repeats"]):  # turn -1 warms up: kernels compile, allocators grow
        for name in rotated(list(runs), max(turn, 0)):
            if name in errors:
                continue
            try:
                run = generate(model, inputs, by_name[name], budget, new_tokens, compiled)
            except torch.OutOfMemoryError as error:
                errors[name] = f"out of memory: {str(error).splitlines()[0]}"
                continue
            if turn >= 0:
                runs[name].append(run)
    rows = []
    for variant in variants:
        ours: dict[str, Any] = {
            "method": variant.name,
            "budget": None if variant.method in (None, "fullkv") else budget,
        }
        if variant.name in errors:
            rows.append(Row(**common, **ours, error=errors[variant.name]))
            continue
        done = runs[variant.name]
        numbers: dict[str, Any] = {}
        if not prefill:
            steps = Spread.of([1e3 * run.tpot for run in done if run.tpot is not None])
            limit = 1e3 * (streamed_bytes(model) + done[0].kv_used) / bandwidth
            numbers |= {
                "ms_per_token": steps,
                "of_stock": _ratio(done, runs.get("stock", [])),
                "tokens_per_s": 1e3 * common["batch"] / steps.median,
                "limit_ms": limit,
                "over_limit": steps.median / limit,
            }
        if variant.method is not None:
            numbers["compression_ms"] = 1e3 * compression_seconds(model, inputs, variant, budget)
        peaks = [run.peak for run in done if run.peak is not None]
        rows.append(
            Row(
                **common,
                **ours,
                **numbers,
                prefill_ms=Spread.of([1e3 * run.ttft for run in done]),
                kv_bytes_allocated=done[0].kv_allocated,
                kv_bytes_used=done[0].kv_used,
                kv_bytes_ideal=done[0].kv_ideal,
                peak_memory=max(peaks) if peaks else prefill_peak(model, inputs, variant, budget),
            )
        )
    return rows


def _ratio(runs: list[Run], stock: list[Run]) -> float | None:
    """Round by round, because whatever else the machine does slows both runs of a round."""
    pairs = [(a.tpot, b.tpot) for a, b in zip(runs, stock, strict=False)]
    ratios = [mine / theirs for mine, theirs in pairs if mine is not None and theirs is not None]
    return median(ratios) if ratios else None
