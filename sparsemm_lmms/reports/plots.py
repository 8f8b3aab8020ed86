"""Figures of a sweep: accuracy over the budget (Fig. 4 and 5 of the paper), what it costs, and the four ablations.

One panel a model and task. A method has the same colour and mark in every figure; bars and bands are 95 % bootstrap
intervals over documents, or the range over draws where the label says so. Drawn without a display.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsemm_lmms.reports.paper import published
from sparsemm_lmms.reports.statistics import CONTROLS, Block, Row
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
ONLY_IN_SCORES = ("permuted", "layer_mean", "uniform")  # controls that have a figure of their own
PARTS = {"local_window": "local window", "snapkv": "+ uniform (snapkv)", "sparsemm": "+ by head scores (sparsemm)"}
INTERVALS = "bars: 95 % bootstrap interval over documents"
WIDTH, HEIGHT = 5.6, 4.0  # inches, of a panel
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
    """The metric over the budget, one line a method; FullKV dotted; the paper's own numbers dashed and hollow."""
    figure, panels = _panels(blocks)
    for axis, block in panels:
        rows = _methods(block)
        methods = list(dict.fromkeys(row.method for row in rows))
        for method, shift in zip(methods, _shifts(len(methods)), strict=True):
            _line(axis, block, [row for row in rows if row.method == method], lambda row: row.budget, shift)
        _published(axis, block)
        _fullkv(axis, block)
        _budget_axis(axis, budgets(rows))
    return _with_legend(figure, panels)


def pareto(blocks: Sequence[Block]) -> Figure:
    """The metric over the bytes of the KV cache and the time of a token. The grey line joins what nothing beats."""
    costs: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("KV cache used, MiB a document", lambda row: None if row.kv_bytes_used is None else row.kv_bytes_used / 2**20),
        ("ms a token (median of decode steps)", lambda row: row.ms_per_token),
    )
    figure, axes = _axes(len(blocks), len(costs))
    panels = []
    for line, block in zip(axes, blocks, strict=True):
        for axis, (name, cost) in zip(line, costs, strict=True):
            rows = [row for row in [*_methods(block), block.fullkv] if row is not None and cost(row) is not None]
            for method in dict.fromkeys(row.method for row in rows):
                _line(axis, block, [row for row in rows if row.method == method], cost, bars=False)
            _front(axis, [(cost(row), block.scale * row.value) for row in rows])
            _titled(axis, block)
            axis.set_xlabel(name)
            _plain_log_ticks(axis)
            panels.append((axis, block))
    return _with_legend(figure, panels, "one mark a budget")


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
    """SparseMM's rule under measured head scores and under the controls; every draw of a control is a dot."""
    figure, panels = _panels(blocks)
    for axis, block in panels:
        rows = [row for row in block.compared() if row.method in ("sparsemm", *CONTROLS)]
        methods = list(dict.fromkeys(row.method for row in rows))
        for method, shift in zip(methods, _shifts(len(methods)), strict=True):
            line = [row for row in rows if row.method == method]
            _line(axis, block, line, lambda row: row.budget, shift)
            _draws(axis, block, line, lambda row: row.budget, 1.008 * shift)
        _fullkv(axis, block)
        _budget_axis(axis, budgets(rows))
    return _with_legend(figure, panels, INTERVALS + _dots(blocks))


def _dots(blocks: Sequence[Block]) -> str:
    drawn = any(len(row.draws) > 1 for block in blocks for row in block.rows)
    return "; dots: single draws" if drawn else ""


def _shifts(count: int) -> list[float]:
    """Factors that set lines beside each other on a logarithmic axis, or their bars would hide each other."""
    return [1.012 ** (number - (count - 1) / 2) for number in range(count)]


def _methods(block: Block) -> list[Row]:
    return [row for row in block.compared() if row.method not in ONLY_IN_SCORES]


def _has(*methods: str) -> Callable[[Block], bool]:
    return lambda block: set(methods) <= {row.method for row in block.compared()}


def _varies(name: str) -> Callable[[Block], bool]:
    return lambda block: any(list(row.variant) == [name] for row in block.rows)


FIGURES: dict[str, tuple[Callable[[Sequence[Block]], Figure], Callable[[Block], bool]]] = {
    "accuracy": (accuracy, lambda block: bool(_methods(block))),
    "pareto": (pareto, lambda block: any(row.kv_bytes_used is not None for row in _methods(block))),
    "ratio": (ratio, _varies("ratio")),
    "components": (components, _has(*PARTS)),
    "heads": (heads, _varies("mask_ratio")),
    "scores": (scores, lambda block: any(_has(name)(block) for name in ONLY_IN_SCORES)),
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
    style = "--" if rows[0].method in CONTROLS else "-"
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
            colour = LOOKS[row.method][0]
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
    colour, marker = LOOKS.get(method, ("0.3", "."))
    several = any(len(row.draws) > 1 for row in rows)
    return {
        "color": colour,
        "marker": marker,
        "label": NAMES.get(method, method) + (f", {draws_text(rows)}" if several else ""),
    }


def _panels(blocks: Sequence[Block]) -> tuple[Figure, list[Panel]]:
    """A row a model, a column a task; one model's tasks in rows of three."""
    models, tasks = (list(dict.fromkeys(getattr(block, key) for block in blocks)) for key in ("model", "task"))
    whole = len(blocks) == len(models) * len(tasks)
    columns = len(tasks) if whole and len(models) > 1 else min(3, len(blocks))
    figure, axes = _axes(-(-len(blocks) // columns), columns)
    flat = [axis for line in axes for axis in line]
    for axis in flat[len(blocks) :]:
        axis.set_axis_off()
    for axis, block in zip(flat, blocks, strict=False):
        _titled(axis, block)
    return figure, list(zip(flat, blocks, strict=False))


def _axes(rows: int, columns: int) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 0.7), layout="constrained")
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


def _with_legend(figure: Figure, panels: Sequence[Panel], note: str = INTERVALS) -> Figure:
    """One legend for all panels, outside them; `note` says what bars and dots are."""
    known: dict[str, Any] = {}
    for axis, block in panels:
        low, high = axis.get_ylim()
        if block.unit == "%":
            axis.set_ylim(max(low, -3), min(high, 103))
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            known.setdefault(name, handle)
    columns = min(len(known), max(3, int(figure.get_figwidth() / 1.9)))
    figure.legend(
        list(known.values()),
        list(known),
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
        title=note,
        title_fontsize=9,
    )
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
