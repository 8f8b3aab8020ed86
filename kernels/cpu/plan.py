"""One plan a store: how its decode steps are computed, chosen once and not at every step.

A caller makes the plan when it lays out a store and hands it to each `append` and `ragged_decode`. Triton has no use
for it; where triton does not run, the plan computes: on a CPU by one of the ways in `decode`, elsewhere by the plain
references.
"""

from __future__ import annotations

import torch

from sparsemm_lmms.cpu_kernels.append import append
from sparsemm_lmms.cpu_kernels.decode import decode, uniform_stride, whole_store, whole_store_places
from sparsemm_lmms.kernels import DecodePlan, ReferencePlan


def decode_plan(start: torch.Tensor, capacity: torch.Tensor, slots: int, q_heads: int, head_dim: int) -> DecodePlan:
    """The plan of a store whose layout is fixed, for the device that `start` is on.

    Args:
        start, capacity: int32 `[batch, kv_heads]`, rows; segments must not overlap. Read here only: no later change.
        slots, head_dim: shape of the store's keys and values.
        q_heads: query heads, a multiple of kv_heads.

    >>> start, capacity = (torch.tensor([x], dtype=torch.int32) for x in ([0, 3], [3, 5]))
    >>> [x.shape for x in decode_plan(start, capacity, slots=8, q_heads=4, head_dim=2).new_store(torch.float32)]
    [torch.Size([8, 2]), torch.Size([8, 2])]
    """
    if start.device.type != "cpu":
        return ReferencePlan(slots, head_dim, start.device)
    return CpuPlan(start, capacity, slots, q_heads, head_dim)


class CpuPlan(ReferencePlan):
    """Even segments are read in place, a small store as a whole; else segments are gathered (see `decode`)."""

    append = staticmethod(append)

    def __init__(self, start: torch.Tensor, capacity: torch.Tensor, slots: int, q_heads: int, head_dim: int) -> None:
        super().__init__(slots, head_dim, start.device)
        self.stride = uniform_stride(start, capacity)
        self.places = whole_store_places(start, capacity, slots, q_heads, head_dim) if self.stride is None else None

    def new_store(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values `[slots, head_dim]`; zeros, as all rows must be finite where the whole store is read."""
        keys, values = super().new_store(dtype)
        return (keys, values) if self.places is None else (keys.zero_(), values.zero_())

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
        """See `ragged_decode`; `max_length` is not used, since a CPU reads the lengths at no cost."""
        if self.places is not None and query.shape[2] == 1 and new_count is None:
            return whole_store(query, keys, values, self.places, length, scaling, softcap, sinks)
        return decode(query, keys, values, start, length, scaling, new_count, self.stride, softcap, sinks)
