"""`sparsemm-lmms sweep` and `demo`: methods x budgets on lmms-eval's tasks, resumable, with tables and figures."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sparsemm_lmms.demo import FAMILIES as DEMO_FAMILIES
from sparsemm_lmms.families import ANY, FAMILIES

if TYPE_CHECKING:
    from sparsemm_lmms.model_wrappers.sweeps.runner import Plan

app = typer.Typer()
DEMO_METHODS = "sparsemm,snapkv,pyramidkv,adakv,local_window,random,permuted,layer_mean"
DEMO_BUDGETS = "64,96,160,768"
DEMO_BATCH = 10


DemoFamily = Enum("DemoFamily", {name: name for name in (*DEMO_FAMILIES, "all")}, type=str)  # type: ignore[misc]
DEFAULT_DEMO = DemoFamily(DEMO_FAMILIES[0])


@app.command()
def sweep(
    output: Annotated[Path, typer.Option(help="Folder of the sweep; one with the same settings is continued.")],
    model: Annotated[
        str, typer.Option(help=f"Comma-separated families: {', '.join(FAMILIES)}; {ANY}: that of pretrained.")
    ] = DEMO_FAMILIES[0],
    model_args: Annotated[
        str, typer.Option("--model_args", help="name=value,... for all cells: pretrained, dtype, ratio, ...")
    ] = "",
    methods: Annotated[
        str,
        typer.Option(
            help="Comma-separated; also SCORER+ALLOCATOR, permuted, layer_mean, uniform, random#3, and METHOD@permuted "
            "of all that read head scores. fullkv always runs."
        ),
    ] = "",
    budgets: Annotated[str, typer.Option(help="Comma-separated tokens per kv head, the window included.")] = "",
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks or groups of lmms-eval.")] = "",
    limit: Annotated[float | None, typer.Option(help="Documents of each task, or their share below 1.")] = None,
    batch_size: Annotated[int, typer.Option("--batch_size", min=1, help="Documents generated together.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of random, permuted and mask_random.")] = 0,
    ablation: Annotated[str, typer.Option(help="Comma-separated: ratio, components, heads, scores.")] = "",
    draws: Annotated[int | None, typer.Option(min=1, help="Draws in ablations; 10 of scores, 5 of heads.")] = None,
    include_path: Annotated[str | None, typer.Option("--include_path", help="A folder with further tasks.")] = None,
    figures: Annotated[str, typer.Option(help="With --figures-only: comma-separated, not all.")] = "",
    figures_only: Annotated[bool, typer.Option("--figures-only", help="Tables and figures of what is there.")] = False,
) -> None:
    """Evaluate methods x budgets with lmms-eval: every cell is kept as soon as it is done, and never run twice.

    --ablation runs its cells in place of the default methods. The same command once for each GPU shares the work.
    """
    if figures and not figures_only:
        raise ValueError(f"--figures {figures} goes with --figures-only: a sweep draws all that its cells allow.")
    if not figures_only:
        from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan

        plan = make_plan(
            families=model,
            model_args=model_args,
            methods=methods,
            budgets=budgets,
            ablations=ablation,
            draws=draws,
            tasks=tasks,
            limit=limit,
            batch_size=batch_size,
            seed=seed,
            include_path=include_path,
        )
        run_plan(plan, output)
    elif not (output / "sweep.json").exists():
        raise FileNotFoundError(f"There is no sweep in {output}; give the --output of one.")
    else:
        report(output, figures)


@app.command()
def demo(
    family: Annotated[DemoFamily, typer.Option(help="Which demo model.")] = DEFAULT_DEMO,
    methods: Annotated[str, typer.Option(help="Comma-separated methods and controls.")] = DEMO_METHODS,
    budgets: Annotated[
        str, typer.Option(help="Comma-separated tokens per head; the window of 32 included.")
    ] = DEMO_BUDGETS,
    limit: Annotated[int, typer.Option(min=1, help="Documents of each task.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Of the random controls.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the tables and figures.")] = Path("sparsemm_demo"),
) -> None:
    """A sweep on the packaged demo models: a table and plots, on the CPU, in about two minutes."""
    from sparsemm_lmms.model_wrappers.sweeps.plan import make_plan

    families = ",".join(DEMO_FAMILIES) if family.value == "all" else family.value
    plan = make_plan(
        families=families,
        model_args="pretrained=demo,device=cpu",
        methods=methods or DEMO_METHODS,
        budgets=budgets or DEMO_BUDGETS,
        limit=limit,
        batch_size=DEMO_BATCH,
        seed=seed,
    )
    run_plan(plan, output)


def run_plan(plan: Plan, output: Path) -> None:
    """Run what is missing and report all that is there.

    Raises:
        SystemExit: when cells failed.
        OSError: when the disk is full.
    """
    from sparsemm_lmms.model_wrappers.sweeps.plan import open_sweep
    from sparsemm_lmms.model_wrappers.sweeps.progress import Display, quiet_host
    from sparsemm_lmms.model_wrappers.sweeps.runner import DISK_FULL, complete, run

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sweep is no job for `accelerate launch`: start the same command once for each GPU instead.")
    open_sweep(output, plan)
    done = [record for cell in plan.cells if (record := complete(output, cell)) is not None]
    display = Display(Console(), plan.cells, done)
    try:
        with display.progress, quiet_host(output / "log.txt"):
            run(plan, output, display)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        advice = "complete cells are kept, so free some space and run the same command again"
        raise OSError(error.errno, f"{error.strerror}; {advice}", str(error.filename or output)) from error
    if len(display.failed) < len(plan.cells):
        report(output)
    if display.failed:
        reasons = dict.fromkeys(record.error for record in display.failed)
        raise SystemExit(
            f"sparsemm-lmms: {len(display.failed)} of {len(plan.cells)} cells failed ({'; '.join(map(str, reasons))}). "
            f"The same command runs them again; {output / 'log.txt'} has the tracebacks."
        )


def report(output: Path, figures: str = "") -> None:
    """Tables and figures from the records of a sweep, and the table on the screen."""
    from sparsemm_lmms.model_wrappers.sweeps.cells import words
    from sparsemm_lmms.reports.report import write_report

    found = write_report(output, words(figures))
    Console().print(found.table)
    print(f"Report with all tables and figures: {output / 'report.md'}")
