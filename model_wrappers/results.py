"""Reading lmms-eval's results files of our models: without torch, because tables and cards are made on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

KEY = "sparsemm_lmms"
"""Where the record stands in a results file and, shortened, in each line of a sample log."""


def read_results(path: Path) -> dict[str, Any]:
    """A results file of one of our models.

    Raises:
        FileNotFoundError, ValueError: with one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no results file {path}; give the *_results.json of a run.")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON file ({error}); give the *_results.json of a run.") from None
    if not isinstance(data, dict) or KEY not in data:
        raise ValueError(f"{path} has no record under {KEY!r}: it was not made by one of this package's models.")
    return data
