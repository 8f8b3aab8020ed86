"""What a run measured, in the form that lmms-eval writes into its results (`throughput.avg_<key>`)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

import torch
from lmms_eval.api.instance import TokenCounts

from .engine import Answer, Batch


@dataclass
class CacheTokenCounts(TokenCounts):
    """Token counts of one answer with its tokens kept: `--log_samples` writes them for every sample."""

    kept_tokens: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "kept_tokens": self.kept_tokens}

    @classmethod
    def of(cls, answer: Answer) -> CacheTokenCounts:
        return cls(answer.prompt_tokens, answer.output_tokens, None, round(answer.kept_tokens, 4))


@dataclass
class RunStatistics:
    """Collects batches; copies that the host adds to pad a rank (`__padding_only__`) are left out.

    Numbers are means over requests; bytes are shares of the batch's cache. They describe this process: lmms-eval
    records those of rank 0.
    """

    device: torch.device
    answers: list[Answer] = field(default_factory=list)
    rows: list[dict[str, float | None]] = field(default_factory=list)
    elapsed: float = 0.0

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def add(self, batch: Batch, counted: Sequence[bool]) -> None:
        """Add one batch; `counted[i]` says whether answer i is a real request."""
        if not any(counted):
            return
        self.elapsed += batch.elapsed
        share = 1 / len(batch.answers)
        for answer, real in zip(batch.answers, counted, strict=True):
            if not real:
                continue
            self.answers.append(answer)
            self.rows.append(
                {
                    "ttft_ms": 1000 * batch.ttft,
                    "tpot_ms": None if batch.tpot is None else 1000 * batch.tpot,
                    "kept_tokens": answer.kept_tokens,
                    "prompt_tokens": answer.prompt_tokens,
                    "nominal_budget": batch.nominal_budget,
                    "kv_bytes": batch.kv_bytes * share,
                    "kv_bytes_used": batch.kv_bytes_used * share,
                    "kv_bytes_full": batch.kv_bytes_full * share,
                }
            )

    @property
    def output_tokens(self) -> int:
        return sum(answer.output_tokens for answer in self.answers)

    def metrics(self) -> dict[str, float]:
        """Means of all that was measured, medians of the times (the first batch pays for warming up)."""
        means: dict[str, float] = {"num_requests": len(self.answers)}
        for name in self.rows[0] if self.rows else ():
            values = [value for row in self.rows if (value := row[name]) is not None]
            if values:
                means[name] = fmean(values)
                if name.endswith("_ms"):
                    means[f"{name}_median"] = median(values)
        means["peak_memory"] = peak_memory(self.device)
        return means


def peak_memory(device: torch.device) -> int:
    """Most bytes that torch held on the GPU since the run began; on the CPU, the peak of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux, bytes on macOS


def numeric_settings(settings: dict[str, Any]) -> dict[str, float]:
    """The numbers and switches among the settings as `config_<name>`: the results JSON takes numbers only.

    >>> numeric_settings({"budget": 64, "normalize": True, "pooling": "avgpool"})
    {'config_budget': 64.0, 'config_normalize': 1.0}
    """
    return {f"config_{name}": float(value) for name, value in settings.items() if isinstance(value, (int, float))}
