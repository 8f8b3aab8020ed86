"""In a clone the sub-packages lie beside this folder; when Python starts there, they must still be found.

`python -m lmms_eval` from a clone's root puts that root first on sys.path, so that `sparsemm_lmms` is the clone's
folder even where the package is installed. Only the names of `[tool.setuptools.package-dir]` are mapped.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDERS = {
    "sparsemm_lmms.model_wrappers": HERE.parent / "model_wrappers",
    "sparsemm_lmms.kernels": HERE.parent / "kernels" / "triton",
    "sparsemm_lmms.cpu_kernels": HERE.parent / "kernels" / "cpu",
    "sparsemm_lmms.task_overrides": HERE.parent / "task_overrides",
}


class SourceTreeFinder:
    """Finds the mapped sub-packages of a clone."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = FOLDERS.get(name)
        if folder is None:
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


def map_folders() -> None:
    """Make the sub-packages importable if this is a clone and not an installed package."""
    is_clone = not (HERE / "kernels").is_dir() and all(
        (folder / "__init__.py").is_file() for folder in FOLDERS.values()
    )
    if is_clone and SourceTreeFinder not in sys.meta_path:
        # first: an editable install of another clone would give that one's sub-packages beside this one's folder
        sys.meta_path.insert(0, SourceTreeFinder)  # type: ignore[arg-type]
