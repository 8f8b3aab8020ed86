"""Pictures of head scores and budgets (PNG or SVG by the file's suffix). Drawn without a display.

Colours: one sequential map (viridis, legible in grey and to colour-blind readers) that grows with the square root,
since few heads hold nearly everything and the others would be one dark field; lines and covers blue and orange.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.head_statistics import spearman, top_count, top_overlap, top_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from sparsemm_lmms.visual_heads.show import HeadView

BLUE, ORANGE, GREY = "#2a6fbb", "#e0762f", "#8a8a8a"
SUFFIXES = (".png", ".svg")
WRITTEN = 64  # a heat map of so few cells has room for its numbers


def plot_heads(
    scores: HeadScores,
    path: str | os.PathLike[str],
    other: HeadScores | None = None,
    names: tuple[str, str] = ("", ""),
) -> Path:
    """Layers x heads heat map and, beside it, the sorted shares with what the top 5 % of heads hold.

    With ``other`` (same shape): both heat maps, both curves, rank correlation and overlap of the top 5 %.
    """
    tables = [scores, *([other] if other is not None else [])]
    if other is not None and other.values.shape != scores.values.shape:
        raise ValueError(
            f"Two files side by side need one shape, got {scores.layers} layers x {scores.heads} heads and "
            f"{other.layers} x {other.heads}."
        )
    labels = [name or _label(table, index) for index, (name, table) in enumerate(zip(names, tables, strict=False))]
    figure = _figure(5.2 * (len(tables) + 1))
    axes = figure.subplots(1, len(tables) + 1)
    top = max(float((table.values / table.values.sum()).max()) for table in tables)
    for axis, table, label in zip(axes, tables, labels, strict=False):
        image = _heat(axis, 100 * table.values / table.values.sum(), 100 * top, "head")
        axis.set_title(label, fontsize=10)
    figure.colorbar(image, ax=axes[: len(tables)].tolist(), label="% of the total score", shrink=0.85)
    _curves(axes[-1], tables, labels)
    if other is not None:
        figure.suptitle(
            f"Spearman {spearman(scores.values, other.values):.3f}, overlap of the top 5 % of heads "
            f"{top_overlap(scores.values, other.values):.0%}, of the top 10 % "
            f"{top_overlap(scores.values, other.values, 0.1):.0%}",
            fontsize=11,
        )
    return _save(figure, path)


def plot_budgets(
    tokens: np.ndarray, nominal: int, path: str | os.PathLike[str], title: str = "", window: int | None = None
) -> Path:
    """Tokens kept by each layer and kv head, and each layer's mean against the nominal budget.

    tokens: int ``[layers, kv_heads]``, window included. nominal: budget, tokens per kv head on average. window: drawn
    as what every head keeps in any case.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens must be a table [layers, kv_heads], got shape {tokens.shape}.")
    layers, kv_heads = tokens.shape
    figure = _figure(10.4)
    heat, bars = figure.subplots(1, 2)
    image = _heat(heat, tokens, float(tokens.max()), "kv head")
    heat.set_title(title or "tokens kept", fontsize=10)
    figure.colorbar(image, ax=heat, label="tokens kept", shrink=0.85)
    rows, shown = np.arange(layers), np.maximum(tokens, 1)  # the axis is logarithmic: a visual head keeps 100 x more
    bars.plot(shown.mean(axis=1), rows, "D", color=BLUE, markersize=6, zorder=3, label="mean over the layer's heads")
    bars.plot(shown, rows, ".", color=GREY, markersize=7, alpha=0.6)
    bars.plot([], [], ".", color=GREY, markersize=7, alpha=0.6, label="one kv head")
    bars.axvline(nominal, color=ORANGE, linewidth=1.8, label=f"nominal budget {nominal}")
    if window:
        bars.axvline(window, color="black", linestyle=":", linewidth=1.2, label=f"window {window}, always kept")
    bars.set(ylim=(layers - 0.5, -0.5), ylabel="layer", xlabel="tokens kept by a head", xscale="log")
    bars.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bars.xaxis.set_major_formatter("{x:g}")
    bars.xaxis.set_minor_formatter(NullFormatter())
    bars.yaxis.get_major_locator().set_params(integer=True)
    total, wanted = int(tokens.sum()), nominal * layers * kv_heads
    bars.set_title(f"sum {total:,} of nominal {wanted:,} ({total / wanted:.1%})", fontsize=10)
    _legend_below(bars, columns=2)
    return _save(figure, path)


