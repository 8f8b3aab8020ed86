"""The commands of docs/offline.md, and the folders that they expect."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .wrappers import tiny

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "offline.md"
CHECKPOINT = "checkpoints/Qwen2-VL-7B-Instruct"


def blocks(needs: str | None) -> list[str]:
    """The shell blocks of the page that are marked with this need, or with none."""
    found = re.findall(r"(?:<!-- needs (?:a )?(\w+) -->\n)?```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [block for need, block in found if need == (needs or "")]


def run(commands: Sequence[str], folder: Path, *paths: Path) -> None:
    """Run the blocks in one shell in `folder`, where Hugging Face has no address.

    Args:
        paths: searched for modules first.
    """
    code = "import sys; from sparsemm_lmms.cli import main; sys.argv[0] = 'sparsemm-lmms'; main()"
    function = f'sparsemm-lmms() {{ "{sys.executable}" -c "{code}" "$@"; }}'
    search = [*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")]
    told = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "LMMS_"))}
    told |= {"PYTHONPATH": os.pathsep.join(filter(None, search)), "HF_ENDPOINT": "http://127.0.0.1:9", "COLUMNS": "200"}
    script = "\n".join(["set -e", function, *commands])
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=told, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def checkpoint(folder: Path) -> None:
    tiny.qwen2_vl(folder / CHECKPOINT)
