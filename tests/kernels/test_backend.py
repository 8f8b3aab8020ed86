import os
import subprocess
import sys

import pytest
import torch

from sparsemm_lmms.kernels import backend, resolve_backend


def python(code, **environment):
    """Runs `code` in a fresh interpreter; returns what it printed."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_auto_is_torch_on_the_cpu():
    assert resolve_backend("auto", torch.zeros(1)) == "torch"


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu():
    assert resolve_backend("auto", torch.zeros(1, device="cuda")) == "triton"
    assert resolve_backend("torch", torch.zeros(1, device="cuda")) == "torch"


def test_unknown_backend():
    with pytest.raises(ValueError, match="auto, triton, torch; got 'cuda'"):
        resolve_backend("cuda", torch.zeros(1))


def test_triton_on_cpu_tensors_is_an_error_without_the_interpreter():
    code = """
import torch
from sparsemm_lmms.kernels import resolve_backend
try:
    resolve_backend("triton", torch.zeros(1))
except ValueError as error:
    print(error)
"""
    assert "needs CUDA tensors, got cpu" in python(code)
    pytest.importorskip("triton", reason="triton is not installed")
    assert python(code, TRITON_INTERPRET="1") == ""


def test_everything_runs_without_triton():
    code = """
import sys
sys.modules["triton"] = None  # what a failed import leaves behind
import torch
from sparsemm_lmms.kernels import append, evict, ragged_decode, resolve_backend, window_score
store = torch.zeros(6, 4), torch.zeros(6, 4)
zero, one, six = (torch.tensor([[x]], dtype=torch.int32) for x in (0, 1, 6))
key = torch.randn(1, 1, 3, 4)
print(window_score(key[:, :, -1:], key, scaling=0.5).shape)
evict(key, key, torch.tensor([[[2]]], dtype=torch.int32), one, zero, *store)
length, overflow = one.clone(), torch.zeros(1, dtype=torch.int32)
append(*store, zero, length, six, key, key, overflow)
print(length.item(), overflow.item(), ragged_decode(key, *store, zero, length, scaling=0.5).shape)
try:
    resolve_backend("triton", key)
except ValueError as error:
    print(error)
"""
    lines = python(code).splitlines()
    assert lines[0] == "torch.Size([1, 1, 2])"
    assert lines[1] == "4 0 torch.Size([1, 1, 3, 4])"
    assert "triton is not installed" in lines[2]


def test_import_is_light():
    code = "import sys, sparsemm_lmms.kernels; print({'transformers', 'lmms_eval', 'datasets'} & set(sys.modules))"
    assert python(code) == "set()"


@pytest.mark.parametrize("head_dim, block", [(8, 64), (64, 64), (65, 128), (80, 128), (128, 128), (129, 256)])
def test_block_head_dim(head_dim, block):
    assert backend.block_head_dim(head_dim) == block


def test_bits_share_memory():
    x = torch.zeros(2, 8, dtype=torch.bfloat16)[:, 2:6]
    backend.bits(x)[0, 0] = 0x3F80
    assert x[0, 0] == 1.0 and backend.bits(x).stride() == x.stride()