def plot_view(view: HeadView, path: str | os.PathLike[str], title: str = "") -> Path:
    """A row a head (visual heads first), a column an answer token: attention over the image, in orange.

    A last column covers what compression evicts in blue, if that was asked for. All panels share one scale, so that
    heads that ignore the image stay bare; each names the attention mass on the high-resolution image tokens.
    """
    from sparsemm_lmms.visual_heads.show import paint

    columns = len(view.tokens) + (view.kept is not None)
    side = 1.9 * view.image.height / view.image.width
    figure = _figure(1.0 + 1.9 * columns, 0.9 + (side + 0.35) * len(view.heads))
    axes = figure.subplots(len(view.heads), columns, squeeze=False)
    grey = np.asarray(view.image.convert("L")) / 255
    top = max(float(view.attention[..., view.grid.view == 1].max()), 1e-9)
    for row, (layer, head) in enumerate(view.heads):
        kind = "visual" if row < view.visual else "other"
        axes[row, 0].set_ylabel(f"{kind}\nlayer {layer}, head {head}", fontsize=9)
        for column in range(columns):
            axis = axes[row, column]
            axis.set(xticks=[], yticks=[])
            axis.imshow(grey, cmap="gray", vmin=0, vmax=1)
            if column == len(view.tokens):
                assert view.kept is not None
                held = view.kept[row]
                _cover(axis, BLUE, 0.8 * (1 - paint(view.grid, held.astype(float), *view.image.size)))
                axis.set_title(f"keeps {held.sum()} of {held.size}", fontsize=9)
                continue
            weights = view.attention[row, column]
            _cover(axis, ORANGE, 0.8 * np.sqrt(paint(view.grid, weights, *view.image.size) / top))
            axis.set_title(f"{view.tokens[column]!r} {weights[view.grid.view == 1].sum():.0%}", fontsize=9)
    legend = "orange: attention at each answer token, % of it on the image" + (
        "; blue: evicted" * (view.kept is not None)
    )
    figure.suptitle(f"{title}\n{legend}" if title else legend, fontsize=10)
    return _save(figure, path)


def _cover(axis: Axes, colour: str, alpha: np.ndarray) -> None:
    """One colour over the picture, which shows through pages of any brightness. alpha: ``[height, width]`` in 0..1."""
    from matplotlib.colors import to_rgb

    axis.imshow(np.dstack([np.broadcast_to(to_rgb(colour), (*alpha.shape, 3)), alpha]))


def _figure(width: float, height: float = 4.6) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat(axis: Axes, table: np.ndarray, top: float, across: str) -> Any:
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    norm = PowerNorm(0.5, vmin=0, vmax=top)
    image = axis.imshow(table, aspect="auto", cmap="viridis", norm=norm, interpolation="nearest")
    axis.set(xlabel=across, ylabel="layer")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator(integer=True))
    if table.size <= WRITTEN:
        for (row, column), value in np.ndenumerate(table):
            ink = "white" if norm(value) < 0.6 else "black"
            text = f"{value:.{0 if table.dtype.kind == 'i' else 1}f}"
            axis.text(column, row, text, color=ink, fontsize=8, ha="center", va="center")
    return image


def _curves(axis: Axes, tables: list[HeadScores], labels: list[str]) -> None:
    for table, label, colour in zip(tables, labels, (BLUE, ORANGE), strict=False):
        ordered = np.sort(table.values, axis=None)[::-1] / table.values.sum()
        share = 100 * np.concatenate([[0.0], ordered.cumsum()])
        heads = 100 * np.arange(len(share)) / ordered.size
        marked = [top_count(ordered.size, part) for part in (0.05, 0.1)]
        axis.plot(heads, share, color=colour, linewidth=1.8)
        told = " and ".join(f"{top_share(table.values, part):.0%}" for part in (0.05, 0.1))
        axis.plot(heads[marked], share[marked], "o", color=colour, markersize=6, label=f"{label}: {told}")
    axis.plot([0, 100], [0, 100], color=GREY, linestyle="--", linewidth=1, label="all heads alike")
    axis.set(xlim=(0, 100), ylim=(0, 103), xlabel="heads, best first (%)", ylabel="share of the score (%)")
    counts = [top_count(tables[0].values.size, part) for part in (0.05, 0.1)]
    axis.set_title(f"What the top 5 % and 10 % of heads ({counts[0]} and {counts[1]}) hold", fontsize=10)
    _legend_below(axis, columns=1)


def _legend_below(axis: Axes, columns: int) -> None:
    """Outside, since curves and spreads may fill all of the axes."""
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False)


def _label(scores: HeadScores, index: int) -> str:
    facts = scores.provenance
    name = Path(str(facts["path"])).name if facts.get("path") else str(facts.get("kind", f"scores {index + 1}"))
    model = Path(str(facts["model"])).name if facts.get("model") else ""
    return f"{name} ({model})" if model else name


def _save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: pictures are written as {' or '.join(SUFFIXES)}; choose such a name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path
