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

import numpy as np

from sparsemm_lmms.json_files import LARGEST, checked, parse_json
from sparsemm_lmms.visual_heads.identity import differing

try:
    import fcntl
except ImportError:  # not on Windows: two runs into one output are then not noticed
    fcntl = None  # type: ignore[assignment]

TABLE = list[list[float]]
MEND = "delete it or choose another output"


class PartialResults:
    """Records ``0..len(records)`` are done; ``append`` adds the next ones durably.

    output: the score file. settings: JSON-able, with ``layers`` and ``q_heads``; what decides the records. total:
    inputs of this run, if known; a batch that reaches beyond them is done anew. overwrite: begin anew where the file
    beside ``output`` is of other settings, which is a ValueError otherwise. A file that holds anything but such records
    is a ValueError that names the line and the field.

    >>> # with PartialResults(path, settings, batch_size) as partial: ...; partial.append([...]); partial.remove()
    """

    def __init__(
        self,
        output: Path,
        settings: dict[str, Any],
        batch_size: int,
        total: int | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = output.with_name(output.name + ".partial.jsonl")
        self.settings = json.loads(json.dumps(settings))
        self.batch_size = batch_size
        self.total = total
        self.overwrite = overwrite
        self.records: list[dict[str, Any]] = []

    def __enter__(self) -> PartialResults:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():
            raise ValueError(f"{self.path} is no regular file; {MEND}.")
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
        lines = self._lines()
        wanted = {"sparsemm_lmms_chase": 1, "settings": self.settings}
        if len(lines) < 2:  # no image was done, whatever the settings
            self._restart(wanted)
            return
        header = parse_json(lines[0], f"The first line of {self.path}", MEND)
        if header != wanted:
            if self.overwrite:
                self._restart(wanted)
                return
            theirs = header.get("settings") if isinstance(header, dict) else None
            changed = ", ".join(differing(theirs, self.settings)) or "of another version"
            raise ValueError(f"{self.path} belongs to a run with other settings ({changed}); {MEND}.")
        self.records = [self._record(line, index) for index, line in enumerate(lines[1:])]
        done = len(self.records) if self.total is None else min(len(self.records), self.total)
        del self.records[done // self.batch_size * self.batch_size :]
        self._file.truncate(sum(len(line) for line in lines[: 1 + len(self.records)]))

    def _restart(self, header: dict[str, Any]) -> None:
        self._file.truncate(0)
        self._write(header)

    def _lines(self) -> list[bytes]:
        """The whole lines; what follows the last line feed is torn."""
        lines = []
        with open(self.path, "rb") as file:
            while (line := file.readline(LARGEST)).endswith(b"\n"):
                lines.append(line)
        if len(line) == LARGEST:
            raise ValueError(f"Line {len(lines) + 1} of {self.path} is longer than {LARGEST} bytes; {MEND}.")
        return lines

    def _record(self, line: bytes, index: int) -> dict[str, Any]:
        where = f"Line {index + 2} of {self.path}"
        record = parse_json(line, where, MEND)
        checked(record, {"index": int, "name": str, "sample": str}, where, MEND)
        if record["index"] != index:
            raise ValueError(f"{where}: index is {record['index']}, not {index}; {MEND}.")
        if "skipped" in record:
            return checked(record, {"skipped": str}, where, MEND)
        checked(record, {"tokens": int, "counted": int, "score": TABLE, "mass": TABLE}, where, MEND)
        shape = self.settings["layers"], self.settings["q_heads"]
        for name in ("score", "mass"):
            if [len(row) for row in record[name]] != [shape[1]] * shape[0]:
                raise ValueError(f"{where}: {name} is no table of {shape[0]} x {shape[1]} numbers; {MEND}.")
        if "held" in record:
            self._check_held(record["held"], where)
        return record

    def _check_held(self, held: Any, where: str) -> None:
        shape = self.settings["layers"], self.settings["kv_heads"]
        try:
            table = np.array(held, dtype=np.float64)
        except (TypeError, ValueError):
            table = np.empty(0)
        if table.ndim != 3 or table.shape[:2] != shape or not np.isfinite(table).all():
            raise ValueError(f"{where}: held is no table of {shape[0]} x {shape[1]} curves of numbers; {MEND}.")

    def _write(self, *lines: dict[str, Any]) -> None:
        rest = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        while rest:
            rest = rest[self._file.write(rest) :]
        os.fsync(self._file.fileno())
