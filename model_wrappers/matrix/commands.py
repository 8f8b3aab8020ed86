"""`sparsemm-lmms families`: what the families state, and with `--check` the matrix of what they pass."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsemm_lmms.catalog import as_markdown, show
from sparsemm_lmms.families import FAMILIES, Family
from sparsemm_lmms.head_scores import write_atomically
from sparsemm_lmms.settings import unknown_name

app = typer.Typer()
Rows = list[tuple[str, ...]]


@app.callback()
def _group() -> None: ...


@app.command()
def families(
    check: Annotated[bool, typer.Option("--check", help="Run the checks, on tiny random models made here.")] = False,
    family: Annotated[str | None, typer.Option(help="This family only.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --check: its first three columns.")] = False,
    output: Annotated[Path | None, typer.Option(help="With --check: the matrix as JSON.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, for documents.")] = False,
    device: Annotated[str, typer.Option(help="With --check: cuda captures decode steps in real CUDA graphs.")] = "cpu",
) -> None:
    """Print the families, or with --check run all that is said of them (exit status 1 if something fails).

    VLMEvalKit is checked where it is importable; a clone has a stand-in of it:
    PYTHONPATH=tests/vlmevalkit/standin sparsemm-lmms families --check
    """
    if family is not None and family not in FAMILIES:
        raise ValueError(unknown_name("--family", family, list(FAMILIES)))
    chosen = {name: known for name, known in FAMILIES.items() if family in (None, name)}
    if not check:
        for given, name in ((quick, "--quick"), (output is not None, "--output"), (device != "cpu", "--device")):
            if given:
                raise ValueError(f"{name} belongs to the checks; add --check, or leave it out.")
        _print("Families", FIELDS, [_stated(known) for known in chosen.values()], markdown)
        return
    if device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read by the first import of triton
    from sparsemm_lmms.model_wrappers.matrix.checks import CELLS, FAILED, QUICK

    cells = QUICK if quick else tuple(CELLS)
    with redirect_stdout(sys.stderr):  # the hosts talk
        rows = check_all(chosen, cells, device)
    matrix: dict[str, Any] = {"versions": versions(), "device": device, "cells": list(cells), "rows": rows}
    if output is not None:
        write_atomically(output, json.dumps(matrix, indent=2) + "\n")
    _print("Families on tiny random models", *table(matrix), markdown)
    failed = [
        f"{kind}, {cell}: {told.removeprefix(FAILED)}"
        for kind, row in matrix["rows"].items()
        for cell, told in row["cells"].items()
        if told.startswith(FAILED)
    ]
    if failed:
        raise SystemExit("\n".join([f"sparsemm-lmms: {len(failed)} cells failed.", *failed]))


FIELDS = ("family", "model types", "default checkpoint", "grid", "hosts", "video")


def _stated(family: Family) -> tuple[str, ...]:
    hosts = ["lmms-eval"] + ["VLMEvalKit"] * (family.vlmevalkit is not None)
    kinds = ", ".join(f"`{kind}`" for kind in family.architectures)
    video = "yes" if family.reads_video else "no"
    return f"`{family.model_type}`", kinds, f"`{family.pretrained}`", family.grid or "none", ", ".join(hosts), video


def check_all(chosen: Mapping[str, Family], cells: tuple[str, ...], device: str = "cpu") -> dict[str, dict[str, Any]]:
    """The rows of the matrix: each model type of these families -> its family and its cells."""
    from sparsemm_lmms.model_wrappers.matrix.checks import check
    from sparsemm_lmms.model_wrappers.matrix.makers import MAKERS

    rows: dict[str, dict[str, Any]] = {}
    for name, family in chosen.items():
        for model_type in family.architectures:
            kinds = [kind for kind in MAKERS if kind.partition(",")[0] == model_type]
            for kind in kinds:
                rows[kind] = {"family": name, "cells": check(kind, cells, device)}
            if not kinds:
                rows[model_type] = {"family": name, "cells": dict.fromkeys(cells, "not checked: no tiny model")}
    return rows


def versions() -> dict[str, str]:
    """Of what the checks run."""
    return {name: version(name) for name in ("sparsemm-lmms", "torch", "transformers", "lmms-eval")}


def table(matrix: Mapping[str, Any]) -> tuple[tuple[str, ...], Rows]:
    """Header and rows of the matrix."""
    rows = [
        (f"`{row['family']}`", kind, *(row["cells"][cell] for cell in matrix["cells"]))
        for kind, row in matrix["rows"].items()
    ]
    return ("family", "model type", *matrix["cells"]), rows


def _print(title: str, header: tuple[str, ...], rows: Rows, markdown: bool) -> None:
    if markdown:
        print(as_markdown(header, rows), end="")
    else:
        show(title, header, rows)
