"""JSON of others: what is refused, and that the sentence names the file, the place and the mend."""

from __future__ import annotations

import doctest
import os
from pathlib import Path
from typing import Any

import pytest

from sparsemm_lmms import json_files
from sparsemm_lmms.json_files import DEEPEST, checked, parse_json, read_bytes, read_json

MEND = "remake it"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no JSON file"),
        (b"{} x", "Extra data"),
        (b"\xef\xbb\xbf{}", "no JSON file"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"[" * 100_000, "deeper than"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), "deeper than"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "deeper than"),
        (b"1" * 41, "a number of 41 digits"),
        (b"[-" + b"1" * 5000 + b"]", "a number of 5001 digits"),
        (b'["\\ud800"]', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
    ],
)
def test_what_is_no_json_for_us(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(path, "Score file", MEND)
    message = str(caught.value)
    assert message.startswith(f"Score file {path} ") and message.endswith("; remake it.") and said in message
    assert type(caught.value) is ValueError and "\n" not in message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[" * DEEPEST + "]" * DEEPEST, None),
        ("9" * 40, int("9" * 40)),
        ('"\\ud83d\\ude00 \\\\ud800"', "\U0001f600 \\ud800"),
        ('{"a": 1, "a": 2}', {"a": 2}),
        ("1e999", float("inf")),
    ],
)
def test_what_is(text: str, value: Any) -> None:
    found = parse_json(text, "Line 1", MEND)
    assert value is None or found == value


def test_keys_that_stand_twice() -> None:
    with pytest.raises(ValueError, match='Line 1 has the entry "b" twice; remake it.'):
        parse_json('{"a": {"a": 1}, "b": 2, "b": 2}', "Line 1", MEND, unique_keys=True)
    assert parse_json('{"a": {"a": 1}}', "Line 1", MEND, unique_keys=True) == {"a": {"a": 1}}


def test_only_regular_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_bytes(b"12345")
    assert read_bytes(tmp_path / "file", "File", MEND, limit=5) == b"12345"
    with pytest.raises(ValueError, match="file is longer than 4 bytes; remake it."):
        read_bytes(tmp_path / "file", "File", MEND, limit=4)
    for missing in (tmp_path / "none", tmp_path / "file" / "x", tmp_path / ("a" * 300)):
        with pytest.raises(FileNotFoundError, match="does not exist; remake it."):
            read_bytes(missing, "File", MEND)
    monkeypatch.setattr("builtins.open", None)
    for other, said in ((tmp_path, "is a folder"), (tmp_path / "fifo", "no regular"), ("/dev/zero", "no regular")):
        with pytest.raises(ValueError, match=said):
            read_bytes(other, "File", MEND)
    with pytest.raises(ValueError, match="no file that can exist"):
        read_bytes("a\0b", "File", MEND)


@pytest.mark.parametrize(
    ("value", "kind", "said"),
    [
        (None, dict, "has null for its content, not an object"),
        ([], {"a": int}, "has a list for its content, not an object"),
        ({}, {"a": int}, "lacks the field a"),
        ({"a": True}, {"a": int}, "has true for a, not a whole number"),
        ({"a": True}, {"a": float}, "has true for a, not a number"),
        ({"a": 1.5}, {"a": int}, "has 1.5 for a, not a whole number"),
        ({"a": 2**63}, {"a": float}, "has 9223372036854775808 for a, which 64 bits"),
        ({"a": "x"}, {"a": int | None}, 'has "x" for a, not a whole number'),
        ({"a": {"b c": [1, "x"]}}, {"a": dict[str, list[float]]}, 'has "x" for a["b c"][1], not a number'),
        ({"a": {"b": {}}}, {"a": {"b": {"c": str}}}, "lacks the field a.b.c"),
        ({"a": {"b": []}}, {"a": dict[str, dict[str, float]]}, "has a list for a.b, not an object"),
    ],
)
def test_values_of_other_kinds(value: Any, kind: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        checked(value, kind, "Record r.json", MEND)
    assert str(caught.value).startswith(f"Record r.json {said}") and str(caught.value).endswith("; remake it.")


def test_values_of_the_kind() -> None:
    kind = {"a": int, "b": float, "c": int | None, "d": Any, "e": dict[str, list[str]], "f": bool}
    value = {"a": 1, "b": 2, "e": {"x": ["y"]}, "f": False, "more": 3}
    assert checked(value, kind, "Record", MEND) is value
    assert checked({"c": None, **value}, kind, "Record", MEND)["c"] is None
    with pytest.raises(ValueError, match=r"Record has 1 for lines\[2\].text, not text"):
        checked({"text": 1}, {"text": str}, "Record", MEND, "lines[2]")


def test_examples_in_the_code() -> None:
    assert doctest.testmod(json_files).failed == 0
