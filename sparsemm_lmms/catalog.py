"""`sparsemm-lmms methods`: methods, scorers, allocators and settings as they are declared, plug-ins included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from sparsemm_lmms.presets import METHODS

app = typer.Typer()
Rows = list[tuple[str, ...]]


@app.command()
def methods(markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown, for documents.")] = False) -> None:
    """Print methods, scorers, allocators and settings."""
    tables = [
        ("Methods", ("method", "which tokens of a head stay", "how many"), method_rows()),
        ("Parts of free combinations, SCORER+ALLOCATOR", ("part", "name", "what it does"), part_rows()),
        ("Settings", ("setting", "default", "of", "meaning"), setting_rows()),
    ]
    for title, header, rows in tables:
        if markdown:
            print(f"**{title}**\n\n{as_markdown(header, rows)}")
        else:
            show(title, header, rows)


def method_rows() -> Rows:
    """Name, tokens and counts of every preset."""
    return [(f"`{name}`", preset.tokens, preset.counts) for name, preset in METHODS.items()]


def part_rows() -> Rows:
    """Kind, name and first line of the docstring of every scorer and allocator."""
    from sparsemm_lmms.registry import allocator_names, find_allocator, find_scorer, scorer_names

    found: list[tuple[str, str, type]] = [("scorer", name, find_scorer(name)) for name in scorer_names()]
    found += [("allocator", name, find_allocator(name)) for name in allocator_names()]
    return [(kind, f"`{name}`", (part.__doc__ or "").strip().splitlines()[0]) for kind, name, part in found]


def setting_rows() -> Rows:
    """Name, default, owners and meaning of every declared setting."""
    return [(f"`{name}`", f"`{default}`", of, meaning) for name, default, of, meaning in _settings()]


def as_markdown(header: Sequence[str], rows: Rows) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _settings() -> Iterator[tuple[str, str, str, str]]:
    from sparsemm_lmms.config import CompressionConfig
    from sparsemm_lmms.registry import allocator_names, find_allocator, find_scorer, scorer_names
    from sparsemm_lmms.settings import declared

    owners: list[tuple[str, type]] = [(name, find_scorer(name)) for name in scorer_names()]
    owners += [(name, find_allocator(name)) for name in allocator_names()]  # a scorer may have the same name
    shared = declared(CompressionConfig)
    for name, known in shared.items():
        yield name, _text(known.default), "all", known.help
    told: dict[str, list[str]] = {}
    known_by = {}
    for owner, part in owners:
        for name, known in declared(part).items():
            told.setdefault(name, []).append(owner)
            known_by[name] = known
    for name, known in known_by.items():
        yield name, _text(known.default), ", ".join(told[name]), known.help


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def show(title: str, header: Sequence[str], rows: Rows) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, title=title)
    for row in rows:
        table.add_row(*(Text(cell.replace("`", "")) for cell in row))
    Console().print(table)
