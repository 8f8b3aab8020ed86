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
from sparsemm_lmms.reports.statistics import LEVEL, TIE, Block, Interval, Row, fewest_documents

if TYPE_CHECKING:
    from rich.table import Table as RichTable

PRIMARY = {"sparsemm_demo_ocr": "character_accuracy"} | {task: known.metric for task, known in TASKS.items()}
"""The metric of a task that tables and figures show; of other tasks the first with scores of documents."""

LEGEND = (
    "Brackets: 95 % bootstrap interval over documents; one of zero width says that all documents agree. **Bold**: best "
    "of the column. `≈`: the documents do not tell the row apart from it, by the test below each table. Rows without a "
    "mark are told apart from it. The best of many rows is also the luckiest, so its value flatters it. *Italics*: "
    "methods with other head scores, the controls. (paper): as published, on all documents of its benchmark."
)
MARK = " ≈"
MOST_NAMED = 4  # rows that a sentence names; more are counted


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
        lines = [[_unmarked(text).removesuffix(MARK) for text in line] for line in [self.header, *self.rows]]
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
    return (f"*{name}*" if rows[0].is_control else name) + several


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
    marked = {budget: _marked(block, budget) for budget in columns}
    for method in dict.fromkeys(row.method for row in rows):
        own = {row.budget: row for row in rows if row.method == method}
        cells = [marked[budget].get(method, "") for budget in columns]
        lines.append([label(list(own.values())), *cells])
        told = [theirs.get((method, budget)) for budget in columns]
        if any(value is not None for value in told):
            texts = ["" if value is None else f"{block.scale * value:.1f}" for value in told]
            lines.append([f"{method} (paper)", *texts])
    return Grid(heading(block), ("tokens per kv head", *map(str, columns)), lines)


def note(block: Block) -> str:
    """What the marks of a block's accuracy table mean, and how many documents they need."""
    sizes = sorted({len(block.columns[budget].rows) - 1 for budget in budgets(block.compared())})
    level, most = f"{100 * (1 - LEVEL):.0f} %", sizes[-1]
    if not most:
        return ""
    if all(row.scores is None for row in block.compared()):
        return "`≈`: the host scores no single document here, so nothing tells rows apart.\n"
    test = "the paired bootstrap interval of the difference includes 0"
    if block.binary:
        test = "McNemar's exact test of answers that one row has right and the other wrong finds no difference"
    needed = fewest_documents(most)
    few = f"at least {needed} of the {block.documents} documents must differ"
    if needed > block.documents:
        few = f"{needed} documents would have to differ, so these {block.documents} tell no rows of a full column apart"
    compared = " to ".join(map(str, dict.fromkeys((sizes[0], most))))
    return f"`≈`: {test}, at {level} over the {compared} comparisons of a column together; {few}.\n"


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
    """The best rows, where sparsemm is best, where it is not, where the documents do not tell. More is better."""
    told: dict[str, list[str]] = {}
    for budget in budgets(block.compared()):
        own, best = _sparsemm_and_best(block, budget)
        if own is None or best is None:
            continue
        gap = block.difference(own, best)
        apart = block.told_apart(own, best, len(_rivals(block, own)))
        size = f"{block.scale * gap.value:+.1f}"
        if block.all_alike(budget):
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
    lines = [*_best_rows(block), *lines]
    full = block.fullkv
    own_rows = [row for row in block.compared() if row.method == "sparsemm" and row.difference is not None]
    close = [str(row.budget) for row in own_rows if full and not block.told_apart(row, full, len(own_rows))]
    if close:
        lines.append(f"sparsemm is not distinguishable from fullkv at {', '.join(close)}")
    return lines


def _best_rows(block: Block) -> list[str]:
    """A line that names the best row of every budget, and those that cannot be told apart from it."""
    told = []
    for budget in budgets(block.compared()):
        column = block.columns[budget]
        if len(column.rows) == 1 or block.all_alike(budget):
            continue
        near = [row.method for row in column.near]
        said = f"{budget} {' and '.join(row.method for row in column.best[:MOST_NAMED])}"
        if len(column.best) > MOST_NAMED:
            said = f"{budget} {len(column.best)} rows alike"
        if near:
            said += f" (≈ {', '.join(near) if len(near) <= MOST_NAMED else f'{len(near)} of {len(column.rows)} rows'})"
        elif len(column.best) == 1:
            said += " (told apart from all others)"
        told.append(said)
    return [f"best: {'; '.join(told)}"] if told else []


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


def _marked(block: Block, budget: int) -> dict[str, str]:
    """The texts of one column by method."""
    column = block.columns[budget]
    texts = {row.method: _number(block, row) for row in column.rows}
    texts |= {row.method: f"**{texts[row.method]}**" for row in column.best}
    return texts | {row.method: texts[row.method] + MARK for row in column.near}


def _rivals(block: Block, row: Row) -> list[Row]:
    """The other rows of the main table at the budget of `row`."""
    return [other for other in block.compared() if other.budget == row.budget and other is not row]


def _sparsemm_and_best(block: Block, budget: int | None) -> tuple[Row | None, Row | None]:
    """The row of sparsemm at a budget, and the best other one."""
    rows = [row for row in block.compared() if row.budget == budget]
    own = next((row for row in rows if row.method == "sparsemm"), None)
    others = [row for row in rows if row is not own]
    return own, max(others, key=lambda row: row.value, default=None)


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count / 2**10:.0f} KiB"
