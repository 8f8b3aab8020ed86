"""The plain decode plan: the torch references wherever triton does not run."""

from __future__ import annotations

import torch

from sparsemm_lmms.kernels.append import append_torch
from sparsemm_lmms.kernels.ragged_decode import ragged_decode_torch


class ReferencePlan:
    """A `DecodePlan` of any store on any device.

    Args:
        slots, head_dim, device: of the store.
    """

    append = staticmethod(append_torch)
    decode = staticmethod(ragged_decode_torch)

    def __init__(self, slots: int, head_dim: int, device: torch.device) -> None:
        self.slots, self.head_dim, self.device = slots, head_dim, device
        self.checked = False

    def new_store(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[slots, head_dim]`, not initialised."""
        shape = self.slots, self.head_dim
        return torch.empty(shape, dtype=dtype, device=self.device), torch.empty(shape, dtype=dtype, device=self.device)
