"""One decode step, captured once as a CUDA graph and replayed; elsewhere the same step is simply called.

What a graph bakes in must not change between its replays. So a step keeps its state in tensors at fixed addresses (the
ragged cache and the buffers of `decode.DecodeLoop`), and everything Python counts is corrected after each replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from loguru import logger
from torch import Tensor
from transformers import PreTrainedModel

from sparsemm_lmms.cache import RaggedCache
from sparsemm_lmms.config import CUDA_GRAPHS
from sparsemm_lmms.kernels import resolve_backend


def check_mode(cuda_graph: str, device: torch.device) -> None:
    """Refuse a `cuda_graph` that is unknown or that this device cannot have.

    Raises:
        ValueError: one sentence.
    """
    if cuda_graph not in CUDA_GRAPHS:
        raise ValueError(f"cuda_graph={cuda_graph!r} is unknown; use auto, on or off.")
    if cuda_graph == "on" and device.type != "cuda":
        raise ValueError(f"cuda_graph=on needs a CUDA device, but the model is on {device}; use cuda_graph=auto.")


@functools.cache
def say_once(message: str) -> None:
    """Log a message the first time it comes up."""
    logger.info(message)


def uncapturable(model: PreTrainedModel, cache: RaggedCache) -> str | None:
    """Why a decode step of this model cannot be captured, as far as it can be known beforehand; None: try it."""
    if len(set((getattr(model, "hf_device_map", None) or {"": 0}).values())) > 1:
        return "the model is spread over several devices"
    backend = cache.method.config.kernel_backend
    if resolve_backend(backend, cache.full_layers[0].keys) != "triton":
        return f"kernel_backend={backend} runs the torch kernels here, which wait for the device"
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            # transformers' hooks collect outputs that nobody asked for here; ours notes that no new token is padding
            if (getattr(hook, "__module__", None) or "").split(".")[0] not in ("transformers", "sparsemm_lmms"):
                return f"module {name or type(model).__name__} has forward hooks, which a replay would skip"
    return None


class Graph(Protocol):
    """Something that can record the device work of a function without doing it, and do it later."""

    def capture(self, step: Callable[[], Any]) -> None: ...

    def replay(self) -> None: ...


class CudaGraph:
    """`torch.cuda.CUDAGraph` with its own memory pool, which goes when it is captured anew or dropped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, step: Callable[[], Any]) -> None:
        self.graph = None
        graph = torch.cuda.CUDAGraph()
        # thread_local: CUDA calls of other threads (a data loader that pins memory) do not break the capture
        with torch.cuda.device(self.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
        self.graph = graph

    def replay(self) -> None:
        assert self.graph is not None  # Replay captures before it replays
        self.graph.replay()


class Replay:
    """Calls a decode step again and again: as it is when `graph` is None, else replayed.

    The first call runs the step itself: it compiles kernels and is a real step, so nothing has to be undone. The second
    call captures and replays, and every later one replays.

    Args:
        step: appends one token to every sequence of `cache`; all its other state lies in tensors that it updates in
            place.
        must: raise when the step cannot be captured; else say so once and go on without a graph.
    """

    def __init__(self, step: Callable[[], Any], cache: RaggedCache, graph: Graph | None, must: bool = False) -> None:
        self.step, self.cache, self.graph, self.must = step, cache, graph, must
        self.warm = False
        self.columns: Tensor | None = None  # kept alive for the graph
        self.known: list[Tensor] | None = None  # kept alive, and what the graph may find; None: nothing captured

    def __call__(self) -> None:
        if self.graph is not None and self.warm and self.known is None:
            self._capture(self.graph)
        if self.graph is None or self.known is None:
            self.step()
            self.warm = True
            return
        if self._moved():
            raise RuntimeError("The KV cache moved under a captured decode step; this is a bug, use cuda_graph=off.")
        self.graph.replay()
        self.cache.count(1)

    def look_again(self) -> None:
        """The cache may have moved: if it has, capture anew at the next call."""
        if self._moved():
            self.known = None

    def _moved(self) -> bool:
        known = self.known or []
        return bool(known) and any(a is not b for a, b in zip(known, self.cache.static_tensors(), strict=True))

    def _capture(self, graph: Graph) -> None:
        counted, device = self.cache.counted, self.cache.full_layers[0].keys.device
        self.columns = self.cache.columns = torch.tensor(self.cache.seen - 1, device=device)  # a step adds 1 first
        try:
            graph.capture(self.step)
            self.known = self.cache.static_tensors()
        except RuntimeError as error:
            if self.must:
                raise RuntimeError(f"cuda_graph=on, but the decode step cannot be captured: {error}") from error
            self.graph = None
            say_once(f"Decoding without a CUDA graph: the step cannot be captured ({str(error).splitlines()[0]}).")
        finally:  # Python ran through the step, the device did not
            self.cache.counted, self.cache.columns = counted, None
