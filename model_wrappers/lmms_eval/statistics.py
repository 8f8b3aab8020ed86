"""What a run measured, in the form that lmms-eval writes into its results (`throughput.avg_<key>`)."""

from __future__ import annotations

import resource
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lmms_eval.api.instance import TokenCounts
from lmms_eval.models.model_utils.gen_metrics import log_metrics

from sparsemm_lmms.model_wrappers.engine import Answer, Batch

T = TypeVar("T")


@dataclass
class CacheTokenCounts(TokenCounts):
    """Token counts of one answer with what its cache held: `--log_samples` writes them for every sample.

    Bytes are the answer's share of its batch; times are those of its batch.
    """

    kept_tokens: float | None = None
    kv_bytes: float | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        own = ("kept_tokens", "kv_bytes", "ttft_ms", "tpot_ms")
        return {**super().to_dict(), **{name: getattr(self, name) for name in own}}

    @classmethod
    def of(cls, answer: Answer, batch: Batch | None = None) -> CacheTokenCounts:
        counts = cls(answer.prompt_tokens, answer.output_tokens, None, round(answer.kept_tokens, 4))
        if batch is not None:
            counts.kv_bytes = round(batch.kv_bytes / len(batch.answers), 1)
            counts.ttft_ms = round(1000 * batch.ttft, 3)
            counts.tpot_ms = None if batch.tpot is None else round(1000 * batch.tpot, 3)
        return counts


@dataclass
class RunStatistics:
    """Collects batches; copies that the host adds to pad a rank (`__padding_only__`) are left out.

    Numbers are means over requests; bytes are shares of the batch's cache. One object describes one call in one
    process; `merged` and `gathered` put them together.

    Attributes:
        device: of this process.
        rows: numbers of each request.
        output_tokens: generated tokens.
        elapsed: seconds of generation.
        peak_bytes: see `peak_memory`.
        skipped_oom: requests that did not fit into memory and were left out (`skip_oom`).
    """

    device: torch.device
    rows: list[dict[str, float | None]] = field(default_factory=list)
    output_tokens: int = 0
    elapsed: float = 0.0
    peak_bytes: int = 0
    skipped_oom: int = 0

    @classmethod
    def start(cls, device: torch.device) -> RunStatistics:
        """Begin to measure on this device."""
        if device.type == "cuda":
            for index in range(torch.cuda.device_count()):  # a device map may use them all
                torch.cuda.reset_peak_memory_stats(index)
        return cls(device)

    @classmethod
    def merged(cls, device: torch.device, parts: Sequence[RunStatistics]) -> RunStatistics:
        """Calls of one process after each other: times add up."""
        return cls(
            device,
            [row for part in parts for row in part.rows],
            sum(part.output_tokens for part in parts),
            sum(part.elapsed for part in parts),
            max((part.peak_bytes for part in parts), default=0),
            sum(part.skipped_oom for part in parts),
        )

    def gathered(self) -> RunStatistics:
        """This process and all others, beside each other: the time is the slowest one's. All processes must call it."""
        parts = gather(self)
        whole = RunStatistics.merged(self.device, parts)
        whole.elapsed = max(part.elapsed for part in parts)
        return whole

    def add(self, batch: Batch, counted: Sequence[bool]) -> None:
        """Add one batch; `counted[i]` says whether answer i is a real request."""
        if not any(counted):
            return
        self.elapsed += batch.elapsed
        share = 1 / len(batch.answers)
        for answer, real in zip(batch.answers, counted, strict=True):
            if not real:
                continue
            self.output_tokens += answer.output_tokens
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
        self.peak_bytes = max(self.peak_bytes, peak_memory(self.device))

    def metrics(self) -> dict[str, float]:
        """Means of all that was measured, medians of the times (the first batch pays for warming up)."""
        means: dict[str, float] = {"num_requests": len(self.rows)}
        for name in self.rows[0] if self.rows else ():
            values = [value for row in self.rows if (value := row[name]) is not None]
            if values:
                means[name] = fmean(values)
                if name.endswith("_ms"):
                    means[f"{name}_median"] = median(values)
        if self.skipped_oom:
            means["skipped_oom"] = self.skipped_oom
        return {**means, "peak_memory": self.peak_bytes}

    def log(self) -> None:
        """Put the numbers where the host looks for the throughput of a run."""
        if self.rows or self.skipped_oom:
            speed = self.output_tokens / self.elapsed if self.elapsed > 0 else 0.0
            log_metrics(self.elapsed, self.output_tokens, speed, additional_metrics=self.metrics())


def gather(part: T) -> list[T]:
    """`part` of every process, in their order; of this one alone without `accelerate launch`."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [part]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def peak_memory(device: torch.device) -> int:
    """Most bytes that torch held on this process's GPUs since `start`; on the CPU, the peak of the whole process."""
    if device.type == "cuda":
        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # kilobytes on Linux, bytes on macOS
