"""A results file as a table for the terminal and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def print_table(rows: Sequence[Any]) -> None:
    """Rows of `bench decode` or `bench prefill`, one line a method."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{rows[0].preset}, {rows[0].dtype}, {rows[0].circumstances['device']}")
    columns: tuple[str, ...]
    columns = (
        "context",
        "batch",
        "method",
        "ms/token (least-most)",
        "x stock",
        "tokens/s",
        "x limit",
        "prefill ms",
    )
    columns += ("of it compression", "KV MiB allocated", "used", "peak MiB")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        table.add_row(str(row.context), str(row.batch), row.method, *_cells(row))
    # a pipe has no width: nothing may be cut off there
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(table)


def _cells(row: Any) -> list[str]:
    if row.error is not None:
        return [row.error]
    share = "" if row.compression_ms is None else f"{row.compression_ms / row.prefill_ms.median:.1%}"
    return [
        "" if row.ms_per_token is None else str(row.ms_per_token),
        "" if row.of_stock is None else f"{row.of_stock:.2f}",
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
        "" if row.over_limit is None else f"{row.over_limit:.2f}",
        f"{row.prefill_ms.median:.1f}",
        share,
        *(f"{size / 2**20:.2f}" for size in (row.kv_bytes_allocated, row.kv_bytes_used, row.peak_memory)),
    ]


def save_plot(rows: Sequence[Any], path: Path) -> Path:
    """Latency, KV bytes and peak memory against the context, one line a method; one row of panels a batch size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    decode = any(row.ms_per_token is not None for row in rows)
    batches = sorted({row.batch for row in rows})
    methods = list(dict.fromkeys(row.method for row in rows))
    panels: list[tuple[str, Any]] = [
        ("ms a token", lambda row: row.ms_per_token.median)
        if decode
        else ("prefill, ms", lambda row: row.prefill_ms.median),
        ("KV cache, MiB", lambda row: row.kv_bytes_allocated / 2**20),
        ("peak memory, MiB", lambda row: row.peak_memory / 2**20),
    ]
    figure, axes = plt.subplots(len(batches), 3, figsize=(13, 3.6 * len(batches) + 0.6), squeeze=False)
    for line, batch in zip(axes, batches, strict=True):
        for axis, (label, value) in zip(line, panels, strict=True):
            for i, method in enumerate(methods):
                found = [row for row in rows if (row.batch, row.method, row.error) == (batch, method, None)]
                # thin, dashed, and different marks: methods of the same cost would hide each other
                axis.plot(
                    [row.context for row in found],
                    [value(row) for row in found],
                    marker="osv^D*Px"[i % 8],
                    linestyle=("-", "--", ":", "-.")[i % 4],
                    markersize=6,
                    alpha=0.85,
                    label=method,
                )
            if decode and label == "ms a token":
                best = [row for row in rows if row.batch == batch and row.limit_ms is not None]
                contexts = sorted({row.context for row in best})
                least = [min(row.limit_ms for row in best if row.context == context) for context in contexts]
                axis.plot(contexts, least, color="black", linewidth=0.8, label="limit (least)")
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row.context for row in rows}), labels=sorted({row.context for row in rows}))
            axis.set_ylim(bottom=0)
            axis.set_xlabel("tokens in the prompt")
            axis.set_ylabel(label)
            axis.set_title(f"batch {batch}")
            axis.grid(alpha=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle(f"{rows[0].preset}, {rows[0].dtype}, {rows[0].circumstances['device']}", fontsize=10)
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8))
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
