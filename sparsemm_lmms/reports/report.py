"""The report of a sweep: tables, figures and sentences, made from its records alone.

<sweep>/report.md, report.json   for readers, for programs
<sweep>/tables/*.csv             results.csv: everything, a line a method, budget, variant, task and metric
<sweep>/figures/*.png, *.svg
<sweep>/cells.jsonl.xz           all records in one file: the folder without `cells/` is a whole sweep to publish
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_lmms.json_files import one_line
from sparsemm_lmms.reports import plots, tables
from sparsemm_lmms.reports.markdown import item
from sparsemm_lmms.reports.statistics import Block, blocks
from sparsemm_lmms.reports.store import CellRecord, read_cells, read_plan, write_compact, write_text

if TYPE_CHECKING:
    from rich.console import Group

ABLATIONS = {
    "ratio": "the share of the budget that every head gets alike (Table 1)",
    "mask_ratio": "heads silenced: the best visual ones, or as many others",
}


@dataclass(frozen=True, eq=False)
class Report:
    """What `write_report` found.

    Attributes:
        grids: methods x budgets of the main metric of each model and task.
        failed: cells that have no results.
        figures: names of those drawn.
    """

    folder: Path
    grids: tuple[tables.Grid, ...]
    failed: tuple[CellRecord, ...]
    figures: tuple[str, ...]

    @property
    def table(self) -> Group:
        """The grids for a terminal."""
        from rich.console import Group

        return Group(*(grid.rich() for grid in self.grids))


def write_report(sweep: Path, figures: Sequence[str] = ()) -> Report:
    """Write everything anew from the records of a sweep, without a model.

    Args:
        figures: names of those to draw; none for all that the cells allow.

    Raises:
        ValueError: when no cell has results, for an unknown figure, or for one that lacks its cells; for a file of the
            sweep that is damaged.
    """
    plan, records = read_plan(sweep), list(read_cells(sweep))
    failed = tuple(record for record in records if record.error is not None)
    found = list(blocks(records))
    if not found:
        raise ValueError(f"{sweep} holds no cell with results{_reasons(failed)}; run the sweep first.")
    shown = tables.primary(found)
    names = list(figures) or plots.figure_names(shown)
    for name in names:
        plots.draw(name, shown, sweep / "figures")
    grids = tuple(tables.accuracy(block) for block in shown if block.compared())
    write_text(sweep / "tables" / "results.csv", _results(found))
    for block in shown:
        stem = "__".join(re.sub(r"[^\w.,+=@()-]", "_", name)[:100] for name in (block.model, block.task))
        for name, grid in _grids(block).items():
            write_text(sweep / "tables" / f"{stem}__{name}.csv", grid.csv())
    write_text(sweep / "report.json", json.dumps(_facts(plan, records, found), indent=1, ensure_ascii=False) + "\n")
    write_compact(sweep, records)
    drawn = tuple(name for name in plots.FIGURES if (sweep / "figures" / f"{name}.png").exists())
    write_text(sweep / "report.md", _markdown(plan, records, shown, failed, drawn))
    return Report(sweep, grids, failed, drawn)


def _grids(block: Block) -> dict[str, tables.Grid]:
    """All tables of a block, by the ends of their files' names."""
    grids: dict[str, tables.Grid] = {}
    if block.compared():
        grids |= {"accuracy": tables.accuracy(block), "against_fullkv": tables.against_fullkv(block)}
        grids["cost"] = tables.cost(block)
    if (grid := tables.spread(block)) is not None:
        grids["draws"] = grid
    for name in ABLATIONS:
        if (grid := tables.variants(block, name)) is not None:
            grids[name] = grid
    return grids


def _results(found: Sequence[Block]) -> str:
    lines: list[dict[str, Any]] = [_line(block, facts) for block in found for facts in _rows(block)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def _line(block: Block, facts: dict[str, Any]) -> dict[str, Any]:
    where = {"model": block.model, "task": block.task, "metric": block.metric, "documents": block.documents}
    variant = " ".join(f"{name}={value:g}" for name, value in facts["variant"].items())
    return {**where, **facts, "variant": variant}


def _rows(block: Block) -> list[dict[str, Any]]:
    return [row.facts() for row in block.rows]


def _facts(plan: dict[str, Any], records: Sequence[CellRecord], found: Sequence[Block]) -> dict[str, Any]:
    return {
        "settings": plan.get("settings"),
        "environment": _environments(records),
        "seconds": sum(record.seconds for record in records),
        "failed": {record.name: record.error for record in records if record.error is not None},
        "resamples": max((len(block.resampled) for block in found), default=0),
        "blocks": [
            {
                **{name: getattr(block, name) for name in ("model", "family", "task", "metric", "documents")},
                "sentences": tables.sentences(block),
                "rows": _rows(block),
            }
            for block in found
        ],
    }


def _environments(records: Sequence[CellRecord]) -> list[dict[str, Any]]:
    """Machines and versions that cells ran with, each once."""
    texts = dict.fromkeys(json.dumps(r.environment, sort_keys=True) for r in records if r.environment)
    return [json.loads(text) for text in texts]


def _markdown(
    plan: dict[str, Any],
    records: Sequence[CellRecord],
    shown: Sequence[Block],
    failed: Sequence[CellRecord],
    drawn: Sequence[str],
) -> str:
    settings = plan.get("settings") or {}
    told = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    parts = [f"# Sweep\n\n{len(records)} cells, {sum(r.seconds for r in records):.0f} s of evaluation. {told}\n"]
    if failed:
        parts.append("**Failed cells**\n\n" + "".join(item(f"{record.name}: {record.error}") for record in failed))
    parts += [f"![{name}](figures/{name}.png)\n" for name in drawn if name in ("accuracy", "pareto")]
    if "pareto" in drawn and not all(block.is_quiet for block in shown):
        parts.append(f"{plots.NO_TIMES}\n")
    if any(block.compared() for block in shown):
        parts.append(tables.LEGEND + "\n")
    for block in shown:
        if not block.compared():
            continue
        parts += [tables.accuracy(block).markdown(), tables.note(block)]
        parts += ["".join(f"* {line}\n" for line in [*tables.sentences(block), *_other_aggregate(block)])]
        parts += [tables.against_fullkv(block).markdown(), tables.cost(block).markdown()]
    for name, title in ABLATIONS.items():
        grids = [grid for block in shown if (grid := tables.variants(block, name)) is not None]
        if grids:
            parts += [f"## {name}: {title}\n", *(grid.markdown() for grid in grids)]
    spreads = [grid.markdown() for block in shown if (grid := tables.spread(block)) is not None]
    if spreads:
        parts += ["## Draws of the controls\n", *spreads]
    parts += [f"![{name}](figures/{name}.png)\n" for name in drawn if name not in ("accuracy", "pareto")]
    for where in _environments(records):
        parts.append("```json\n" + json.dumps(where, indent=1, ensure_ascii=False) + "\n```\n")
    return "\n".join(parts)


def _other_aggregate(block: Block) -> list[str]:
    """A line where the host's own aggregate is not the mean of the documents' scores, such as OCRBench with a limit."""
    rows = [row for row in block.rows if row.mean is not None and row.host is not None]
    if all(abs(row.mean.value - row.host) <= 1e-6 * max(1, abs(row.host)) for row in rows if row.mean and row.host):
        return []
    return ["shown are means of the documents' scores; the host aggregates otherwise: `host` in tables/results.csv"]


def _reasons(failed: Sequence[CellRecord]) -> str:
    return f" ({one_line('; '.join(dict.fromkeys(str(record.error) for record in failed)))})" if failed else ""
