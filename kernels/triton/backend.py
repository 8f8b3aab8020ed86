"""What every kernel file shares: the optional import of triton, the choice of backend, argument checks.

`triton` is optional (it has no wheels for macOS and Windows): without it `jit` returns the function unchanged, nobody
launches it, and every operation runs its torch form.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Protocol

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # the torch forms need neither
    triton = None
    tl = None

BITS = {2: torch.int16, 4: torch.int32}
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class DecodePlan(Protocol):
    """What the decode steps of one store share: made once a store and handed to each `append` and `ragged_decode`.

    `ReferencePlan` is the plain one; `sparsemm_lmms.cpu_kernels` has another for CPUs.

    Attributes:
        checked: the last `ragged_decode` was a decode step of one token, and its arguments were checked. The next
            decode step brings tensors alike, so it needs no checks.
    """

    checked: bool

    def new_store(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[slots, head_dim]` to be filled."""
        ...

    def append(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: torch.Tensor,
        length: torch.Tensor,
        capacity: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        overflow: torch.Tensor,
        new_count: torch.Tensor | None = None,
    ) -> None:
        """Does what `append_torch` does."""

    def decode(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        start: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        new_count: torch.Tensor | None = None,
        max_length: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns what `ragged_decode_torch` returns."""
        ...


def jit(**options: Any) -> Any:
    """`triton.jit(**options)`, or a decorator that changes nothing where triton is missing."""
    return triton.jit(**options) if triton is not None else lambda fn: fn


def interpreted() -> bool:
    """True when the kernels of this process run in triton's interpreter (TRITON_INTERPRET=1 before the import)."""
    return triton is not None and not isinstance(_probe, triton.runtime.JITFunction)


@jit()
def _probe() -> None:
    """Shows what `triton.jit` made of a function when this module was imported."""


@jit()
def capped(logits, softcap):
    """softcap * tanh(logits / softcap), for kernels: the interpreter has no tanh. Off by at most 1e-7 * softcap."""
    return softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)


def resolve_backend(backend: str, *tensors: torch.Tensor) -> str:
    """Turn `"auto" | "triton" | "torch"` into the backend that runs on `tensors`.

    auto = triton on CUDA tensors when triton is importable, torch elsewhere. Asking for triton where it cannot run is
    an error, never a silent fallback.

    >>> resolve_backend("auto", torch.zeros(1))
    'torch'
    """
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be one of auto, triton, torch; got {backend!r}")
    if backend == "torch":
        return "torch"
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    if backend == "auto":
        return "triton" if on_cuda and triton is not None else "torch"
    if triton is None:
        raise ValueError("backend='triton' was asked for, but triton is not installed; use 'auto' or 'torch'")
    if not on_cuda and not interpreted():
        devices = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {', '.join(devices)} (on a CPU it only runs in triton's "
            "interpreter: set TRITON_INTERPRET=1 before the first import of triton)"
        )
    return "triton"


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's (models sharded over several GPUs)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def block_head_dim(head_dim: int) -> int:
    """Width of the tiles that hold rows of `head_dim`: 64, 128, 256 ...

    head_dim itself is no constant of the kernels: 80, 96 and 128 share one compiled variant, 32 and 64 another.
    """
    return max(64, 1 << (head_dim - 1).bit_length())


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, for kernels that only move rows: one compiled variant a width, not a dtype."""
    return tensor.detach().view(BITS[tensor.element_size()])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of SMs of a CUDA device; 4 in the interpreter, enough to exercise splitting and merging."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def check_rows(name: str, tensor: torch.Tensor, ndim: int = 4) -> None:
    """A float tensor of `ndim` dimensions whose last one is contiguous."""
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in FLOAT_DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if tensor.shape[-1] == 0:
        raise ValueError(f"{name} has head_dim 0: shape {tuple(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")


def check_int32(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """A contiguous int32 tensor of exactly `shape`."""
    if tensor.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {tensor.dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def check_store(keys: torch.Tensor, values: torch.Tensor, head_dim: int, dtype: torch.dtype) -> None:
    """The two flat stores `[slots, head_dim]` of a layer: contiguous, alike, and of the given dtype."""
    for name, store in (("keys", keys), ("values", values)):
        check_rows(name, store, 2)
        if not store.is_contiguous():
            raise ValueError(f"the store {name} must be contiguous, got strides {store.stride()}")
        if store.dtype != dtype or store.shape[1] != head_dim:
            raise ValueError(
                f"the store {name} must hold rows of {head_dim} x {dtype}, got {store.shape[1]} x {store.dtype}"
            )
    if keys.shape != values.shape:
        raise ValueError(f"the stores differ in shape: {tuple(keys.shape)} and {tuple(values.shape)}")


def check_logits(softcap: float | None, sinks: torch.Tensor | None, shapes: tuple[tuple[int, ...], ...]) -> None:
    """A positive `softcap` and contiguous float `sinks` of one of the `shapes`; None leaves either out."""
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive, got {softcap}")
    if sinks is not None:
        if sinks.dtype not in FLOAT_DTYPES:
            raise ValueError(f"sinks must be float16, bfloat16 or float32, got {sinks.dtype}")
        if tuple(sinks.shape) not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"sinks must have shape {wanted}, got {tuple(sinks.shape)}")
        if not sinks.is_contiguous():
            raise ValueError(f"sinks must be contiguous, got strides {sinks.stride()}")


def check_same(names: str, first: torch.Tensor, second: torch.Tensor) -> None:
    """Two tensors alike in shape and dtype (keys and values)."""
    if first.shape != second.shape or first.dtype != second.dtype:
        raise ValueError(
            f"{names} must agree in shape and dtype, got {tuple(first.shape)} {first.dtype} "
            f"and {tuple(second.shape)} {second.dtype}"
        )


def check_device(*tensors: torch.Tensor | None) -> None:
    """All on one device (an int32 on the host would mean a synchronisation at every token)."""
    given = [tensor.device for tensor in tensors if tensor is not None]
    if any(device != given[0] for device in given):
        devices = sorted({str(device) for device in given})
        raise ValueError(f"all tensors must be on one device, got {', '.join(devices)}")
