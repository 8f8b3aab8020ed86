import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparsemm_lmms.kernels.backend import interpreted

HERE = Path(__file__).resolve().parent


def test_kernels_in_a_process_of_their_own():
    """Other tests may have imported triton before this folder could choose its interpreter; then run it here."""
    pytest.importorskip("triton", reason="triton is not installed")
    if interpreted():
        pytest.skip("this process runs the interpreter itself")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "interpreter",
        "-m",
        "not gpu",
    ]
    files = [str(path) for path in sorted(HERE.glob("test_*.py")) if path.name != "test_interpreter.py"]
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *files], capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 30 and "skipped" not in done.stdout.splitlines()[-1], done.stdout[-500:]
