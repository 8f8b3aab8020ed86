"""Which checkpoint it is: a folder by its files, one of the hub by its commit, a demo model by our version."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from sparsemm_lmms._version import __version__
from sparsemm_lmms.head_scores import provenance_path
from sparsemm_lmms.visual_heads.identity import file_sha256, visible_files

PACKAGED = "head_scores.json"
"""The score file that a model's folder may hold."""
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
SMALL = 64 * 2**20  # bytes up to which a file of a checkpoint is told by its content


def folder_version(folder: str | os.PathLike[str]) -> str:
    """12 hex digits that change when a file of a local model does, whichever decides its answers.

    Files count by name and content, in folders inside as well; weights, and what is larger than 64 MiB, by name, size
    and time. Hidden files and score files do not count: they are no part of the model.
    """
    looks: list[tuple[Any, ...]] = []
    for file in visible_files(Path(folder)):
        name, facts = file.relative_to(folder).as_posix(), file.stat()
        if file.suffix.lower() in WEIGHTS or facts.st_size > SMALL:
            looks.append((name, facts.st_size, facts.st_mtime_ns))
        elif not _about_scores(file):
            looks.append((name, facts.st_size, file_sha256(file)))
    return hashlib.sha256(repr(looks).encode()).hexdigest()[:12]


def _about_scores(file: Path) -> bool:
    """Whether ``chase`` wrote this file."""
    written = file.name == PACKAGED or file.name.endswith((".provenance.json", ".partial.jsonl"))
    return written or provenance_path(file).is_file()


def checkpoint_version(pretrained: str, revision: str | None, config: Any) -> str:
    """Which weights these are: our version for a demo model, ``folder_version``, else the commit or the revision."""
    if full_name(pretrained).startswith("demo/"):
        return f"demo {__version__}"
    if os.path.isdir(pretrained):
        return folder_version(pretrained)
    return getattr(config, "_commit_hash", None) or revision or "main"


def full_name(pretrained: str) -> str:
    """One name for a model, whichever way it is given: ``demo/FAMILY``, the whole path of a folder, or the hub's id."""
    from sparsemm_lmms.demo import FAMILIES, model_path

    if not os.path.isdir(pretrained):
        return pretrained
    folder = Path(pretrained).resolve()
    demo = [f"demo/{family}" for family in FAMILIES if Path(model_path(family)).resolve() == folder]
    return demo[0] if demo else str(folder)
