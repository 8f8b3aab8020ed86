"""Which commit of this package runs: what records of evaluations and benchmarks both state."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import subprocess
from pathlib import Path


@functools.cache
def source_commit() -> str | None:
    """Commit of the clone that this code lies in, `-dirty` after it when files were changed.

    Outside of a clone the commit that pip installed from git, as pip wrote it down (PEP 610); None for a release.
    """
    folder = Path(__file__).resolve().parents[1]
    if (folder / ".git").exists():
        try:
            commit = _git(folder, "rev-parse", "HEAD")
            return commit + ("-dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
        except (OSError, subprocess.CalledProcessError):  # no git here, or a folder that it does not trust
            return None
    try:
        text = importlib.metadata.distribution("sparsemm-lmms").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return None
    return json.loads(text or "{}").get("vcs_info", {}).get("commit_id")


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=30
    )
    return done.stdout.strip()
