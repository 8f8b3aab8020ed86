"""Decode steps on a CPU: what its caches and its cost of a call ask for, behind `decode_plan`."""

from sparsemm_lmms.cpu_kernels.plan import decode_plan

__all__ = ["decode_plan"]
