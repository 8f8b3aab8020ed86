"""docs/offline.md: its commands for lmms-eval run as they stand, and what is missing is named with what brings it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .. import offline_page
from . import documents


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("offline")
    offline_page.checkpoint(folder)
    written = documents.write(tmp_path_factory.mktemp("documents")) / "echo840" / "OCRBench"
    (folder / "echo840/OCRBench/data").mkdir(parents=True)
    (file,) = written.glob("*.parquet")
    shutil.copy(file, folder / "echo840/OCRBench/data/test-00000-of-00001.parquet")
    return folder


@pytest.mark.slow
def test_the_commands_of_the_page(folder: Path) -> None:
    commands = offline_page.blocks(None)
    assert sum(block.count("sparsemm-lmms ") for block in commands) == 3
    offline_page.run(commands, folder)
    records = [json.loads(file.read_text()) for file in sorted(folder.glob("results/*/*_results.json"))]
    tasks = sorted(task for record in records for task in record["configs"])
    assert tasks == ["ocrbench", "ocrbench", "sparsemm_demo_vqa"]
    by_name, by_file = (record for record in records if "ocrbench" in record["configs"])
    for record in (by_name, by_file):
        assert record["n-samples"]["ocrbench"] == {"original": documents.COUNT, "effective": 2}
        assert record["sparsemm_lmms"]["settings"]["pretrained"] == offline_page.CHECKPOINT
    for told in ("prompt_tokens", "output_tokens", "kept_tokens"):  # the same documents, found in two ways
        assert by_name["sparsemm_lmms"]["measured"][told] == by_file["sparsemm_lmms"]["measured"][told]


def test_what_is_marked_is_all_that_is_not_run() -> None:
    every = offline_page.PAGE.read_text().count("```bash")
    kinds = ("network", "wheels", "VLMEvalKit", None)
    assert sum(len(offline_page.blocks(need)) for need in kinds) == every
    assert all("download" in block for block in offline_page.blocks("network"))


def test_documents_that_are_not_there() -> None:
    from sparsemm_lmms.model_wrappers.lmms_eval.commands import _raise

    reason = "Couldn't reach 'echo840/OCRBench' on the Hub (OfflineModeIsEnabled)"
    with pytest.raises(
        FileNotFoundError, match="data set echo840/OCRBench is neither .*`hf download echo840/OCRBench "
    ):
        _raise(ConnectionError(reason), [])
