"""Settings are declared once, where they have their effect; checks, refusals, names, records and docs read that."""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from sparsemm_lmms.json_files import read_json

LARGEST = 2**63 - 1
"""The largest whole number that a setting may be: what random generators and tensors take."""

Table = str | tuple[tuple[float, ...], ...]
"""A setting of numbers `[layers, kv_heads]`, or a word that stands for having none; one row serves every layer."""

_TABLE_FILE = "give a JSON file of rows of numbers [layers, kv_heads], or of lists under the keys layer-head-key"
_WANTED = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a word",
    "Table": "a table of numbers [layers, kv_heads] or its JSON file",
}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


@dataclass(frozen=True)
class Setting:
    """One declared setting.

    Attributes:
        name, kind, default: of the field; `kind` is `int`, `float`, `bool`, `str` or `Table`.
        help: what it means.
        word: how a name of VLMEvalKit writes a number: before it (`k7`); None for not at all: names refuse a table.
        words: words of such names that stand for values (`maxpool`).
        low, high: bounds of a number, both included.
        choices: what a word may be.
        odd: whether a number must be odd.
        paper: (name, arXiv id) of what a user cites beside the rest where the value is not the default.
        shared: accepted by all methods, so that one line of arguments can run through them; else by those that use it.
    """

    name: str
    kind: str
    default: Any
    help: str
    word: str | None = None
    words: Mapping[str, Any] = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    odd: bool = False
    shared: bool = False
    paper: tuple[str, str] | None = None

    def checked(self, value: Any) -> Any:
        """`value`, perhaps the string of a command line, as this setting's type.

        Raises:
            ValueError: one sentence naming the setting, the value and what is accepted.
        """
        if self.kind == "Table" and isinstance(value, str) and value == self.default:
            return value
        found = parse_value(self.name, value, self.kind)
        if self.choices and found not in self.choices:
            raise ValueError(unknown_name(self.name, found, self.choices))
        if self.odd and (found < 1 or found % 2 == 0):
            raise ValueError(f"{self.name}={found} must be odd and positive, for example 5 or 7.")
        if self.low is not None and self.high is not None and not self.low <= found <= self.high:
            raise ValueError(f"{self.name}={found} must lie between {self.low:g} and {self.high:g}.")
        if self.low is not None and found < self.low:
            raise ValueError(f"{self.name}={found} must be at least {self.low:g}.")
        return found


def setting(default: Any, *, help: str, **facts: Any) -> Any:
    """A field of a scorer, an allocator or `CompressionConfig` that users can set; `facts` are those of `Setting`."""
    return field(default=default, metadata={"setting": {"help": help, **facts}})


def declared(owner: type) -> dict[str, Setting]:
    """The settings that a dataclass declares, by name, in order.

    Raises:
        ValueError: for a type that no command line could give.
    """
    found = {}
    for known in dataclasses.fields(owner):
        if "setting" in known.metadata:
            kind = known.type if isinstance(known.type, str) else known.type.__name__
            if kind not in _WANTED:
                raise ValueError(f"{owner.__name__}.{known.name} is a {kind}; settings are {', '.join(_WANTED)}.")
            found[known.name] = Setting(known.name, kind, known.default, **known.metadata["setting"])
    return found


def parse_value(name: str, value: Any, kind: str) -> Any:
    """Convert `value` to the type named by `kind` (one of `Setting.kind`) or say in one sentence why not."""
    if kind == "bool":
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in _TRUE + _FALSE:
            return word in _TRUE
    elif kind == "int" and not isinstance(value, bool):
        whole = _whole(value)
        if whole is not None and abs(whole) > LARGEST:
            raise ValueError(f"{name}={shown(value)} is too large: whole numbers reach up to {LARGEST}.")
        if whole is not None:
            return whole
    elif kind == "float" and not isinstance(value, bool):
        number = _real(value)
        if number is not None and not math.isfinite(number):
            raise ValueError(f"{name}={shown(value)} is not a finite number.")
        if number is not None:
            return number
    elif kind == "str" and isinstance(value, str):
        return value
    elif kind == "Table":
        rows = _rows(_read_table(name, value) if isinstance(value, (str, os.PathLike)) else value)
        if rows is not None:
            return rows
    raise ValueError(f"{name}={shown(value)} is not {_WANTED[kind]}.")


def _read_table(name: str, path: str | os.PathLike[str]) -> Any:
    """Rows of a JSON file: lists, or (as MixKV's) numbers under `layer-head-key`, of which the mean."""
    found = read_json(path, f"Table {name}", _TABLE_FILE)
    if not isinstance(found, dict):
        return found
    matches = {re.fullmatch(r"(\d{1,4})-(\d{1,4})-key", key): numbers for key, numbers in found.items()}
    cells = {(int(m[1]), int(m[2])): numbers for m, numbers in matches.items() if m}
    shape = [max(place) + 1 for place in zip(*cells, strict=True)]
    if not cells or len(cells) != math.prod(shape) or any(_rows(numbers) is None for numbers in cells.values()):
        raise ValueError(
            f"Table {name} {os.fspath(path)} does not have numbers for every layer and head; {_TABLE_FILE}."
        )
    return [[sum(cells[i, j]) / len(cells[i, j]) for j in range(shape[1])] for i in range(shape[0])]


def _rows(value: Any) -> tuple[tuple[float, ...], ...] | None:
    """Nested sequences, an array or a tensor as rows of floats, or None where it is no table."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(value, (list, tuple)) or not value:
        return None
    rows = value if all(isinstance(row, (list, tuple)) for row in value) else [value]
    numbers = [tuple(_real(x) if isinstance(x, (int, float)) else None for x in row) for row in rows]
    if not numbers[0] or len({len(row) for row in numbers}) > 1:
        return None
    if any(x is None or not math.isfinite(x) for row in numbers for x in row):
        return None
    return tuple(numbers)  # type: ignore[arg-type]


def _whole(value: Any) -> int | None:
    """`value` as an exact whole number (`64`, `"64"`, `64.0`, `"64.0"`), or None if it is none."""
    if isinstance(value, float):
        return int(value) if math.isfinite(value) and value == int(value) else None
    if not isinstance(value, str):
        try:
            return operator.index(value)
        except TypeError:
            return None
    if not (text := _decimal(value)):
        return None
    number = Decimal(text)
    if number.adjusted() > 19:  # larger than LARGEST; its digits need not be written out
        return 10**20
    return int(number) if number == number.to_integral_value() else None


def _real(value: Any) -> float | None:
    """`value` as a float, infinite where it is too large for one, or None if it is no number."""
    if isinstance(value, str) and "_" in value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def _decimal(text: str) -> str | None:
    """The number that `text` writes in plain digits, perhaps with a fraction or an exponent, or None."""
    match = re.fullmatch(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]?\d{1,6})?", text.strip(), re.ASCII | re.IGNORECASE)
    return match and match[0]


def shown(value: Any) -> str:
    """`value` as a sentence quotes it: long ones are cut."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return cut(text)


def cut(text: str) -> str:
    """A text for a sentence: its beginning and its end where it is long."""
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def unknown_name(what: str, name: str, known: list[str] | tuple[str, ...]) -> str:
    """The sentence for an unknown name: what is known, and which of it is nearest."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    return f"Unknown {what} {shown(name)}; known: {', '.join(known)}.{hint}"
