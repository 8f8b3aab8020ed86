"""A scorer and an allocator from a package of its own, by entry points: lmms-eval, a sweep and VLMEvalKit know them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemm_lmms.cli import tasks_folder

STAND_IN = Path(__file__).parent / "vlmevalkit" / "standin"
PACKAGE = '''
from dataclasses import dataclass
import numpy as np
from sparsemm_lmms.allocators.base import Allocator
from sparsemm_lmms.scorers.base import Scorer
from sparsemm_lmms.settings import setting


@dataclass(frozen=True)
class Loudest(Scorer):
    """Tokens with the largest values."""

    power: float = setting(1.0, help="of the norm", word="pow", low=0)

    def score(self, view):
        return view.value.float().norm(dim=-1)[..., : view.length] ** self.power


@dataclass(frozen=True)
class Halving(Allocator):
    """Later layers leave less to those before."""

    cascades = True

    def observe(self, view, scores):
        return scores.shape[0] * [0.0]

    def counts_so_far(self, shape, seen, lengths):
        return [shape.base // (1 + (len(seen) - 1 - i) // 5) for i in range(len(seen))]
'''
ENTRIES = """[sparsemm_lmms.scorers]
loudest = stranger:Loudest
[sparsemm_lmms.allocators]
halving = stranger:Halving
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages with the package, as pip leaves it."""
    made = tmp_path_factory.mktemp("site-packages")
    (made / "stranger.py").write_text(PACKAGE)
    (made / "stranger-1.0.dist-info").mkdir()
    (made / "stranger-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (made / "stranger-1.0.dist-info" / "entry_points.txt").write_text(ENTRIES)
    return made


def python(folder: Path, *arguments: object) -> str:
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{folder}:{STAND_IN}"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_lmms_eval(folder: Path, tmp_path: Path) -> None:
    parts = "pretrained=demo,device=cpu,budget=64,scorer=loudest,allocator=halving,power=2"
    command = f"--model llava_next_compressed --model_args {parts} --include_path {tasks_folder()} --limit 2"
    python(folder, "-m", "lmms_eval", *command.split(), "--tasks", "sparsemm_demo_vqa", "--output_path", tmp_path)
    [file] = tmp_path.rglob("*_results.json")
    record = json.loads(file.read_text())["sparsemm_lmms"]
    settings = record["settings"]
    assert (settings["scorer"], settings["allocator"], settings["power"]) == ("loudest", "halving", 2.0)
    assert settings["model"] == "llava_next_compressed" and "kernel_size" not in settings
    # ten layers, 32 tokens outside the window: five keep them all, five were left half
    assert record["measured"]["kept_tokens"] == 32 + (32 + 16) / 2


@pytest.mark.slow
def test_sweep(folder: Path, tmp_path: Path) -> None:
    command = "sweep --model llava_next --model_args pretrained=demo,device=cpu --tasks sparsemm_demo_vqa --limit 2"
    methods = ["--methods", "snapkv,loudest+halving", "--budgets", "64", "--output", tmp_path]
    python(folder, "-m", "sparsemm_lmms", *command.split(), *methods)
    table = (tmp_path / "report.md").read_text()
    assert "loudest+halving" in table and "snapkv" in table


def test_names(folder: Path) -> None:
    code = (
        "from sparsemm_lmms.model_wrappers.vlmevalkit.names import parse_name;"
        "print(parse_name('LLaVA-NeXT-Demo_loudest+halving_b64_pow2', {})[1:])"
    )
    assert "('loudest+halving', {'budget': 64, 'power': 2.0})" in python(folder, "-c", code)
    printed = python(folder, "-m", "sparsemm_lmms", "methods", "--markdown")
    assert "| scorer | `loudest` | Tokens with the largest values. |" in printed
    assert "| `power` | `1.0` | loudest | of the norm |" in printed
