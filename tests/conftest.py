"""Settings that must stand before the first import of torch, triton or transformers."""

import importlib.util
import os
from importlib.metadata import version

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads only spin against each other, tenfold slower

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton picks its interpreter when it is first imported


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("triton") is None:
        return
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton < (3, 7) and numpy >= (2, 4):
        reason = "triton 3.6's interpreter fails on numpy 2.4 and later; pip install 'numpy<2.4' to run this"
        for item in items:
            if "interpreter" in item.nodeid or "interpreter" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason=reason))
