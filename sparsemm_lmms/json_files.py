"""Reading JSON that somebody else may have written or cut: bounded in size and depth, each defect one sentence.

Every error is a `ValueError` (`FileNotFoundError` for a missing file) that names the file, what is wrong with it and
the mend. Importing this module needs neither NumPy nor torch.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterable
from types import GenericAlias, NoneType, UnionType
from typing import Any

LARGEST = 256 * 2**20
"""Bytes of a file that are read; more is refused."""
DEEPEST = 100
"""Objects and lists inside each other."""
MOST_DIGITS = 40
"""Of a whole number: each that is read fits a float."""

_OBJECT, _LIST = "an object", "a list"
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: _OBJECT, list: _LIST}
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bytes(path: str | os.PathLike[str], what: str, mend: str, limit: int = LARGEST) -> bytes:
    """The content of a regular file; a FIFO, a device or a folder is refused without being opened.

    Args:
        what: the kind of file, as a sentence begins with it: `"Score file"`.
        mend: what the user can do, as a sentence ends with it: `"give the file that ... wrote"`.
        limit: bytes.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for another kind of thing, a longer file, or one that cannot be read.
    """
    where = f"{what} {os.fspath(path)}"
    try:
        mode = os.stat(path).st_mode
        content = b""
        if stat.S_ISREG(mode):
            with open(path, "rb") as file:
                content = file.read(limit + 1)
    except OSError as error:
        if error.errno in _MISSING:
            raise FileNotFoundError(f"{where} does not exist; {mend}.") from None
        raise ValueError(f"{where} cannot be read ({error.strerror}); {mend}.") from None
    except ValueError as error:  # of the path: a NUL in it
        raise ValueError(f"{where} is no file that can exist ({error}); {mend}.") from None
    if not stat.S_ISREG(mode):
        raise ValueError(f"{where} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}; {mend}.")
    if len(content) > limit:
        raise ValueError(f"{where} is longer than {limit} bytes; {mend}.")
    return content


def read_text(path: str | os.PathLike[str], what: str, mend: str, limit: int = LARGEST) -> str:
    """The content of a regular UTF-8 file; arguments and errors of `read_bytes`, and ValueError for other text."""
    return _decoded(read_bytes(path, what, mend, limit), f"{what} {os.fspath(path)}", mend)


def read_json(
    path: str | os.PathLike[str], what: str, mend: str, limit: int = LARGEST, unique_keys: bool = False
) -> Any:
    """The value in a JSON file. `checked` says whether it is the one that was expected.

    Args:
        what, mend, limit: as in `read_bytes`.
        unique_keys: refuse an object that has a key twice, where otherwise the last one counts.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: for all that `read_bytes`, `read_text` and `parse_json` refuse.
    """
    where = f"{what} {os.fspath(path)}"
    return parse_json(read_bytes(path, what, mend, limit), where, mend, unique_keys)


def parse_json(text: str | bytes, where: str, mend: str, unique_keys: bool = False) -> Any:
    """The value that UTF-8 JSON text says; NaN and infinite numbers are let through.

    Args:
        where: what is read, as a sentence begins with it: `"Score file a.json"`.

    Raises:
        ValueError: for other text, values nested deeper than `DEEPEST`, whole numbers of more than `MOST_DIGITS`
            digits, halves of surrogate pairs (which no file can hold), and keys that stand twice if `unique_keys`.
    """
    if isinstance(text, bytes):
        text = _decoded(text, where, mend)
    try:
        value = json.loads(text, parse_int=_whole, object_pairs_hook=_unique if unique_keys else None)
        _check_depth(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except _Content as error:
        raise ValueError(f"{where} {error}; {mend}.") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is no JSON file (not JSON at {place}: {error.msg}); {mend}.") from None
    except RecursionError:
        raise ValueError(f"{where} nests objects or lists deeper than {DEEPEST}; {mend}.") from None
    except UnicodeEncodeError:
        raise ValueError(f"{where} holds half of a surrogate pair, which is no character; {mend}.") from None
    return value


def checked(value: Any, kind: Any, where: str, mend: str, place: str = "") -> Any:
    """`value`, if it is of this kind.

    Args:
        kind: `str`, `int` (of 64 bits), `float` (and such whole numbers), `bool`, `dict`, `list`, `Any`,
            `dict[str, kind]`, `list[kind]`, `kind | None`, or `{name: kind, ...}`: an object with at least these
            fields. A field of kind `kind | None` or `Any` may be missing.
        where: the file, as a sentence begins with it.
        mend: what the user can do, as a sentence ends with it.
        place: of the value in the file, where it is not all of it.

    Raises:
        ValueError: naming the file, the place in it, and what stands there.

    >>> checked({"budget": 64}, {"budget": int, "seed": int | None}, "Record a.json", "remake it")
    {'budget': 64}
    """
    fault = _fault(value, kind)
    if fault is None:
        return value
    before, after, steps = fault
    inside = place + "".join(reversed(steps))
    raise ValueError(f"{where} {before} {inside.removeprefix('.') or 'its content'}{after}; {mend}.")


def _fault(value: Any, kind: Any) -> tuple[str, str, list[str]] | None:
    """What is said before and after the place of a fault, and the steps from there outwards. None without one."""
    if kind is Any or (type(value) is kind and kind is not int):
        return None
    if isinstance(kind, UnionType):
        if value is None:
            return None
        return _fault(value, next(option for option in kind.__args__ if option is not NoneType))
    fields = kind if isinstance(kind, dict) else None
    base = dict if fields is not None else getattr(kind, "__origin__", kind)
    fits = isinstance(value, (int, float) if base is float else base)
    if not fits or isinstance(value, bool):
        return f"has {_shown(value)} for", f", not {_WORDS[base]}", []
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"has {value} for", ", which 64 bits do not hold", []
    inner: Iterable[tuple[str | int, Any, Any]] = ()
    if fields is not None:
        for name, of in fields.items():
            if name not in value and not (of is Any or isinstance(of, UnionType)):
                return "lacks the field", "", [_step(name)]
        inner = ((name, value[name], of) for name, of in fields.items() if name in value)
    elif isinstance(kind, GenericAlias):
        of = kind.__args__[-1]
        inner = ((name, item, of) for name, item in (value.items() if base is dict else enumerate(value)))
    for name, item, of in inner:
        fault = _fault(item, of)
        if fault is not None:
            fault[2].append(_step(name))
            return fault
    return None


def quoted(name: str) -> str:
    """A name as a sentence quotes it, on one line; long ones are cut.

    >>> quoted("0-0")
    '"0-0"'
    """
    return json.dumps(_cut(name))


def one_line(text: str) -> str:
    """A text with a space for each line break and other letter that is not printed.

    >>> one_line("a\\nb")
    'a b'
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


class _Content(ValueError):
    """What a hook finds, as the rest of a sentence about the file."""


def _decoded(content: bytes, where: str, mend: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 text; {mend}.") from None


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise _Content(f"holds a number of {len(digits)} digits, more than {MOST_DIGITS}")
    return int(digits)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise _Content(f"has the entry {quoted(twice)} twice")
    return values


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(DEEPEST):
        inner = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [item for items in inner for item in items if isinstance(item, (dict, list))]
        if not level:
            return
    raise RecursionError


def _step(name: str | int) -> str:
    if isinstance(name, int):
        return f"[{name}]"
    return f".{name}" if name.isidentifier() and name == _cut(name) else f"[{quoted(name)}]"


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def _shown(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return _WORDS[type(value)]
    return quoted(value) if isinstance(value, str) else json.dumps(value)
