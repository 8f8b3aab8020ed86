"""On a machine without CUDA the triton kernels run in triton's interpreter (see `tests/conftest.py`).

If something imported triton before, the tests that need the interpreter skip here and `test_interpreter.py` runs them
in a process of their own.
"""

import pytest
import torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is False"))


@pytest.fixture
def interpreter():
    """Skips where kernels would not run in the interpreter; bfloat16 must not be tested with it (dots are wrong)."""
    pytest.importorskip("triton", reason="triton is not installed")
    from sparsemm_lmms.kernels.backend import interpreted

    if not interpreted():
        pytest.skip("triton was imported without TRITON_INTERPRET=1: test_interpreter.py runs this in its own process")
