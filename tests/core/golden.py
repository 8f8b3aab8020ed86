"""Reference selections of the published research code (see tests/data/golden/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

HERE = Path(__file__).resolve().parents[1] / "data" / "golden"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden"  # only beside the developers' checkouts

CASES: list[dict[str, Any]] = json.loads((HERE / "cases.json").read_text())["cases"]
SETTINGS = ("window_size", "kernel_size", "pooling", "gqa_func", "ratio", "floor_ratio", "normalize", "skip", "budget")


@cache
def arrays() -> Any:
    return np.load(HERE / "selection.npz")


def inputs(case: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 `q [q_heads, n, d]` and `k [kv_heads, n, d]`."""
    names = case["arrays"]
    return tuple(torch.from_numpy(arrays()[names[name]].astype(np.float32)) for name in ("q", "k"))


def head_scores(case: dict[str, Any]) -> np.ndarray | None:
    """Mean scores `[layers, q_heads]` of a sparsemm case."""
    return arrays()[case["arrays"]["head_scores"]].mean(-1) if case["method"] == "sparsemm" else None


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """The CompressionConfig arguments of a case."""
    chosen = {name: case[name] for name in SETTINGS if name in case}
    if "pyram_beta" in case:
        chosen["beta"] = case["pyram_beta"]
    return chosen


def expected(case: dict[str, Any]) -> list[list[int]]:
    """Kept positions of each kv head, ascending."""
    kept, lens = arrays()[case["arrays"]["kept"]], arrays()[case["arrays"]["lens"]]
    return [part.tolist() for part in np.split(kept, np.cumsum(lens)[:-1])]
