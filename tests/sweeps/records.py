"""Records of sweeps that no model ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sparsemm_lmms.reports.store import CellRecord, Sample, write_cell

BUDGETS = (48, 96, 768)
PROMPT = 600


def cell(
    method: str,
    budget: int | None,
    scores: dict[str, dict[str, list[float]]],
    model: str = "llava_next demo",
    variant: dict[str, Any] | None = None,
    host: float | None = None,
) -> CellRecord:
    """A cell with these scores: task -> metric -> one a document; `host` stands in for the means of all metrics."""
    variant = variant or {}
    kept = float(min(budget or PROMPT, PROMPT))
    samples = [
        Sample(task, i, {m: v[i] for m, v in metrics.items()}, "said", "wanted", PROMPT, 7, 0.9 * kept)
        for task, metrics in scores.items()
        for i in range(len(next(iter(metrics.values()))))
    ]
    means = {t: {m: float(np.mean(v)) if host is None else host for m, v in ms.items()} for t, ms in scores.items()}
    measured = {"kept_tokens": 0.9 * kept, "prompt_tokens": float(PROMPT), "kv_bytes_used": 8192 * kept}
    measured |= {"kv_bytes": 9000 * kept, "tpot_ms_median": 5 + kept / 100, "ttft_ms_median": 300.0, "num_requests": 2}
    name = "__".join([model, method, str(budget), *(f"{k}{v}" for k, v in variant.items())])
    return CellRecord(
        name=name.replace(" ", "_").replace("#", "_"),
        model=model,
        family="llava_next",
        method=method,
        budget=budget,
        variant=variant,
        settings={"model": f"llava_next_{method}", "pretrained": "demo", "seed": method.partition("#")[2]},
        metrics=means,
        statistics={task: measured for task in scores},
        seconds=2.0,
        environment={"gpu": None, "num_processes": 1, "versions": {"torch": "2.14.1"}, "kernel_backend": "torch"},
        samples=tuple(samples),
    )


def write_sweep(
    folder: Path, model: str = "llava_next demo", task: str = "sparsemm_demo_vqa", metric: str = "exact_match"
) -> Path:
    """All figures' cells on 12 documents, with scores that fall with the budget and the method."""
    dice = np.random.default_rng(0)
    hard = dice.permutation(12) / 12

    def put(method: str, budget: int | None, skill: float, variant: dict[str, float] | None = None) -> None:
        scores = (hard < skill).astype(float).tolist()
        write_cell(folder, cell(method, budget, {task: {metric: scores}}, model, variant))

    put("fullkv", None, 1)
    names = ["sparsemm", "snapkv", "local_window", "layer_mean", "uniform", *(f"random#{i}" for i in range(3))]
    for place, method in enumerate(names):
        for budget in BUDGETS:
            put(method, budget, 1 if budget > PROMPT else 0.9 - place / 10 + budget / 1000)
    for ratio in (0.0, 0.1, 1.0):
        put("sparsemm", 96, 0.9 - ratio / 2, {"ratio": ratio})
    for ratio in (0.1, 0.3):
        put("mask", None, 0.8 - ratio, {"mask_ratio": ratio})
        put("mask_random#0", None, 1 - ratio, {"mask_ratio": ratio})
        put("mask_random#1", None, 0.9 - ratio, {"mask_ratio": ratio})
    (folder / "sweep.json").write_text('{"settings": {"limit": 12, "seed": 0}}')
    return folder
