"""A family from a package of its own: found by its entry point, run by every host, and alone with its mistakes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sparsemm_lmms.families import FAMILIES
from sparsemm_lmms.model_wrappers.lmms_eval.manifest import manifests
from sparsemm_lmms.model_wrappers.matrix import makers

HERE = Path(__file__).parent
FILE = HERE / "glm_ocr.txt"
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
    (folder / "stranger_glm.py").write_text(FILE.read_text())
    install(folder, glm_ocr="stranger_glm")
    return folder


@pytest.fixture(scope="module")
def run(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`run("-c", code)`: Python with the package installed; what it prints."""
    home = tmp_path_factory.mktemp("home")

    def python(*arguments: object, on_path: Path = package, given: str = "") -> str:
        env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        env |= {
            "PYTHONPATH": f"{on_path}:{STAND_IN}:{HERE.parents[1]}",
            "LMMS_EVAL_DATASETS_CACHE": str(home / "datasets"),
        }
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, cwd=home, timeout=600, check=False, input=given
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return python


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GQA, M-RoPE; random weights."""
    return makers.glm("GlmOcr", tmp_path_factory.mktemp("checkpoint"))


def test_a_family_is_short() -> None:
    assert len(FILE.read_text().splitlines()) < 60


COMMANDS = """
import sys
from sparsemm_lmms.cli import app
for line in sys.stdin.read().splitlines():
    sys.argv = ["sparsemm-lmms", *line.split()]
    app(standalone_mode=False)
"""


def test_every_command_runs_it(run: Callable[..., str], checkpoint: Path, tmp_path: Path) -> None:
    """lmms-eval with its record and card, a sweep, head scores, and the list of families."""
    scores, sweep, args = tmp_path / "scores.json", tmp_path / "sweep", f"pretrained={checkpoint},{SMALL}"
    task = "--tasks sparsemm_demo_vqa --limit 2"
    lines = (
        f"eval --model glm_ocr_snapkv --model_args {args},budget=24 {task} --output_path {tmp_path}/out",
        f"sweep --model glm_ocr --model_args {args} --methods snapkv --budgets 24 {task} --output {sweep}",
        f"chase --model glm_ocr --pretrained {checkpoint} --images 2 --mode teacher --output {scores}",
        "families --check --quick --family glm_ocr --markdown",
    )
    told = run("-c", COMMANDS, given="\n".join(lines))
    assert "| `glm_ocr` | glm_ocr |" + " not checked: no tiny model |" * 3 in told
    [file] = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(file.read_text())
    assert results["sparsemm_lmms"]["settings"]["model"] == "glm_ocr_snapkv"
    assert results["sparsemm_lmms"]["settings"]["system_prompt"] == "You are a helpful assistant."
    assert results["throughput"]["avg_kept_tokens"] == 24 < results["throughput"]["avg_prompt_tokens"]
    plan = json.loads((sweep / "sweep.json").read_text())
    assert [about["family"] for about in plan["models"].values()] == ["glm_ocr"]
    assert (sweep / "report.md").exists() and len(plan["cells"]) == 2
    assert set(json.loads(scores.read_text())) >= {f"{i}-{j}" for i in range(3) for j in range(4)}
    run("-m", "sparsemm_lmms", "card", file, "--output", tmp_path / "card.md")
    assert "| snapkv |" in (tmp_path / "card.md").read_text()


def test_vlmevalkit_names_it(run: Callable[..., str]) -> None:
    code = (
        "import json; from functools import partial; from vlmeval import vlm; from vlmeval.config import supported_VLM;"
        "path = 'zai-org/GLM-OCR';"
        "supported_VLM['GLM-OCR'] = partial(vlm.Qwen2VLChat, model_path=path);"
        "from sparsemm_lmms.model_wrappers.vlmevalkit.model import register;"
        "name = 'GLM-OCR-1B_snapkv_b96_maxp2007040'; added = register([name]); entry = supported_VLM[name];"
        "print(json.dumps([added, entry.func.__name__, entry.keywords]))"
    )
    added, cls, keywords = json.loads(run("-c", code).splitlines()[-1])
    assert "GLM-OCR-1B_sparsemm_b64" in added
    assert not any(name.startswith("GLM-OCR-9B") for name in added)  # that VLMEvalKit does not know the checkpoint
    wanted = {"method": "snapkv", "budget": 96, "max_pixels": 2007040, "pretrained": "zai-org/GLM-OCR"}
    assert (cls, keywords) == ("CompressedGlmOcr", wanted)


def test_a_package_can_import_the_registry_first(run: Callable[..., str]) -> None:
    told = run("-c", "import stranger_glm; from sparsemm_lmms.families import FAMILIES; print(list(FAMILIES))")
    assert "'glm_ocr']" in told and "left out" not in told


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
    (tmp_path / "stranger_glm.py").write_text(FILE.read_text())
    install(tmp_path, a_broken_one=entry, glm_ocr="stranger_glm")
    start = "from sparsemm_lmms.model_wrappers.lmms_eval.manifest import manifests;"
    told = run("-c", f"import sys; {start} print(len(manifests()), 'torch' in sys.modules)", on_path=tmp_path)
    assert f"{len(manifests()) // (len(FAMILIES) + 1) * (len(FAMILIES) + 2)} False" in told
    assert told.count("is left out") == 1 and f"Model family 'a_broken_one' ({entry}) is left out: {sentence}" in told
