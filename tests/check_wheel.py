"""Fail unless a built wheel adds the one top-level name and carries the demo weights, tasks and data."""

from __future__ import annotations

import sys
import zipfile
from pathlib import PurePosixPath

WANTED = (
    "sparsemm_lmms/py.typed",
    "sparsemm_lmms/families/llava_next.py",
    "sparsemm_lmms/kernels/append.py",
    "sparsemm_lmms/cpu_kernels/decode.py",
    "sparsemm_lmms/model_wrappers/lmms_eval/manifest.py",
    "sparsemm_lmms/reports/paper/tables_3_4.csv",
    "sparsemm_lmms/task_overrides/sparsemm_demo_ocr.yaml",
    "sparsemm_lmms/task_overrides/sparsemm_demo_vqa.yaml",
    "sparsemm_lmms/task_overrides/sparsemm_demo_choice.yaml",
    "sparsemm_lmms/task_overrides/_sparsemm_demo_yaml",
    "sparsemm_lmms/visual_heads/commands.py",
    "sparsemm_lmms/demo/models/llava_next/model.safetensors",
    "sparsemm_lmms/demo/models/llava_next/head_scores.json",
    "sparsemm_lmms/demo/models/qwen2_vl/model.safetensors",
    "sparsemm_lmms/demo/models/qwen2_vl/head_scores.json",
    "sparsemm_lmms/demo/models/internvl/model.safetensors",
    "sparsemm_lmms/demo/models/internvl/head_scores.json",
)
MAX_DEMO_BYTES = 20_000_000


def problems(path: str) -> list[str]:
    """What is wrong with the wheel at `path`, one line each."""
    with zipfile.ZipFile(path) as wheel:
        names, sizes = wheel.namelist(), {info.filename: info.file_size for info in wheel.infolist()}
    tops = {PurePosixPath(name).parts[0] for name in names}
    tops = {top for top in tops if not top.endswith(".dist-info")}
    found = [f"unexpected top-level names: {sorted(tops)}"] if tops != {"sparsemm_lmms"} else []
    found += [f"missing: {name}" for name in WANTED if name not in names]
    if not any(name.startswith("sparsemm_lmms/task_overrides/") and name.endswith(".parquet") for name in names):
        found.append("missing: the demo tasks' parquet files")
    found += [f"must not be shipped: {name}" for name in names if "/tests/" in name or name.endswith(".pyc")]
    demo = sum(size for name, size in sizes.items() if name.startswith("sparsemm_lmms/demo/models/"))
    if demo > MAX_DEMO_BYTES:
        found.append(f"the demo models take {demo} bytes, more than {MAX_DEMO_BYTES}")
    return found


if __name__ == "__main__":
    lines = problems(sys.argv[1])
    print("\n".join(lines) or f"{sys.argv[1].rsplit('/', 1)[-1]}: one top-level name, all data inside")
    sys.exit(bool(lines))
