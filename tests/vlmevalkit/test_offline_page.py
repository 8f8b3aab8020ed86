"""docs/offline.md: its commands for VLMEvalKit, as they stand, on the stand-in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .. import offline_page
from .conftest import IS_REAL, STAND_IN


@pytest.mark.slow
@pytest.mark.skipif(IS_REAL, reason="the real host downloads OCRBench anew where its file is not the published one")
def test_the_commands_of_the_page(tmp_path: Path, datasets: Callable[[int], tuple[str, str]]) -> None:
    offline_page.checkpoint(tmp_path)
    (tmp_path / "LMUData" / f"{datasets(2)[1]}.tsv").rename(tmp_path / "LMUData" / "OCRBench.tsv")
    commands = [block for block in offline_page.blocks(None) if block.startswith("export")] + offline_page.blocks(
        "VLMEvalKit"
    )
    assert sum(block.count("sparsemm-lmms ") for block in commands) == 1
    offline_page.run(commands, tmp_path, STAND_IN)
    answers = {file.parent.name: json.loads(file.read_text()) for file in tmp_path.glob("outputs/*/*_OCRBench.json")}
    assert {name: len(given) for name, given in answers.items()} == {"Qwen2VL-Local_snapkv_b128_w16": 2}
