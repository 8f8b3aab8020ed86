"""Tables in the paper's layout: methods x budgets, and what ablations changed; as Markdown, CSV and on a terminal."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from sparsemm_lmms.reports.markdown import plain
from sparsemm_lmms.reports.paper import TASKS, published
from sparsemm_lmms.reports.statistics import CONTROLS, Block, Interval, Row

if TYPE_CHECKING:
    from rich.table import Table as RichTable

PRIMARY = {"sparsemm_demo_ocr": "character_accuracy"} | {task: known.metric for task, known in TASKS.items()}
"""The metric of a task that tables and figures show; of other tasks the first with scores of documents."""

TIE = 1e-9  # means of the same scores in another order
LEGEND = (
    "Brackets: 95 % bootstrap interval over documents. **Bold**: best of the column. `≈` sparsemm is not "
    "distinguishable from the best other row, `▼` it is below it (exact paired sign test where answers are right "
    "or wrong, else the interval of the paired difference; both corrected for the number of rows compared). An "
    "interval of zero width says that all documents agree. *Italics*: sparsemm's rule with other head scores, the"
    " controls. (paper): as published, on all documents of its benchmark."
)


@dataclass(frozen=True)
class Grid:
    """A table of texts. `header[0]` heads the labels of the rows; Markdown marks are allowed in cells."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [list(self.header), ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return f"**{plain(self.title)}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    def csv(self) -> str:
        out = io.StringIO()
        lines = [[_unmarked(text).rstrip(" ≈▼") for text in line] for line in [self.header, *self.rows]]
        csv.writer(out, lineterminator="\n").writerows(lines)
        return out.getvalue()

    def rich(self) -> RichTable:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(self.title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, name in enumerate(self.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in self.rows:
            table.add_row(*(Text(_narrow(_unmarked(text)), style="bold" if "**" in text else "") for text in row))
        return table


def _narrow(text: str) -> str:
    """Intervals rounded and below their values, or six columns would not fit into a terminal."""
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\](.*)", text)
    return f"{found[1]}{found[4]}\n{float(found[2]):.0f}-{float(found[3]):.0f}" if found else text


def _unmarked(text: str) -> str:
    return text.replace("*", "")


def primary(blocks: Iterable[Block]) -> list[Block]:
    """The block of the main metric of every model and task."""
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in blocks:
        groups.setdefault((block.model, block.task), []).append(block)
    return [
        min(group, key=lambda b: (b.metric != PRIMARY.get(b.task), b.rows[0].mean is None, b.metric))
        for group in groups.values()
    ]


def heading(block: Block) -> str:
    """For example `llava_next demo, sparsemm_demo_vqa: exact_match (%), 50 documents`."""
    unit = f" ({block.unit})" if block.unit else ""
    count = f", {block.documents} documents" if block.documents else ""
    return f"{block.model}, {block.task}: {block.metric}{unit}{count}"


def label(rows: Sequence[Row]) -> str:
    """The method of a line of the table; the controls in italics, with the number of draws."""
    name, counts = rows[0].method, {len(row.draws) for row in rows}
    several = f" ({draws_text(rows)})" if counts != {1} else ""
    return (f"*{name}*" if name in CONTROLS else name) + several


def draws_text(rows: Sequence[Row]) -> str:
    """For example `10 draws`, or `10 draws at 64` where other budgets have one."""
    counts = {len(row.draws) for row in rows}
    most = f"{max(counts)} draws"
    if len(counts) == 1:
        return most
    if any(row.budget is None for row in rows):
        return f"up to {most}"
    return f"{most} at {', '.join(str(row.budget) for row in rows if len(row.draws) == max(counts))}"


def budgets(rows: Iterable[Row]) -> list[int]:
    return sorted({row.budget for row in rows if row.budget is not None})


def accuracy(block: Block) -> Grid:
    """Methods x budgets, FullKV above, the paper's own numbers below each method where it has the experiment."""
    rows, columns = block.compared(), budgets(block.compared())
    lines = []
    if block.fullkv is not None:
        lines.append([label([block.fullkv]), *[_number(block, block.fullkv)] * len(columns)])
    theirs = {(number.method, number.budget): number.value for number in published(block) if number.ratio is None}
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.budget: row for row in rows if row.method == method}
        cells = [_marked(block, own[budget]) if budget in own else "" for budget in columns]
        lines.append([label(list(own.values())), *cells])
        told = [theirs.get((method, budget)) for budget in columns]
        if any(value is not None for value in told):
            texts = ["" if value is None else f"{block.scale * value:.1f}" for value in told]
            lines.append([f"{method} (paper)", *texts])
    return Grid(heading(block), ("tokens per kv head", *map(str, columns)), lines)


