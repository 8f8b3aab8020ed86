"""Figures of a sweep: accuracy over the budget (Fig. 4 and 5 of the paper), what it costs, and the four ablations.

One panel a model and task. Where there may be many methods, a panel draws strong SparseMM, the methods that are most
often the best, and their controls, and the others thin and grey; every line has its mark and its name at its right end,
so no colour is needed to read it. Bars and bands are 95 % bootstrap intervals over documents. Drawn without a display.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm_lmms.reports.names import split_name
from sparsemm_lmms.reports.paper import published
from sparsemm_lmms.reports.statistics import Block, Row, place
from sparsemm_lmms.reports.tables import budgets, draws_text
from sparsemm_lmms.settings import unknown_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOOKS = {  # colours of Okabe and Ito, told apart by colour-blind readers; marks for grey prints
    "fullkv": ("black", "*"),
    "sparsemm": ("#0072B2", "o"),
    "snapkv": ("#E69F00", "s"),
    "pyramidkv": ("#009E73", "^"),
    "adakv": ("#CC79A7", "D"),
    "local_window": ("#56B4E9", "v"),
    "random": ("#7f7f7f", "x"),
    "permuted": ("#8c564b", "P"),
    "layer_mean": ("#D55E00", "<"),
    "uniform": ("#a89f00", ">"),
    "mask": ("#0072B2", "o"),
    "mask_random": ("#7f7f7f", "x"),
}
NAMES = {"mask": "visual heads silenced", "mask_random": "as many others silenced at random"}
DASHES = {"random": "--", "permuted": "-.", "layer_mean": (0, (5, 1, 1, 1, 1, 1)), "uniform": (0, (2, 1))}
COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # of strong methods without a look
MARKS = ("p", "h", "*", "d", "8", "H", "X", "1", "2", "3", "4", "+", "|", "_", (4, 1, 0), (5, 1, 0), (3, 0, 90))
LEADERS = 2  # methods besides sparsemm that a panel draws strong because they are the best most often
NO_TIMES = (
    "Milliseconds are not drawn: other work kept cores busy while the cells ran, or their records do not say that "
    "none did."
)
PARTS = {"local_window": "local window", "snapkv": "+ uniform (snapkv)", "sparsemm": "+ by head scores (sparsemm)"}
INTERVALS = "bars: 95 % bootstrap interval over documents"
STRONG = "strong: sparsemm, the methods that are the best at most budgets, and their controls (dashed)"
WIDTH, HEIGHT = 5.6, 4.0  # inches, of a panel
NAME_HEIGHT, NAME_SIZE = 0.135, 7.5  # inches between names at the ends of lines, and their points
Panel = tuple["Axes", Block]


def figure_names(blocks: Sequence[Block]) -> list[str]:
    """The figures that these blocks hold cells for."""
    return [name for name, (_, wanted) in FIGURES.items() if any(wanted(block) for block in blocks)]


def draw(name: str, blocks: Sequence[Block], folder: Path) -> list[Path]:
    """Write one of `FIGURES` as PNG and SVG.

    Raises:
        ValueError: for an unknown figure, or one that the sweep has no cells for.
    """
    if name not in FIGURES:
        raise ValueError(unknown_name("figure", name, tuple(FIGURES)))
    painter, wanted = FIGURES[name]
    shown = [block for block in blocks if wanted(block)]
    if not shown:
        there = ", ".join(figure_names(blocks)) or "none"
        raise ValueError(f"Figure {name!r} needs cells that this sweep does not hold; possible here: {there}.")
    return _save(painter(shown), folder / name)


def accuracy(blocks: Sequence[Block]) -> Figure:
    """The metric over the budget, one line a method; FullKV dotted; the paper's own numbers dashed and hollow.

    Budgets at which all methods answer alike are left out: there nothing is evicted.
    """
    height, looks = _names_height(blocks), _looks(blocks)
    figure, panels = _panels(blocks, height)
    for axis, block in panels:
        rows = _telling(block)
        _fullkv(axis, block)
        _published(axis, block)
        _named_lines(axis, block, rows, lambda row: row.budget, looks, height)
        _budget_axis(axis, budgets(rows))
    notes = [STRONG, INTERVALS + " of the strong that are no controls"]
    if any(len(_telling(block)) < len(block.compared()) for block in blocks):
        notes.append("budgets at which all answer alike are left out")
    return _with_legend(figure, panels, "\n".join([*notes, *_draw_notes(blocks)]))


def pareto(blocks: Sequence[Block]) -> Figure:
    """The metric over the bytes of the KV cache, and over the time of a token if nothing else kept the machine busy.

    The grey line joins what nothing beats.
    """
    costs: list[tuple[str, Callable[[Row], float | None]]] = [
        ("KV cache used, MiB a document", lambda row: None if row.kv_bytes_used is None else row.kv_bytes_used / 2**20)
    ]
    height, looks = _names_height(blocks), _looks(blocks)
    if all(block.is_quiet for block in blocks):
        costs.append(("ms a token (median of decode steps)", lambda row: row.ms_per_token))
        figure, axes = _axes(len(blocks), len(costs), height)
        panels = [
            (axis, block, *cost)
            for line, block in zip(axes, blocks, strict=True)
            for axis, cost in zip(line, costs, strict=True)
        ]
    else:
        figure, plain = _panels(blocks, height)
        panels = [(axis, block, *costs[0]) for axis, block in plain]
    for axis, block, name, cost in panels:
        rows = [row for row in _telling(block) if cost(row) is not None]
        whole = [row for row in [block.fullkv] if row is not None and cost(row) is not None]
        _front(axis, [(cost(row), block.scale * row.value) for row in [*rows, *whole]])
        _line(axis, block, whole, cost, bars=False)
        _named_lines(axis, block, rows, cost, looks, height, bars=False)
        _titled(axis, block)
        axis.set_xlabel(name)
        _plain_log_ticks(axis)
    return _with_legend(figure, [(axis, block) for axis, block, *_ in panels], f"one mark a budget; {STRONG}")


def ratio(blocks: Sequence[Block]) -> Figure:
    """SparseMM over the share of the budget that every head gets alike (Table 1), one line a budget."""
    from matplotlib import colormaps

    figure, panels = _panels(blocks)
    for axis, block in panels:
        rows = [row for row in block.rows if list(row.variant) == ["ratio"]]
        theirs = [number for number in published(block) if number.ratio is not None]
        columns = budgets(rows)
        for number, budget in enumerate(columns):
            colour = colormaps["viridis"](0.85 * number / max(1, len(columns) - 1))
            line = [row for row in rows if row.budget == budget]
            look = {"color": colour, "marker": "osv^D*Px"[number % 8], "label": f"{budget} tokens"}
            beside = 0.008 * (number - (len(columns) - 1) / 2)
            _line(axis, block, line, lambda row: row.variant["ratio"], offset=beside, look=look)
            told = [(n.ratio, block.scale * n.value) for n in theirs if n.budget == budget]
            if told:
                _hollow(axis, told, {"color": colour, "marker": "o", "label": f"{budget} tokens (paper)"})
        _fullkv(axis, block)
        axis.set_xlabel("ratio: share of the budget that every head gets alike")
    return _with_legend(figure, panels)


def components(blocks: Sequence[Block]) -> Figure:
    """The local window, the window with as many scored tokens for every head, and with shares by head scores."""
    figure, panels = _panels(blocks)
    for axis, block in panels:
        rows = [row for row in block.compared() if row.method in PARTS]
        for method, name in PARTS.items():
            line = [row for row in rows if row.method == method]
            _line(axis, block, line, lambda row: row.budget, look={**_look(method), "label": name})
        _published(axis, block, PARTS)
        _fullkv(axis, block)
        _budget_axis(axis, budgets(rows))
    return _with_legend(figure, panels)


def heads(blocks: Sequence[Block]) -> Figure:
    """The metric over the share of heads that contribute nothing: the best visual heads, or as many others."""
    figure, panels = _panels(blocks)
    for axis, block in panels:
        for method in ("mask", "mask_random"):
            line = [row for row in block.rows if row.method == method and list(row.variant) == ["mask_ratio"]]
            _line(axis, block, line, lambda row: 100 * row.variant["mask_ratio"])
            _draws(axis, block, line, lambda row: 100 * row.variant["mask_ratio"])
        _fullkv(axis, block, "no head silenced")
        axis.set_xlabel("heads silenced, % of all")
    return _with_legend(figure, panels, INTERVALS + _dots(blocks))


def scores(blocks: Sequence[Block]) -> Figure:
    """A method under measured head scores and under the controls; every draw of a control is a dot."""
    shown = [(block, method) for block in blocks for method in _controlled(block)]
    shown.sort(key=lambda pair: (pair[0].model, place(pair[1])))  # a row a model and method, a column a task
    figure, panels = _panels([block for block, _ in shown])
    for (axis, block), (_, of) in zip(panels, shown, strict=True):
        rows = [row for row in block.compared() if split_name(row.method).of == of]
        methods = list(dict.fromkeys(row.method for row in rows))
        for method, shift in zip(methods, _shifts(len(methods)), strict=True):
            line = [row for row in rows if row.method == method]
            look = {**_look(method, line), "label": _scores_of(line)}
            _line(axis, block, line, lambda row: row.budget, shift, look=look)
            _draws(axis, block, line, lambda row: row.budget, 1.008 * shift)
        if of != "sparsemm":
            axis.set_title(f"{axis.get_title()}, {of}", fontsize=10, parse_math=False)
        _fullkv(axis, block)
        _budget_axis(axis, budgets(rows))
    return _with_legend(figure, panels, INTERVALS + _dots(blocks))


def _controlled(block: Block) -> list[str]:
    """The methods that a block has with other head scores too."""
    names = [split_name(row.method) for row in block.compared()]
    return list(dict.fromkeys(name.of for name in names if name.control))


def _scores_of(rows: Sequence[Row]) -> str:
    """The head scores of a line, for example `permuted, 10 draws at 64`."""
    several = any(len(row.draws) > 1 for row in rows)
    return (split_name(rows[0].method).word or "measured") + (f", {draws_text(rows)}" if several else "")


def _dots(blocks: Sequence[Block]) -> str:
    drawn = any(len(row.draws) > 1 for block in blocks for row in block.rows)
    return "; dots: single draws" if drawn else ""


def _shifts(count: int) -> list[float]:
    """Factors that set lines beside each other on a logarithmic axis, or their bars would hide each other."""
    return [1.012 ** (number - (count - 1) / 2) for number in range(count)]


def _draw_notes(blocks: Sequence[Block]) -> list[str]:
    """Which lines are means of draws."""
    several: dict[str, str] = {}
    for block in blocks:
        for method in dict.fromkeys(row.method for row in block.compared() if len(row.draws) > 1):
            text = draws_text([row for row in block.compared() if row.method == method])
            several.setdefault(method, f"{method}: mean of {text}")
    return ["; ".join(several.values())] if several else []


def _telling(block: Block) -> list[Row]:
    """The rows at budgets where not all answer alike; all of them if there is no such budget."""
    alike = {budget for budget in budgets(block.compared()) if block.all_alike(budget)}
    return [row for row in block.compared() if row.budget not in alike] or block.compared()


def _strong(block: Block) -> set[str]:
    """SparseMM, the methods that are the best at most budgets, and the controls of all these."""
    rows, wins = _telling(block), Counter[str]()
    for budget in budgets(rows):
        wins.update(row.method for row in block.columns[budget].best)
    means = {row.method: np.mean([r.value for r in rows if r.method == row.method]) for row in rows}
    order = sorted(wins, key=lambda method: (-wins[method], -means[method]))
    main = {"sparsemm", *[method for method in order if method != "sparsemm"][:LEADERS]}
    return {row.method for row in rows if row.method in main or (row.is_control and split_name(row.method).of in main)}


def _looks(blocks: Sequence[Block]) -> dict[str, dict[str, Any]]:
    """Colour, mark and line of every method when drawn strong; no two methods of a figure share a mark and a line."""
    strong = set().union(*map(_strong, blocks))
    methods = {row.method for block in blocks for row in block.compared()}
    colours = iter(c for c in COLOURS if c not in {LOOKS[method][0] for method in strong if method in LOOKS})
    marks = iter(MARKS)
    looks: dict[str, dict[str, Any]] = {}
    for method in sorted(methods, key=lambda m: (split_name(m).is_control, m not in strong, place(m))):
        name = split_name(method)
        kind = name.word if name.is_control else method
        colour, mark = LOOKS.get(kind, (None, None))
        if name.is_control and name.of in looks:  # the mark of the method, or several methods' controls would be alike
            mark = mark if name.of == "sparsemm" else looks[name.of]["marker"]
        looks[method] = {
            "color": colour or (next(colours, "0.2") if method in strong else "0.2"),
            "marker": mark or next(marks, "."),
            "linestyle": DASHES[name.word] if name.is_control else "-",
            "markerfacecolor": "white" if name.is_control else None,
        }
    return looks


def _named_lines(
    axis: Axes,
    block: Block,
    rows: Sequence[Row],
    x: Callable[[Row], Any],
    looks: dict[str, dict[str, Any]],
    panel: float,
    bars: bool = True,
) -> None:
    """A line a method, strong or grey, and its name at its right end. `panel` is the height of a panel in inches."""
    strong = _strong(block)
    methods = list(dict.fromkeys(row.method for row in rows))
    plain = [method for method in methods if method in strong and not split_name(method).is_control]
    shifts = dict(zip(plain, _shifts(len(plain)), strict=True)) if bars else {}
    ends = []
    for method in methods:
        line = [row for row in rows if row.method == method]
        look = dict(looks[method])
        if method not in strong:
            look |= {"color": "0.62", "linewidth": 0.7, "markersize": 3.5, "zorder": 1.5}
        else:
            width = (2.2 if method in plain else 1.2) * (1 if bars else 0.6)
            look |= {"linewidth": width, "markersize": 5, "zorder": 3 if method in plain else 2.5}
        places = [x(row) * shifts.get(method, 1) for row in line]
        values = [block.scale * row.value for row in line]
        axis.plot(places, values, **look)
        if bars and method in plain:
            known = [(at, row.mean) for at, row in zip(places, line, strict=True) if row.mean is not None]
            low, high = ([block.scale * getattr(mean, end) for _, mean in known] for end in ("low", "high"))
            axis.vlines([at for at, _ in known], low, high, color=look["color"], linewidth=1, alpha=0.7, zorder=2)
        last = int(np.argmax(places))
        ends.append((method, places[last], values[last], look))
    _name_ends(axis, block, ends[::-1], strong, panel)  # of equal ends the first of the table stands on top


def _name_ends(
    axis: Axes, block: Block, ends: Sequence[tuple[str, Any, float, dict[str, Any]]], strong: set[str], panel: float
) -> None:
    """Names to the right of the axes, as near to the ends of their lines as they fit, with their marks."""
    _limit(axis, block)
    (low, high), beside = axis.get_ylim(), axis.get_yaxis_transform()
    gap = (high - low) * NAME_HEIGHT / (0.8 * panel)
    places = _set_apart([end[2] for end in ends], gap, low, high)
    thread = {"arrowstyle": "-", "color": "0.5", "linewidth": 0.5, "linestyle": ":", "shrinkA": 0, "shrinkB": 0}
    for (method, at, value, look), height in zip(ends, places, strict=True):
        shown = {name: look[name] for name in ("color", "marker", "markerfacecolor")}
        end, name = (at, value), (1.02, height)
        axis.annotate("", end, name, textcoords=beside, arrowprops=thread, annotation_clip=False)
        axis.plot([1.035], [height], transform=beside, clip_on=False, markersize=4.5, linestyle="", **shown)
        weight = "bold" if method in strong else "normal"
        colour = look["color"] if method in strong else "0.35"
        text: dict[str, Any] = {
            "fontsize": NAME_SIZE,
            "va": "center",
            "color": colour,
            "weight": weight,
            "parse_math": False,
        }
        axis.text(1.055, height, NAMES.get(method, method), transform=beside, **text)


def _set_apart(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to `values` (least squares) that are `gap` apart and between `low` and `high` if they fit.

    >>> _set_apart([5, 5, 0], 2, 0, 10)
    [4.0, 6.0, 0.0]
    """
    order = np.argsort(values, kind="stable")
    pools: list[list[float]] = []  # of neighbours that touch: what each would like, its steps from the lowest taken off
    for step, index in enumerate(order):
        pools.append([values[index] - step * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    bases = [float(np.mean(pool)) for pool in pools for _ in pool]
    top = max(low, high - gap * (len(bases) - 1))
    places = [0.0] * len(bases)
    for step, (index, base) in enumerate(zip(order, bases, strict=True)):
        places[index] = min(max(base, low), top) + step * gap
    return places


def _names_height(blocks: Sequence[Block]) -> float:
    """Of a panel whose lines have their names beside them."""
    most = max(len({row.method for row in block.compared()}) for block in blocks)
    return max(HEIGHT, NAME_HEIGHT * most + 1.0)


def _has(*methods: str) -> Callable[[Block], bool]:
    return lambda block: set(methods) <= {row.method for row in block.compared()}


def _varies(name: str) -> Callable[[Block], bool]:
    return lambda block: any(list(row.variant) == [name] for row in block.rows)


FIGURES: dict[str, tuple[Callable[[Sequence[Block]], Figure], Callable[[Block], bool]]] = {
    "accuracy": (accuracy, lambda block: bool(block.compared())),
    "pareto": (pareto, lambda block: any(row.kv_bytes_used is not None for row in block.compared())),
    "ratio": (ratio, _varies("ratio")),
    "components": (components, _has(*PARTS)),
    "heads": (heads, _varies("mask_ratio")),
    "scores": (scores, lambda block: bool(_controlled(block))),
}
"""Name -> (painter, whether a block has what it shows)."""


def _line(
    axis: Axes,
    block: Block,
    rows: Sequence[Row],
    x: Callable[[Row], Any],
    shift: float = 1.0,
    offset: float = 0.0,
    bars: bool = True,
    look: dict[str, Any] | None = None,
) -> None:
    """One method's values; intervals as bars, sparsemm's as a band too."""
    if not rows:
        return
    look = look or _look(rows[0].method, rows)
    main = rows[0].method in ("sparsemm", "mask") and "ratio" not in rows[0].variant
    width = 2.4 if main and bars else 1.2 if bars else 0.6  # costs are no axis along which values can be read off
    style = "--" if rows[0].is_control else "-"
    places, values = [x(row) * shift + offset for row in rows], [block.scale * row.value for row in rows]
    axis.plot(places, values, style, markersize=5, linewidth=width, **look)
    known = [(place, row) for place, row in zip(places, rows, strict=True) if row.mean is not None]
    if bars and known:
        at = [place for place, _ in known]
        lows = [block.scale * row.mean.low for _, row in known if row.mean]
        highs = [block.scale * row.mean.high for _, row in known if row.mean]
        axis.vlines(at, lows, highs, color=look["color"], linewidth=1, alpha=0.7)
        if main:
            axis.fill_between(at, lows, highs, color=look["color"], alpha=0.12, linewidth=0)


def _draws(axis: Axes, block: Block, rows: Sequence[Row], x: Callable[[Row], Any], shift: float = 1.0) -> None:
    for row in rows:
        if len(row.draws) > 1:
            colour = _look(row.method)["color"]
            values = [block.scale * draw for draw in row.draws]
            axis.plot([x(row) * shift] * len(values), values, ".", color=colour, markersize=4, alpha=0.5)


def _published(axis: Axes, block: Block, names: dict[str, str] | None = None) -> None:
    numbers = [n for n in published(block) if n.ratio is None and (names is None or n.method in names)]
    shown = {row.method for row in block.compared()}
    for method in dict.fromkeys(number.method for number in numbers if number.method in shown):
        points = [(n.budget, block.scale * n.value) for n in numbers if n.method == method]
        _hollow(axis, points, {**_look(method), "label": f"{method} (paper)"})


def _hollow(axis: Axes, points: Sequence[tuple[Any, float]], look: dict[str, Any]) -> None:
    axis.plot(*zip(*sorted(points), strict=True), ":", markerfacecolor="white", markersize=5, linewidth=1, **look)


def _fullkv(axis: Axes, block: Block, name: str = "fullkv") -> None:
    if block.fullkv is not None:
        value = block.scale * block.fullkv.value
        axis.axhline(value, color="black", linestyle=":", linewidth=1.5, label=name, zorder=1)


def _front(axis: Axes, points: Sequence[tuple[Any, float]]) -> None:
    """The points that no other beats in both cost and value."""
    best: list[tuple[Any, float]] = []
    for cost, value in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or value > best[-1][1]:
            best.append((cost, value))
    axis.plot(
        *zip(*best, strict=True), color="0.75", linewidth=6, zorder=0, solid_capstyle="round", label="not beaten by any"
    )


def _look(method: str, rows: Sequence[Row] = ()) -> dict[str, Any]:
    name = split_name(method)
    colour, marker = LOOKS.get(name.control or method, LOOKS["sparsemm"])
    several = any(len(row.draws) > 1 for row in rows)
    return {
        "color": colour,
        "marker": marker,
        "label": NAMES.get(method, method) + (f", {draws_text(rows)}" if several else ""),
    }


def _panels(blocks: Sequence[Block], height: float = HEIGHT) -> tuple[Figure, list[Panel]]:
    """A column a task, if all models have the same; one model's tasks in rows of three."""
    models, tasks = (list(dict.fromkeys(getattr(block, key) for block in blocks)) for key in ("model", "task"))
    whole = len(blocks) % (len(models) * len(tasks)) == 0
    columns = len(tasks) if whole and len(blocks) > len(tasks) else min(3, len(blocks))
    figure, axes = _axes(-(-len(blocks) // columns), columns, height)
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(blocks) :]:
        axis.set_axis_off()
    for axis, block in zip(flat, blocks, strict=False):
        _titled(axis, block)
    return figure, list(zip(flat, blocks, strict=False))


def _axes(rows: int, columns: int, height: float = HEIGHT) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * columns, height * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _titled(axis: Axes, block: Block) -> None:
    axis.set_title(f"{block.model}: {block.task}", fontsize=10, parse_math=False)
    count = f" ({block.documents} documents)" if block.documents else ""
    axis.set_ylabel(f"{block.metric}{', ' + block.unit if block.unit else ''}{count}", parse_math=False)
    axis.grid(alpha=0.3)


def _budget_axis(axis: Axes, ticks: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.minorticks_off()
    axis.set_xlabel("budget: tokens per kv head, window included")


def _plain_log_ticks(axis: Axes) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter(NullFormatter())


def _limit(axis: Axes, block: Block) -> None:
    """No percents that cannot be."""
    low, high = axis.get_ylim()
    if block.unit == "%":
        axis.set_ylim(max(low, -3), min(high, 103))


def _with_legend(figure: Figure, panels: Sequence[Panel], note: str = INTERVALS) -> Figure:
    """One legend for all panels, outside them; `note` says what bars and dots are."""
    known: dict[str, Any] = {}
    for axis, block in panels:
        _limit(axis, block)
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    columns = min(len(known), max(3, int(figure.get_figwidth() / 1.9)))
    legend = figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        title=note,
        title_fontsize=9,
    )
    legend.get_title().set_multialignment("center")
    return figure


def _save(figure: Figure, stem: Path) -> list[Path]:
    """PNG and SVG, the same bytes for the same records; whole or not at all."""
    import matplotlib

    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context({"svg.hashsalt": "sparsemm-lmms"}):
        for suffix in ("png", "svg"):
            path, part = stem.with_suffix(f".{suffix}"), stem.with_name(f".{stem.name}.{os.getpid()}.part")
            try:
                figure.savefig(part, format=suffix, dpi=110, metadata={"Date": None} if suffix == "svg" else None)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)
            paths.append(path)
    return paths
