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


class Scored:
    """One case of `scorers.json`: its tensors in float32, and its entries."""

    def __init__(self, folder: Path, case: dict[str, Any]) -> None:
        self.case, self.entries = case, case["methods"]
        self.arrays = _load(folder / "scorers.npz")
        names = ("window_size", "budget", "kernel_size", "pooling", "gqa_func")
        self.settings = {name: case[name] for name in names}

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name].astype(np.float32))

    @property
    def layers(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Query, key and value of each layer; the value is that of the first in all of them."""
        name, value = self.case["id"], self.tensor(f"{self.case['id']}.v0")
        return [(self.tensor(f"{name}.q{i}"), self.tensor(f"{name}.k{i}"), value) for i in range(self.case["layers"])]

    def more(self, entry: dict[str, Any]) -> dict[str, Any]:
        """The settings of one entry alone."""
        return {"h": self.tensor(entry["h"])} if "h" in entry else {}


@cache
def _load(path: Path) -> Any:
    return np.load(path)


def scored() -> list[Scored]:
    """All cases where they are at hand, else those that are shipped."""
    folder = SHARED / "scorers" if (SHARED / "scorers").is_dir() else HERE
    return [Scored(folder, case) for case in json.loads((folder / "scorers.json").read_text())["cases"]]