def against_fullkv(block: Block) -> Grid:
    """Documents lost and gained for metrics that are 0 or 1, mean differences otherwise."""
    flips = any(row.lost is not None for row in block.compared())

    def cell(row: Row) -> str:
        if row.lost is not None and row.gained is not None:
            return f"-{row.lost:.3g} +{row.gained:.3g}" if row.lost or row.gained else "0"
        return "" if row.difference is None else interval_text(block, row.difference, sign="+")

    what = "difference from fullkv"
    if flips:
        what = "documents that fullkv has right and the method wrong (-), and the reverse (+)"
    return _by_budget(block, f"{block.model}, {block.task}: {what}, {block.metric}", cell)


def cost(block: Block) -> Grid:
    """Tokens kept, their share of what budget and prompt allow, and KV bytes used by a document's cache."""

    def cell(row: Row) -> str:
        if row.kept_tokens is None:
            return ""
        share = "" if row.kept_fraction is None else f" ({row.kept_fraction:.0%})"
        size = "" if row.kv_bytes_used is None else f", {_bytes(row.kv_bytes_used)}"
        return f"{row.kept_tokens:.0f}{share}{size}"

    full = block.fullkv
    whole = "" if full is None or full.kept_tokens is None else f"; fullkv {cell(full)}"
    what = "tokens kept per kv head (share of what the budget allows), KV cache used"
    return _by_budget(block, f"{block.model}, {block.task}: {what}{whole}", cell)


def variants(block: Block, name: str) -> Grid | None:
    """An ablation over a setting: budgets and methods x values of `ratio` (Table 1) or `mask_ratio`."""
    rows = [row for row in block.rows if list(row.variant) == [name]]
    if not rows:
        return None
    columns = sorted({row.variant[name] for row in rows})
    theirs = {(n.method, n.budget, n.ratio): n.value for n in published(block) if n.ratio is not None}
    lines = []
    for method, budget in dict.fromkeys((row.method, row.budget) for row in rows):
        own = {row.variant[name]: row for row in rows if (row.method, row.budget) == (method, budget)}
        at = f", {budget} tokens" if budget else ""
        first = label(list(own.values()))
        lines.append([first + at, *(_number(block, own[value]) if value in own else "" for value in columns)])
        told = [theirs.get((method, budget, value)) if name == "ratio" and budget else None for value in columns]
        if any(value is not None for value in told):
            texts = ["" if value is None else f"{block.scale * value:.1f}" for value in told]
            lines.append([f"{method}{at} (paper)", *texts])
    return Grid(f"{heading(block)}, over {name}", (name, *(f"{value:g}" for value in columns)), lines)


