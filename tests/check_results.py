"""Fail unless each given lmms-eval output folder holds results of a demo run, and all agree in their scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def scores(folder: str) -> dict[str, float]:
    """Metric -> value of the demo task in the newest results file below `folder`."""
    files = sorted(Path(folder).rglob("*results.json"))
    if not files:
        raise SystemExit(f"no results file below {folder}")
    data = json.loads(files[-1].read_text())
    kept = data["throughput"]["avg_kept_tokens"]
    if not 32 < kept <= 64.5:
        raise SystemExit(f"{files[-1]}: {kept} tokens kept at budget 64")
    task = data["results"]["sparsemm_demo_ocr"]
    return {name: value for name, value in task.items() if isinstance(value, float) and "stderr" not in name}


if __name__ == "__main__":
    runs = [scores(folder) for folder in sys.argv[1:]]
    print(runs[0])
    if any(run != runs[0] for run in runs):
        raise SystemExit(f"the runs differ: {runs}")
