"""What a result was made of, as digests: equal exactly when the content is, wherever it lies."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsemm_lmms.visual_heads.samples import CalibrationSample, Skipped


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, as hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def files_sha256(root: Path, files: Iterable[Path]) -> str:
    """SHA-256 over names (seen from ``root``) and bytes of these files, in any order."""
    told = sorted((file.relative_to(root).as_posix(), file_sha256(file)) for file in files)
    return hashlib.sha256(repr(told).encode()).hexdigest()


def visible_files(folder: Path) -> list[Path]:
    """The regular files below a folder; names that start with a dot, and what Python and pip make, are passed over."""
    found = []
    for file in folder.rglob("*"):
        parts = file.relative_to(folder).parts
        if not any(part.startswith(".") or part in ("__pycache__", "site-packages") for part in parts):
            found += [file] if file.is_file() else []
    return sorted(found)


@dataclass(frozen=True)
class Changes:
    """What was done to a checkpoint's weights when they were read.

    Attributes:
        quantization: how they were quantised, or None.
        adapter: SHA-256 of the adapter that was put on them, or None.
    """

    quantization: str | None = None
    adapter: str | None = None

    def version(self, checkpoint: str) -> str:
        """The version of the changed weights, from that of the checkpoint."""
        adapter = None if self.adapter is None else f"adapter-{self.adapter[:12]}"
        return "+".join(filter(None, [checkpoint, adapter, self.quantization]))


UNCHANGED = Changes()


def sample_sha256(sample: CalibrationSample | Skipped) -> str:
    """16 hex digits for what chase reads of a sample: pixels, question, answer and boxes."""
    if isinstance(sample, Skipped):
        return hashlib.sha256(repr(sample.name).encode()).hexdigest()[:16]
    facts = (sample.name, sample.prompt, sample.answer, sample.boxes, sample.spans)
    digest = hashlib.sha256(repr(facts).encode())
    for kind, pictures in (("image", sample.images), ("frame", sample.video)):
        for picture in pictures:
            digest.update(f"{kind} {picture.mode} {picture.size}".encode() + picture.tobytes())
    return digest.hexdigest()[:16]


def differing(there: Any, here: Mapping[str, Any], place: str = "") -> list[str]:
    """``name: value there, value here`` for each entry of ``here`` that ``there`` has otherwise or lacks."""
    found = []
    for key, value in here.items():
        name, other = f"{place}{key}", there.get(key) if isinstance(there, Mapping) else None
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found += differing(other, value, f"{name}.")
        elif other != value:
            found.append(f"{name}: {_short(other)} there, {_short(value)} here")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
