"""Kills a sweep with SIGKILL at random moments, resumes it each time, and compares it with an unbroken one.

    python tests/sweeps/kill_run.py --kills 20

Both run in processes of their own, forked from a server that has imported everything, so that the moments fall into
loading, evaluation and writing rather than into imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import tempfile
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from sparsemm_lmms.reports.store import read_cells

TIMES = ("_ms", "_ms_median", "elapsed_s", "peak_memory", "other_cores")


def sweep(output: str, arguments: dict[str, Any]) -> None:
    """What the processes run: the sweep without its tables."""
    from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan, open_sweep
    from sparsemm_lmms.model_wrappers.sweeps.runner import run

    os.environ["HF_HUB_OFFLINE"] = "1"
    plan = make_plan(**arguments)
    open_sweep(Path(output), plan)
    run(plan, Path(output), Silent())


class Silent:
    """Watches nothing."""

    def loading(self, model: Any) -> None: ...

    def starting(self, cell: Any) -> None: ...

    def finished(self, record: Any) -> None: ...


CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["sparsemm_lmms.model_wrappers.sweeps.runner", "sparsemm_lmms.model_wrappers.lmms_eval.model"]
)


def warm_up() -> None:
    """Let the server import everything, so that no time below contains it."""
    process = CONTEXT.Process(target=int)
    process.start()
    process.join()


def start(output: Path, arguments: dict[str, Any]) -> ForkServerProcess:
    """The sweep in a process of its own."""
    process = CONTEXT.Process(target=sweep, args=(str(output), arguments))
    process.start()
    return process


def unbroken(output: Path, arguments: dict[str, Any]) -> float:
    """Run to the end; returns seconds."""
    begun = time.perf_counter()
    process = start(output, arguments)
    process.join()
    assert process.exitcode == 0, f"the unbroken sweep ended with {process.exitcode}"
    return time.perf_counter() - begun


def with_kills(
    output: Path, arguments: dict[str, Any], kills: int, cell_seconds: float, dice: random.Random
) -> list[tuple[float, int]]:
    """Kill, resume and kill again, then run to the end.

    Half of the kills fall into loading and the first cell, half into what follows the next cell to be complete.

    Args:
        cell_seconds: what a cell takes; a kill waits up to so long after the moment from which it counts.

    Returns:
        for each kill the seconds since the start and how many cells were complete; fewer if the sweep ends before.
    """
    done = []
    for _ in range(kills):
        wanted = count(output) + dice.randint(0, 1)
        begun = time.perf_counter()
        process = start(output, arguments)
        while count(output) < wanted and process.exitcode is None:
            time.sleep(0.005)
        process.join(dice.uniform(0, cell_seconds))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        done.append((time.perf_counter() - begun, count(output)))
    unbroken(output, arguments)
    return done


def count(output: Path) -> int:
    """Complete cells."""
    return sum(1 for _ in output.glob("cells/*/cell.json"))


def contents(output: Path) -> dict[str, Any]:
    """All that a sweep found, without times and memory, by cell."""
    found = {}
    for record in read_cells(output):
        statistics = {
            task: {name: value for name, value in values.items() if not name.endswith(TIMES)}
            for task, values in record.statistics.items()
        }
        about = (record.model, record.method, record.budget, record.variant, record.settings, record.error)
        found[record.name] = (about, record.metrics, statistics, record.samples)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    arguments = {
        "model_args": "pretrained=demo,device=cpu",
        "methods": "sparsemm,snapkv,adakv,random",
        "tasks": "sparsemm_demo_vqa",
        "limit": 2,
        "batch_size": 2,
    }
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        warm_up()
        seconds = unbroken(whole, arguments)
        wanted = contents(whole)
        kills = with_kills(broken, arguments, options.kills, seconds / len(wanted), dice)
        for number, (moment, cells) in enumerate(kills, 1):
            print(f"kill {number:>2} after {moment:5.2f} s: {cells:>2} of {len(wanted)} cells complete")
        assert contents(broken) == wanted, "the killed sweep differs from the unbroken one"
    print(f"{len(wanted)} cells, {len(kills)} kills: metrics, statistics and samples equal those of the unbroken run")


if __name__ == "__main__":
    main()
