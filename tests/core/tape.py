"""Captured decode steps on the CPU."""

from sparsemm_lmms.model_wrappers.matrix.tape import Emulated, TapeGraph, emulations

__all__ = ["Emulated", "TapeGraph", "fast_kernels"]


def fast_kernels(monkeypatch):
    for emulation in emulations():
        monkeypatch.setattr(*emulation)
