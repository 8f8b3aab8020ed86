"""Pages of monospaced text as grids of symbols: what the demo images show, before any pixel.

A page is a grid of cells, one symbol a cell. Lines stand three rows apart, so that most cells are blank.
"""

from dataclasses import dataclass, field

import numpy as np

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"
SIGNS = ":-/#+."
SYMBOLS = " " + LETTERS + DIGITS + SIGNS  # index 0 is the blank cell
CODE = np.array(list(LETTERS + DIGITS))
GRIDS = ((24, 24), (20, 24), (16, 24))  # rows, columns; constant columns: both position schemes learn them faster
FORMS = ("page", "form", "table")
# No two keys begin with the same letter, so that one match of a letter finds the line.
KEYS = "AREA BOOK CODE DATE EXIT FLAT GATE HOUR ITEM KIND LINE MARK NAME PLAN HEADROOM SEAT TYPE UNIT WARD ZONE".split()
PITCH, TOP, LEFT, WIDTH = 3, 1, 2, 13  # rows between lines, first row, first column, characters a line
LINES = (3, 5)  # fewest and most lines


@dataclass
class Page:
    """Lines of words on a grid. `words`: (text, row, column of the first character) in reading order."""

    form: str
    rows: int
    cols: int
    words: list[tuple[str, int, int]]
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def cells(self) -> np.ndarray:
        """Symbol indices [rows, cols]."""
        grid = np.zeros((self.rows, self.cols), dtype=np.int64)
        for text, row, col in self.words:
            grid[row, col : col + len(text)] = [SYMBOLS.index(c) for c in text]
        return grid

    @property
    def lines(self) -> list[str]:
        """Printed lines from top to bottom, words joined by one space."""
        rows: dict[int, list[str]] = {}
        for text, row, _ in self.words:
            rows.setdefault(row, []).append(text)
        return [" ".join(rows[r]) for r in sorted(rows)]

    @property
    def columns(self) -> list[str]:
        """Columns of a table from left to right, each read from top to bottom without separators."""
        starts = sorted({col for _, _, col in self.words})
        return ["".join(t for t, _, c in self.words if c == s) for s in starts]


def _code(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(CODE, length))


def _words(rng: np.random.Generator) -> list[str]:
    """Words of 2 to 7 characters that fill a line with single blanks; one in eight holds a sign, such as 7A-3F."""
    lengths, left = [], WIDTH
    while left > 7:
        lengths.append(int(rng.integers(2, min(7, left - 3) + 1)))
        left -= lengths[-1] + 1
    words = [_code(rng, n) for n in [*lengths, left]]
    for i, word in enumerate(words):
        if len(word) >= 4 and rng.random() < 0.125:
            at = int(rng.integers(1, len(word) - 1))
            words[i] = word[:at] + SIGNS[int(rng.integers(1, len(SIGNS)))] + word[at + 1 :]
    return words


def sample_page(rng: np.random.Generator, form: str, rows: int, cols: int) -> Page:
    """A random page of one of FORMS on a grid of one of GRIDS."""
    if rows < TOP + PITCH * (LINES[1] - 1) + 1 or cols < LEFT + WIDTH:
        raise ValueError(f"a grid of {rows} x {cols} cells is too small for {LINES[1]} lines of {WIDTH} characters")
    count = int(rng.integers(LINES[0], LINES[1] + 1))
    keys: dict[str, str] = {}
    words: list[tuple[str, int, int]] = []
    names = rng.choice(KEYS, count, replace=False)
    for i in range(count):
        row, col = TOP + PITCH * i, LEFT
        if form == "page":
            texts = _words(rng)
        elif form == "form":
            texts = [f"{names[i]}:", _code(rng, WIDTH - len(names[i]) - 2)]
            keys[str(names[i])] = texts[1]
        elif form == "table":
            texts = [_code(rng, 1) for _ in range((WIDTH + 1) // 2)]
        else:
            raise ValueError(f"unknown page form {form!r}; known: {', '.join(FORMS)}")
        for text in texts:
            words.append((text, row, col))
            col += len(text) + 1
    return Page(form, rows, cols, words, keys)
