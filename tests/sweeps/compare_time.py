"""Times a sweep against one lmms-eval run for each of its cells, and checks that both find the same.

python tests/sweeps/compare_time.py --limit 8
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sparsemm_lmms.cli import tasks_folder
from sparsemm_lmms.model_wrappers.lmms_eval.commands import metrics
from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan
from sparsemm_lmms.reports.store import read_cells

SWEEP = "import sys; from sparsemm_lmms.cli import main; sys.argv[0] = 'sparsemm-lmms'; main()"


def timed(command: list[str]) -> float:
    begun = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=8, help="documents of each task")
    parser.add_argument("--batch_size", type=int, default=8)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    given = {"model_args": "pretrained=demo,device=cpu", "methods": "sparsemm,snapkv", "budgets": "96,64"}
    plan = make_plan(**given, limit=options.limit, batch_size=options.batch_size, ablations="components")
    shared = ["--limit", str(options.limit), "--batch_size", str(options.batch_size)]
    with tempfile.TemporaryDirectory() as folder:
        texts = [text for name, value in given.items() for text in (f"--{name}", value)]
        texts += ["--ablation", "components", "--output", f"{folder}/sweep"]
        whole = timed([sys.executable, "-c", SWEEP, "sweep", *texts, *shared])
        found = {record.name: record for record in read_cells(Path(folder, "sweep"))}
        alone = 0.0
        for cell in plan.cells:
            arguments = cell.arguments(plan.seed, plan.batch_size)
            model_args = ",".join(f"{name}={value}" for name, value in arguments.items() if name != "batch_size")
            host = ["--model", f"{cell.model.family}_{cell.registered_name}", "--model_args", model_args]
            host += ["--tasks", ",".join(plan.tasks), "--include_path", str(tasks_folder())]
            host += ["--output_path", f"{folder}/{cell.name}"]
            seconds = timed([sys.executable, "-m", "lmms_eval", *host, *shared])
            alone += seconds
            file = next(Path(folder, cell.name).rglob("*_results.json"))
            theirs = metrics(json.loads(file.read_text()))
            ours = {(t, f"{m},none"): v for t, values in found[cell.name].metrics.items() for m, v in values.items()}
            assert theirs.keys() == ours.keys(), (cell.name, theirs, ours)
            assert all(math.isclose(theirs[key], ours[key]) for key in ours), (cell.name, theirs, ours)
            print(
                f"{cell.name:<40} alone {seconds:6.1f} s, in the sweep {found[cell.name].seconds:5.1f} s, equal metrics"
            )
    print(f"{len(plan.cells)} cells: sweep {whole:.1f} s, separate runs {alone:.1f} s, ratio {whole / alone:.2f}")


if __name__ == "__main__":
    main()
