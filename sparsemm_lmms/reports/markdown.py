"""Texts of records in Markdown: shown letter by letter, whatever stands in them."""

from __future__ import annotations

import html
import re

from sparsemm_lmms.json_files import one_line

MARKS = re.compile(r"[`*~$|]|\\(?=[!-/:-@\[-`{-~])|\](?=[(:\[])|^[#+=-](?![\d.])")
"""Where Markdown would not show the letters of a text: marks, columns of tables, escapes, links, blocks."""


def plain(text: str) -> str:
    """Markdown that shows these letters: no mark, line, column or tag of a table comes from a record."""
    return html.escape(MARKS.sub(r"\\\g<0>", one_line(text)), quote=False)


def item(text: str) -> str:
    """A line of a list."""
    return f"* {plain(text)}\n"


def code(name: str) -> str:
    """A file name."""
    return f"`{name}`" if re.fullmatch(r"[\w./ -]+", name) else plain(name)
