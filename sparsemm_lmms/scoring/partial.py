"""Results kept image by image beside the output, so that a killed run goes on where it was.

``scores.json`` -> ``scores.json.partial.jsonl``: a header with the run's settings, then one line a sample, appended and
fsynced a batch at a time. A torn last line (killed while writing, disk full) is cut off on the next start. Batches are
always formed from the same samples, so that a resumed run computes exactly what an undisturbed one does. The file is
locked while in use and deleted when the scores are written.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows: two runs into one output are then not noticed
    fcntl = None  # type: ignore[assignment]


class PartialResults:
    """Records ``0..len(records)`` are done; ``append`` adds the next ones durably.

    >>> # with PartialResults(path, settings, batch_size) as partial: ...; partial.append([...]); partial.remove()
    """

    def __init__(self, output: Path, settings: dict[str, Any], batch_size: int) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.settings = json.loads(json.dumps(settings))
        self.batch_size = batch_size
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> PartialResults:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b", buffering=0)  # nothing left in a buffer for `close` to write half of
        try:
            self._lock()
            self._read()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.records:  # nothing to go on with
            self.remove()
        self._file.close()

    def append(self, records: list[dict[str, Any]]) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            self._write(*records)
        except OSError as error:
            os.truncate(self.path, start)  # a full disk: leave whole lines only
            told = f"{error.strerror}; {len(self.records)} inputs are kept: make room and run the same command again"
            raise OSError(error.errno, told, str(self.path)) from error
        self.records.extend(records)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"Another process is writing {self.path}; wait for it or choose another output.") from None

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        lines = content.split(b"\n")[:-1]  # what follows the last line feed is torn
        wanted = {"sparsemm_lmms_chase": 1, "settings": self.settings}
        if len(lines) < 2:  # no image was done, whatever the settings
            self._file.truncate(0)
            self._write(wanted)
            return
        header = _loads(lines[0])
        if header != wanted:
            changed = _differences((header or {}).get("settings"), self.settings)
            raise ValueError(
                f"{self.path} belongs to a run with other settings ({changed}); delete it or choose another output."
            )
        records, keep = [], len(lines[0]) + 1
        for index, line in enumerate(lines[1:]):
            record = _loads(line)
            if record is None or record.get("index") != index:
                break
            records.append(record)
        records = records[: len(records) // self.batch_size * self.batch_size]
        keep += sum(len(line) + 1 for line in lines[1 : 1 + len(records)])
        self._file.truncate(keep)
        self.records = records

    def _write(self, *lines: dict[str, Any]) -> None:
        rest = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())


def _loads(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _differences(old: Any, new: dict[str, Any]) -> str:
    if not isinstance(old, dict):
        return "unreadable"
    keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    return ", ".join(f"{key}: {old.get(key)!r} there, {new.get(key)!r} here" for key in keys)
