"""The paper's tasks on our documents: one index of the host's task files for all tests, which takes seconds to make."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
from lmms_eval.tasks import TaskManager

from sparsemm_lmms.cli import tasks_folder
from sparsemm_lmms.model_wrappers.lmms_eval import patches
from sparsemm_lmms.model_wrappers.lmms_eval.model import CompressedChatModel

from .documents import write


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with our documents under the data sets' names."""
    return write(tmp_path_factory.mktemp("hub"))


@pytest.fixture(scope="session")
def manager() -> TaskManager:
    """The host's index of all tasks, ours included. Set `model_name` before loading a task."""
    patches.install(CompressedChatModel)  # as a model of ours does before the host loads any task
    return TaskManager(include_path=str(tasks_folder()))


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make the host load the documents of a folder: it prefers folders of the working directory to the network."""

    def change(folder: Path) -> None:
        monkeypatch.chdir(folder)
        cache = folder / "cache"  # of its own: a cache knows the relative names only
        monkeypatch.setattr("lmms_eval.api.task._resolve_hf_datasets_cache_dir", lambda: str(cache))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)  # of GQA's own `load_dataset`

    return change


@pytest.fixture
def in_hub(hub: Path, enter: Callable[[Path], None]) -> None:
    enter(hub)
