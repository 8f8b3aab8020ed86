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
from collections.abc import Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from sparsemm_lmms.model_wrappers.sweeps.store import read_cells

TIMES = ("_ms", "_ms_median", "elapsed_s", "peak_memory")


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


def start(output: Path, arguments: dict[str, Any]) -> ForkServerProcess:
    """The sweep in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sparsemm_lmms.model_wrappers.sweeps.runner", "sparsemm_lmms.model_wrappers.base"])
    process = context.Process(target=sweep, args=(str(output), arguments))
    process.start()
    return process


def unbroken(output: Path, arguments: dict[str, Any]) -> float:
    """Run to the end; returns seconds."""
    begun = time.perf_counter()
    process = start(output, arguments)
    process.join()
    assert process.exitcode == 0, f"the unbroken sweep ended with {process.exitcode}"
    return time.perf_counter() - begun


def with_kills(output: Path, arguments: dict[str, Any], moments: Iterator[float]) -> list[tuple[float, int]]:
    """Kill after each of the moments (seconds), then run to the end.

    Returns:
        for each kill its moment and how many cells were complete then.
    """
    kills = []
    for moment in moments:
        process = start(output, arguments)
        process.join(moment)
        assert process.exitcode is None, f"the sweep was over before the kill at {moment:.2f} s"
        process.kill()
        process.join()
        kills.append((moment, sum(1 for _ in read_cells(output))))
    unbroken(output, arguments)
    return kills


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
        "budgets": "160,96,64",
        "limit": 2,
        "batch_size": 2,
    }
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder, "whole"), Path(folder, "broken")
        start(Path(folder, "warm"), {**arguments, "methods": "fullkv"}).join()  # the server imports for this one
        seconds = unbroken(whole, arguments)
        wanted = contents(whole)
        longest = 1.5 * seconds / options.kills  # so that the kills spread over the whole sweep
        kills = with_kills(broken, arguments, (dice.uniform(0, longest) for _ in range(options.kills)))
        for number, (moment, cells) in enumerate(kills, 1):
            print(f"kill {number:>2} after {moment:5.2f} s: {cells:>2} of {len(wanted)} cells complete")
        assert contents(broken) == wanted, "the killed sweep differs from the unbroken one"
    print(f"{len(wanted)} cells, {options.kills} kills: metrics, statistics and samples equal those of {seconds:.0f} s")
    print("without a kill.")


if __name__ == "__main__":
    main()
