"""One generation of one method on a preset, from a fresh state, with what it took and what its cache held."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.cache_utils import DynamicLayer, StaticLayer

from sparsemm_lmms import decode
from sparsemm_lmms.bench.tensor_log import TensorLog
from sparsemm_lmms.cache import CACHE_NAME, RaggedCache, RaggedLayer
from sparsemm_lmms.config import CompressionConfig
from sparsemm_lmms.head_scores import HeadScores
from sparsemm_lmms.methods import METHODS
from sparsemm_lmms.session import CompressionSession, compress, model_shape
from sparsemm_lmms.settings import unknown_name
from sparsemm_lmms.step_clock import StepClock

STOCK = ("stock", "stock-static")
EAGER = "-eager"


@dataclass(frozen=True)
class Variant:
    """A way to generate: a method of ours, or transformers alone.

    `stock` is transformers with a dynamic cache and sdpa, `stock-static` its static cache with torch.compile,
    `<method>` ours (on a GPU as a CUDA graph), `<method>-eager` ours in transformers' loop.
    """

    name: str

    def __post_init__(self) -> None:
        if self.method is None and self.name not in STOCK or self.method is not None and self.method not in METHODS:
            known = [*STOCK, *METHODS, *(method + EAGER for method in METHODS)]
            raise ValueError(unknown_name("method", self.name, known))

    @property
    def method(self) -> str | None:
        return None if self.name in STOCK else self.name.removesuffix(EAGER)

    @property
    def graph(self) -> str:
        return "off" if self.name.endswith(EAGER) else "auto"


@dataclass(frozen=True)
class Run:
    """Seconds, bytes and tokens of one generation.

    Attributes:
        ttft: to the first token; tpot: of a decode step, None with one new token.
        kv_allocated, kv_used, kv_ideal: bytes of the cache, those that hold tokens, and those that must: what was kept
            and the new tokens.
        peak: bytes that the GPU held at most, None on a CPU.
    """

    ttft: float
    tpot: float | None
    kv_allocated: int
    kv_used: int
    kv_ideal: int
    peak: int | None
    tokens: Tensor


def head_scores(model: Any, seed: int = 0) -> HeadScores:
    """Scores as uneven as measured ones: a few heads have most of the score (Zipf, exponent 1, shuffled)."""
    shape = model_shape(model)
    count = shape.num_layers * shape.q_heads
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()
    return HeadScores((1.0 / (order + 1)).reshape(shape.num_layers, shape.q_heads))


@contextmanager
def switched_on(model: Any, variant: Variant, budget: int) -> Iterator[CompressionSession | None]:
    """The model under the compression of a variant; stock transformers afterwards."""
    if variant.method is None:
        yield None
        return
    config = CompressionConfig(method=variant.method, budget=budget)
    scores = head_scores(model) if METHODS[variant.method].needs_head_scores else None
    with compress(model, config, scores) as session:
        yield session


def generate(
    model: Any, inputs: dict[str, Tensor], variant: Variant, budget: int, new_tokens: int, compiled: bool = False
) -> Run:
    """Generate exactly `new_tokens`, greedily, on a fresh cache.

    Args:
        compiled: `stock-static` compiles its decode step (always on CUDA, where transformers does so itself).
    """
    device = model.device
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with switched_on(model, variant, budget) as session:
        given: dict[str, Any] = {}
        if session is not None:
            given[CACHE_NAME] = session.new_cache(new_tokens)
        elif variant.name == "stock-static":
            given = {"cache_implementation": "static", "disable_compile": device.type != "cuda" and not compiled}
        common = dict(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        make: Any = model.generate if session is None else decode.generate
        more: dict[str, Any] = {} if session is None else {"model": model, "cuda_graph": variant.graph}
        clock = StepClock(device)
        out = make(**more, **inputs, **common, **given, stopping_criteria=StoppingCriteriaList([clock]))
        clock.stop()
    kv = kv_bytes(out[CACHE_NAME], inputs["input_ids"].shape[1], new_tokens)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Run(clock.ttft, clock.tpot, *kv, peak, out.sequences[:, inputs["input_ids"].shape[1] :].cpu())


def kv_bytes(cache: Any, prompt: int, new_tokens: int) -> tuple[int, int, int]:
    """Bytes allocated, used, and needed for what was kept with all new tokens; the last one is never fed back.

    Layers with a window or a state hold what they hold; the others grow with the tokens.
    """
    if isinstance(cache, RaggedCache):
        report, layers = cache.report(), cache.full_layers
        row = 2 * layers[0].keys.shape[1] * layers[0].keys.element_size()
        kept = sum(int(layer.kept.sum()) + new_tokens * layer.kept.size for layer in layers)
        used = report["kv_bytes_used"]
        return report["kv_bytes_allocated"], used, used + row * (kept - sum(int(x.length.sum()) for x in layers))
    bytes_of: dict[Any, int] = {layer: sum(x.nbytes for x in _tensors(layer)) for layer in cache.layers}
    kinds = (DynamicLayer, StaticLayer)
    growing: list[Any] = [layer for layer in cache.layers if isinstance(layer, kinds) and not layer.is_sliding]
    full, allocated = sum(bytes_of[layer] for layer in growing), sum(bytes_of.values())
    row = full // growing[0].keys.shape[-2]
    others = allocated - full
    return allocated, others + row * (prompt + new_tokens - 1), others + row * (prompt + new_tokens)


def _tensors(layer: Any) -> list[Tensor]:
    """Keys, values and states of a layer of transformers' caches."""
    states = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    held = [
        getattr(layer, "keys", None),
        getattr(layer, "values", None),
        *(x for state in states for x in state.values()),
    ]
    return [x for x in held if isinstance(x, Tensor)]


def compression_seconds(model: Any, inputs: dict[str, Tensor], variant: Variant, budget: int) -> float:
    """Seconds that the prefill of a prompt spends in choosing and copying what is kept, over all layers."""
    spent: list[Any] = []
    fill = RaggedLayer.fill
    on_gpu = model.device.type == "cuda"

    def timed(self: RaggedLayer, *args: Any) -> None:
        if on_gpu:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            fill(self, *args)
            end.record()
            spent.append((begin, end))
            return
        clock = StepClock(model.device)
        fill(self, *args)
        clock.stop()
        spent.append(clock.elapsed)

    RaggedLayer.fill = timed  # type: ignore[method-assign,assignment]
    try:
        generate(model, inputs, variant, budget, 1)
    finally:
        RaggedLayer.fill = fill  # type: ignore[method-assign]
    return sum(begin.elapsed_time(end) / 1e3 for begin, end in spent) if on_gpu else sum(spent)


def prefill_peak(model: Any, inputs: dict[str, Tensor], variant: Variant, budget: int) -> int:
    """Bytes at the peak of a prefill: the weights and what was made at most at a time; any device, a run of its own."""
    weights = sum(x.numel() * x.element_size() for x in model.parameters())
    log = TensorLog()
    with log if model.device.type != "cuda" else nullcontext():
        run = generate(model, inputs, variant, budget, 1)
    return weights + log.peak if run.peak is None else run.peak