def sentences(block: Block) -> list[str]:
    """Where sparsemm is best, where it is not, and where the documents do not tell. More is taken as better."""
    told: dict[str, list[str]] = {}
    for budget in budgets(block.compared()):
        own, best = _sparsemm_and_best(block, budget)
        if own is None or best is None:
            continue
        gap = block.difference(own, best)
        apart = block.told_apart(own, best, len(_rivals(block, own)))
        size = f"{block.scale * gap.value:+.1f}"
        if _all_alike(block, budget):
            told.setdefault("all rows answer alike at", []).append(str(budget))
        elif gap.value > 0 and apart:
            told.setdefault("sparsemm is best, told apart from the next at", []).append(f"{budget} ({size})")
        elif gap.value >= TIE:
            told.setdefault("best, but not distinguishable from the next at", []).append(
                f"{budget} ({best.method}, {size})"
            )
        elif abs(gap.value) < TIE:
            told.setdefault("as good as the best other row at", []).append(f"{budget} ({best.method})")
        elif not apart:
            said = f"{budget} ({best.method}, {size})"
            told.setdefault("not best, and not distinguishable from the best at", []).append(said)
        else:
            told.setdefault("**worse than the best** at", []).append(f"{budget} ({best.method}, {size})")
    lines = [f"{what} {', '.join(where)}" for what, where in told.items()]
    full = block.fullkv
    own_rows = [row for row in block.compared() if row.method == "sparsemm" and row.difference is not None]
    close = [str(row.budget) for row in own_rows if full and not block.told_apart(row, full, len(own_rows))]
    if close:
        lines.append(f"sparsemm is not distinguishable from fullkv at {', '.join(close)}")
    return lines


def spread(block: Block) -> Grid | None:
    """The controls that were drawn several times: mean, lowest and highest draw, and how many reach sparsemm."""
    rows = [row for row in block.compared() if len(row.draws) > 1]
    own = {row.budget: row.value for row in block.compared() if row.method == "sparsemm"}

    def cell(row: Row) -> str:
        mean, low, high = (block.scale * of(row.draws) for of in (fmean, min, max))
        reached = f", {sum(draw >= own[row.budget] for draw in row.draws)} reach" if row.budget in own else ""
        return f"{mean:.1f} ({low:.1f} to {high:.1f}){reached}"

    what = "mean of the draws (lowest to highest), how many reach sparsemm"
    return _by_budget(block, f"{heading(block)}, {what}", cell, rows) if rows else None


def interval_text(block: Block, interval: Interval, sign: str = "") -> str:
    """For example `92.3 [90.1, 94.4]`."""
    value, low, high = (block.scale * number for number in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _by_budget(block: Block, title: str, cell: Callable[[Row], str], rows: Sequence[Row] = ()) -> Grid:
    rows = rows or block.compared()
    columns = budgets(rows)
    lines = []
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.budget: row for row in rows if row.method == method}
        lines.append([label(list(own.values())), *(cell(own[b]) if b in own else "" for b in columns)])
    return Grid(title, ("tokens per kv head", *map(str, columns)), lines)


def _number(block: Block, row: Row) -> str:
    return f"{row.value:.4g}" if row.mean is None else interval_text(block, row.mean)


def _marked(block: Block, row: Row) -> str:
    rivals = _rivals(block, row)
    text = _number(block, row)
    if all(row.value > other.value - TIE for other in rivals):
        text = f"**{text}**"
    if row.method != "sparsemm" or not rivals or _all_alike(block, row.budget):
        return text
    best = max(rivals, key=lambda other: other.value)
    if not block.told_apart(row, best, len(rivals)):
        return f"{text} ≈"
    return text if row.value > best.value else f"{text} ▼"


def _rivals(block: Block, row: Row) -> list[Row]:
    """The other rows of the main table at the budget of `row`."""
    return [other for other in block.compared() if other.budget == row.budget and other is not row]


def _sparsemm_and_best(block: Block, budget: int | None) -> tuple[Row | None, Row | None]:
    """The row of sparsemm at a budget, and the best other one."""
    rows = [row for row in block.compared() if row.budget == budget]
    own = next((row for row in rows if row.method == "sparsemm"), None)
    others = [row for row in rows if row is not own]
    return own, max(others, key=lambda row: row.value, default=None)


def _all_alike(block: Block, budget: int | None) -> bool:
    scores = [row.scores for row in block.compared() if row.budget == budget]
    return all(s is not None and scores[0] is not None and (s == scores[0]).all() for s in scores)


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.0f} KiB"
