"""Results and samples in a folder that no run with other settings shares, and really there.

The host only logs that it could not write; what is missing is written again, or rescued, and the run fails.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparsemm_lmms.model_wrappers.lmms_eval.endings import ends_the_command
from sparsemm_lmms.reports.results import KEY


def check_output(folder: str | None) -> None:
    """Refuse, before the first document, a folder that results cannot be written to.

    Raises:
        ValueError: with the reason.
    """
    if folder is None or int(os.environ.get("RANK", "0")):
        return
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(4096))
    except OSError as error:
        raise ValueError(
            f"--output_path={folder} cannot be written to ({error.strerror}); name a folder that can."
        ) from error


def save_results(
    original: Callable[..., Any], tracker: Any, results: dict, samples: Any = None, datetime_str: str = "", **named: Any
) -> Any:
    """Save into a folder of this run's own, and look whether everything is there: the host only logs that it is not."""
    if KEY not in results:
        return original(tracker, results, samples, datetime_str, **named)
    setattr(tracker, KEY, True)
    tracker.general_config_tracker.model_name_sanitized = results[KEY]["run"]
    saved = original(tracker, results, samples, datetime_str, **named)
    if tracker.output_path:
        file = _folder(tracker) / f"{datetime_str.replace(':', '-')}_results.json"
        tracker.date_id = datetime_str.replace(":", "-")  # the host sets it only if it gets that far
        with ends_the_command():
            if not _is_json(file):
                _write(file, json.dumps(results, indent=2, default=str, ensure_ascii=False))
    return saved


def save_samples(original: Callable[..., Any], tracker: Any, task_name: str, samples: list[dict]) -> Any:
    if not getattr(tracker, KEY, False) or not tracker.output_path:
        return original(tracker, task_name, samples)
    file = _folder(tracker) / f"{tracker.date_id}_samples_{task_name}.jsonl"
    before = _whole_lines(file)
    saved = original(tracker, task_name, samples)
    with ends_the_command():
        if _whole_lines(file) != before + len(samples):  # the host's own form of a sample lacks these two
            rows = ({key: value for key, value in row.items() if key not in ("arguments", "doc")} for row in samples)
            _write(file, "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows))
    return saved


def _folder(tracker: Any) -> Path:
    return Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized


def _is_json(file: Path) -> bool:
    try:
        json.loads(file.read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _whole_lines(file: Path) -> int:
    try:
        return file.read_bytes().count(b"\n")
    except OSError:
        return 0


def _write(file: Path, text: str) -> None:
    """Write what the host did not; if that fails too, put it where it can be written.

    Raises:
        OSError: with the reason and where it lies now.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        rescued = Path(tempfile.mkdtemp(prefix="sparsemm_lmms_")) / file.name
        rescued.write_text(text, encoding="utf-8")
        raise OSError(
            f"{file} could not be written ({error.strerror}); what belongs there is in {rescued}: move it, and name "
            "another --output_path."
        ) from error
