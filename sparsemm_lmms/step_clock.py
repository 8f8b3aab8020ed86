"""The clock for time to first token and time per token, as a stopping criterion that stops nothing."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StepClock(StoppingCriteria):
    """Takes the time at the first and the last generated token; never stops anything.

    On CUDA it waits for the device twice in all, at the first token and at the end, so decoding is not slowed.
    """

    only_looks_on = True  # the decode loop may check the end late and take steps back

    def __init__(self, device: torch.device) -> None:
        self.device, self.steps = device, 0
        self.first: float | None = None
        self.last = 0.0
        self.never: Tensor | None = None
        self._wait()
        self.start = time.perf_counter()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.first is None:
            self._wait()
            self.first = time.perf_counter()
        self.steps += 1
        if self.never is None:  # once: a decode step allocates nothing
            self.never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self.never

    def stop(self) -> None:
        """Call when `generate` has returned."""
        self._wait()
        self.last = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds from the call of `generate` to its end."""
        return self.last - self.start

    @property
    def ttft(self) -> float:
        """Seconds to the first token: vision tower, prefill and compression."""
        return (self.last if self.first is None else self.first) - self.start

    @property
    def tpot(self) -> float | None:
        """Mean seconds of a decode step (one token for every sequence of the batch), None if there was none."""
        if self.first is None or self.steps < 2:
            return None
        return (self.last - self.first) / (self.steps - 1)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
