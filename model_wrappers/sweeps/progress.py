"""How a sweep tells where it is: a bar with an estimate on a terminal, and one line for each finished cell anywhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from statistics import fmean

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparsemm_lmms.model_wrappers.sweeps.cells import Cell, SweptModel
from sparsemm_lmms.reports.store import CellRecord


class Display:
    """Follows a sweep. Cells that stood finished before count, and their times enter the estimate.

    Args:
        cells: all cells of the sweep.
        done: records of those that need not run.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], done: Sequence[CellRecord]) -> None:
        self.console, self.left = console, {cell.name: cell.model.label for cell in cells}
        self.total, self.seconds, self.failed = len(cells), dict[str, list[float]](), list[CellRecord]()
        for record in done:
            self._count(record)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, TextColumn("{task.fields[estimate]}"), console=console, transient=True)
        self.bar = self.progress.add_task("", total=self.total, completed=len(done), estimate="")
        console.print(f"{self.total} cells" + (f", {len(done)} of them done before" if done else ""), highlight=False)

    def loading(self, model: SweptModel) -> None:
        self.progress.update(self.bar, description=f"loading {model.label}")

    def starting(self, cell: Cell) -> None:
        self.progress.update(self.bar, description=cell.name, estimate=self.estimate())

    def finished(self, record: CellRecord) -> None:
        self._count(record)
        number = self.total - len(self.left)
        self.progress.update(self.bar, completed=number, estimate=self.estimate())
        if record.error:
            self.failed.append(record)
            found = f"failed: {record.error}"
        else:
            found = "  ".join(f"{task} {next(iter(v.values())):.4g}" for task, v in record.metrics.items() if v)
        text = f"{number:>{len(str(self.total))}}/{self.total} {record.name}  {found}  {record.seconds:.1f} s"
        self.console.print(text, f" {self.estimate()}", markup=False, highlight=False, soft_wrap=True)

    def estimate(self) -> str:
        """Time that the cells left will take, each as long as those of its model took on average."""
        if not self.left or not self.seconds:
            return ""
        anywhere = fmean(value for values in self.seconds.values() for value in values)
        seconds = sum(fmean(self.seconds.get(label) or [anywhere]) for label in self.left.values())
        return f"about {seconds:.0f} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"

    def _count(self, record: CellRecord) -> None:
        self.left.pop(record.name, None)
        if record.error is None:
            self.seconds.setdefault(record.model, []).append(record.seconds)


@contextmanager
def quiet_host(log: Path) -> Iterator[None]:
    """Send what lmms-eval and this package log, and the host's bars, to a file: there would be hundreds of them."""
    with log.open("a", encoding="utf-8") as file:
        logger.remove()
        logger.add(file, level="INFO")
        try:
            with redirect_stderr(file):
                yield
        finally:
            logger.remove()
            logger.add(_to_stderr)


def _to_stderr(message: str) -> None:
    print(message, end="", file=sys.stderr)
