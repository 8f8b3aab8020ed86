"""Reading lmms-eval's results files of our models: without torch, because tables and cards are made on any machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sparsemm_lmms.json_files import checked, read_json

KEY = "sparsemm_lmms"
"""Where the record stands in a results file and, shortened, in each line of a sample log."""


_MEND = "give the *_results.json of a run"
_KINDS: dict[str, Any] = {
    KEY: dict,
    "results": dict[str, dict],
    "config": {"resolved_cli_args": dict | None},
    "n-samples": dict[str, dict[str, float]],
}


def read_results(path: Path) -> dict[str, Any]:
    """A results file of one of our models; its record, `results`, `config` and `n-samples` are objects.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    try:
        data = read_json(path, "Results file", _MEND)
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no results file {path}; {_MEND}.") from None
    if not isinstance(data, dict) or KEY not in data:
        raise ValueError(f"{path} has no record under {KEY!r}: it was not made by one of this package's models.")
    return checked({"config": {}, "n-samples": {}, **data}, _KINDS, f"Results file {path}", _MEND)
