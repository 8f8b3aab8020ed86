"""A family from a package of its own: found by its entry point, run by every host, and alone with its mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from . import makers

HERE = Path(__file__).parent
FILE = HERE / "qwen3_vl_moe.txt"
STAND_IN = HERE.parent / "vlmevalkit" / "standin"
SMALL = "device=cpu,window_size=8,min_pixels=3136,max_pixels=23520"


def install(folder: Path, **entries: str) -> None:
    """What pip leaves in site-packages: the files are there, and the metadata that name their entry points."""
    info = folder / "stranger-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in entries.items()]
    (info / "entry_points.txt").write_text("\n".join(["[sparsemm_lmms.families]", *lines]) + "\n")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    (folder / "stranger_qwen.py").write_text(FILE.read_text())
    install(folder, qwen3_vl_moe="stranger_qwen")
    return folder


@pytest.fixture(scope="module")
def run(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run("-c", code)`: Python with the package installed; what it prints."""
    home = tmp_path_factory.mktemp("home")

    def python(*arguments: object, on_path: Path = package, wanted: int = 0) -> str:
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {"PYTHONPATH": f"{on_path}:{STAND_IN}", "LMMS_EVAL_DATASETS_CACHE": str(home / "datasets")}
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=home, timeout=600, check=False)
        assert done.returncode == wanted, done.stdout + done.stderr
        return done.stdout + done.stderr

    return python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA, M-RoPE, experts; random weights."""
    folder = tmp_path_factory.mktemp("checkpoint")
    vision = dict(depth=2, num_position_embeddings=64, deepstack_visual_indexes=[0])
    experts = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    return makers.qwen("Qwen3VLMoe", vision, 16, folder, **experts)


def test_a_family_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 60


def test_lmms_eval_runs_it(run: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    tasks = run("-m", "sparsemm_lmms", "tasks").strip()
    run(
        *("-m", "lmms_eval", "--model", "qwen3_vl_moe_snapkv", "--tasks", "sparsemm_demo_vqa", "--limit", 2),
        *("--model_args", f"pretrained={checkpoint},budget=24,{SMALL}"),
        *("--include_path", tasks, "--output_path", tmp_path),
    )  # fmt: skip
    [file] = tmp_path.rglob("*_results.json")
    results = json.loads(file.read_text())
    assert results["sparsemm_lmms"]["settings"]["model"] == "qwen3_vl_moe_snapkv"
    assert results["sparsemm_lmms"]["settings"]["system_prompt"] == "You are a helpful assistant."
    assert results["throughput"]["avg_kept_tokens"] == 24 < results["throughput"]["avg_prompt_tokens"]
    assert "qwen3_vl_moe" in run("-m", "sparsemm_lmms", "sweep", "--help")
    run("-m", "sparsemm_lmms", "card", file, "--output", tmp_path / "card.md")
    assert "| snapkv |" in (tmp_path / "card.md").read_text()


def test_a_sweep_runs_it(run: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    run(
        *("-m", "sparsemm_lmms", "sweep", "--model", "qwen3_vl_moe"),
        *("--model_args", f"pretrained={checkpoint},{SMALL}"),
        *("--methods", "snapkv,uniform", "--budgets", "24", "--tasks", "sparsemm_demo_vqa", "--limit", 2),
        *("--output", tmp_path / "sweep"),
    )  # fmt: skip
    plan = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [about["family"] for about in plan["models"].values()] == ["qwen3_vl_moe"]
    assert (tmp_path / "sweep" / "report.md").exists() and len(plan["cells"]) == 3


def test_head_scores_are_found_for_it(run: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    run(
        *("-m", "sparsemm_lmms", "chase", "--model", "qwen3_vl_moe", "--pretrained", checkpoint, "--images", 2),
        *("--mode", "teacher", "--output", tmp_path / "scores.json"),
    )  # fmt: skip
    assert set(json.loads((tmp_path / "scores.json").read_text())) >= {f"{i}-{j}" for i in range(3) for j in range(4)}


def test_vlmevalkit_names_it(run: Callable[..., str]) -> None:
    code = (
        "import json; from functools import partial; from vlmeval import vlm; from vlmeval.config import supported_VLM;"
        "path = 'Qwen/Qwen3-VL-30B-A3B-Instruct';"
        "supported_VLM['Qwen3-VL-30B-A3B-Instruct'] = partial(vlm.Qwen2VLChat, model_path=path);"
        "from sparsemm_lmms.model_wrappers.vlmevalkit.model import register;"
        "name = 'Qwen3VL-30B-Instruct_snapkv_b96_maxp2007040'; added = register([name]); entry = supported_VLM[name];"
        "print(json.dumps([added, entry.func.__name__, entry.keywords]))"
    )
    added, cls, keywords = json.loads(run("-c", code).splitlines()[-1])
    assert "Qwen3VL-30B-Instruct_sparsemm_b64" in added
    assert not any(name.startswith("Qwen3VL-235B") for name in added)  # that VLMEvalKit does not know the checkpoint
    wanted = {"method": "snapkv", "budget": 96, "max_pixels": 2007040, "pretrained": "Qwen/Qwen3-VL-30B-A3B-Instruct"}
    assert (cls, keywords) == ("CompressedQwen3VLMoe", wanted)


def test_a_package_can_import_the_registry_first(run: Callable[..., str]) -> None:
    told = run("-c", "import stranger_qwen; from sparsemm_lmms.families import FAMILIES; print(list(FAMILIES))")
    assert "'qwen3_vl_moe']" in told and "left out" not in told


@pytest.mark.parametrize(
    ("code", "entry", "sentence"),
    [
        ("1 / 0", "broken", "ZeroDivisionError: division by zero"),
        ("import nowhere", "broken", "ModuleNotFoundError: No module named 'nowhere'"),
        ("raise SystemExit(3)", "broken", "SystemExit: 3"),
        ("FAMILY = 'qwen'", "broken", "TypeError: it loads neither to a sparsemm_lmms.families.Family"),
        ("", "broken:FAMILY", "AttributeError: module 'broken' has no attribute 'FAMILY'"),
        ("from sparsemm_lmms.families.qwen2_vl import FAMILY", "broken", "ValueError: the model type qwen2_vl is that"),
        ("from sparsemm_lmms.families import Family\nFAMILY = Family()", "broken", "TypeError: "),
    ],
)  # fmt: skip
def test_a_broken_package_stands_alone(
    code: str, entry: str, sentence: str, run: Callable[..., str], package: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.py").write_text(code)
    (tmp_path / "stranger_qwen.py").write_text(FILE.read_text())
    install(tmp_path, a_broken_one=entry, qwen3_vl_moe="stranger_qwen")
    start = "from sparsemm_lmms.model_wrappers.lmms_eval.manifest import manifests;"
    told = run("-c", f"import sys; {start} print(len(manifests()), 'torch' in sys.modules)", on_path=tmp_path)
    without = run("-c", f"{start} print(len(manifests()))").split()[0]
    assert f"{without} False" in told
    assert told.count("is left out") == 1 and f"Model family 'a_broken_one' ({entry}) is left out: {sentence}" in told
