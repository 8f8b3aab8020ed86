"""The attention and mask functions that transformers calls while a model is compressed.

They are registered under names of their own (`ragged_kv_<prefill implementation>`); no class of transformers is
patched. Here, and only here, a layer's post-RoPE queries, keys and values meet, for every architecture.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import TransformersKwargs

from sparsemm_lmms.handoff import handed
from sparsemm_lmms.sliding import SlidingWindow

PREFIX = "ragged_kv_"
OUTPUT_NAMES = ("o_proj", "out_proj", "dense", "wo")  # of an attention module's output projection
# What attention modules are handed or hand on without it bearing on the attention of a decoder.
HARMLESS = frozenset(TransformersKwargs.__optional_keys__) | {
    "assistant_model", "assistant_tokenizer", "cache_position", "dropout", "image_sizes", "labels", "logits_to_keep",
    "mm_token_type_ids", "return_dict", "token_type_ids", "tokenizer", "use_cache",
}  # fmt: skip


def register(prefill: str) -> str:
    """Register our functions on top of the stock implementation `prefill` and return their name.

    Raises:
        ValueError: if transformers has no such implementation or it makes no masks.
    """
    known = sorted(set(ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()) - {"flex_attention"})
    known = [name for name in known if not name.startswith(PREFIX)]
    if prefill not in known:
        raise ValueError(f"attn_implementation={prefill!r} cannot run the prefill; known: {', '.join(known)}.")
    name = PREFIX + prefill.replace("flash_attention_", "fa")
    stock = ALL_MASK_ATTENTION_FUNCTIONS[prefill]
    AttentionInterface.register(name, partial(ragged_attention, prefill))
    AttentionMaskInterface.register(name, partial(ragged_mask, stock))
    return name


def ragged_mask(prefill_mask: Callable[..., Tensor | None], *args: Any, **kwargs: Any) -> Tensor | None:
    """The stock mask for a prompt; none afterwards: segments hold what may be attended to, windows make their own."""
    if kwargs["kv_length"] > kwargs["q_length"]:
        return None
    return prefill_mask(*args, **kwargs)


def ragged_attention(
    prefill: str,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Prefill: stock attention over the full prompt, then compression. Later: append and attend to the segments.

    A layer with a sliding window or chunks has stock attention, and from one decode step to the next the kernel of the
    segments. One that reads the keys of another attends to what that one keeps, and neither compresses nor appends.

    Args:
        query: `[batch, q_heads, t, head_dim]`; key, value: `[batch, kv_heads, t, head_dim]`, post-RoPE.
        softcap: bound of the logits; s_aux: attention sinks `[q_heads]` (see `kernels.ragged_decode`).

    Returns:
        Output `[batch, t, q_heads, head_dim]`, and None for the attention weights.

    Raises:
        ValueError: for an argument that a decode step does not know, or that the stock prefill does not heed.
    """
    handoff = handed(key)
    if handoff is None:
        raise RuntimeError(
            "This model is under sparsemm_lmms.compress, but the forward pass carries no RaggedCache; call the model "
            "or generate with use_cache=True."
        )
    layer, owner = handoff.source, handoff.readers == 1
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
    if layer is None:
        stock = _prefill_function(prefill, module)
        return stock(module, query, key, value, attention_mask, scaling=scale, **given, **kwargs)[0], None
    if isinstance(layer, SlidingWindow) and query.shape[2] > 1:
        stock = _prefill_function(prefill, module)
        mask = layer.mask_for(prefill, query.dtype)
        return stock(module, query, key, value, mask, scaling=scale, **given, **kwargs)[0], None
    kwargs = {name: x for name, x in kwargs.items() if name != "sliding_window" or not isinstance(layer, SlidingWindow)}
    if kwargs.get("sliding_window") is not None:
        raise ValueError("Sliding-window attention layers cannot be compressed; use a model with full attention.")
    for name, x in kwargs.items():  # decode steps would pass over it and give other logits
        if x is not None and (name not in HARMLESS or (name == "is_causal" and not x)):
            told = "is_causal=False" if name == "is_causal" else name
            raise ValueError(f"{type(module).__name__} uses {told}, which compressed decode steps do not know.")
    if s_aux is None and getattr(module, "sinks", None) is not None:
        raise ValueError(f"{type(module).__name__} has sinks, but does not pass them on: it cannot be compressed.")
    sinks = None if s_aux is None else s_aux.detach()
    if isinstance(layer, SlidingWindow):
        return layer.attend(*_as_data(query, key, value), scale, softcap, sinks).transpose(1, 2), None
    if not layer.at_prompt:
        data = _as_data(query, key, value)
        if owner:
            weight = _output_weight(module) if layer.step.compress else None
            output = layer.extend(*data, scale, layer.step, softcap, sinks, weight)
        else:
            output = layer.attend(data[0], scale, layer.step, softcap, sinks)
        output = output.transpose(1, 2)
    else:
        stock = _prefill_function(prefill, module)
        for name in given:
            if not _heeds(stock, prefill, name):
                mend = "it cannot be compressed" if prefill == "eager" else "load it with attn_implementation='eager'"
                raise ValueError(
                    f"{type(module).__name__} uses {name}, which attn_implementation={prefill!r} passes over: {mend}."
                )
        output = stock(module, query, key, value, attention_mask, scaling=scale, **given, **kwargs)[0]
        if owner:
            layer.fill(*_as_data(query, key, value), scale, layer.step, softcap, sinks, _output_weight(module))
    if owner and layer.masked is not None:
        output = output.masked_fill(layer.masked[:, None], 0)
    return output, None


def _as_data(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three as they are stored and read: no part of autograd's graph, of one dtype (under autocast they differ)."""
    if torch.is_grad_enabled():
        query, key, value = query.detach(), key.detach(), value.detach()
    return query.to(value.dtype), key.to(value.dtype), value


def _output_weight(module: torch.nn.Module) -> Tensor | None:
    """Weight `[hidden, q_heads * head_dim]` of the layer's output projection, None where it has no plain one."""
    projections = [getattr(module, name) for name in OUTPUT_NAMES if hasattr(module, name)]
    weight = getattr(projections[0], "weight", None) if projections else None
    return weight.detach() if isinstance(weight, Tensor) and weight.ndim == 2 and weight.is_floating_point() else None


def _prefill_function(prefill: str, module: torch.nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    if prefill == "eager":  # not in the registry: each modelling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[prefill]


def _heeds(stock: Callable[..., tuple[Tensor, Any]], prefill: str, name: str) -> bool:
    """Whether a stock attention function computes with the argument `name` (any of them takes it)."""
    if name == "s_aux" and prefill == "eager" and "sinks" in inspect.unwrap(stock).__code__.co_names:
        return True  # eager functions read the sinks from the module
    if name == "s_aux" and prefill == "flash_attention_2":
        return False  # the function is that of all versions, but the kernel of version 2 knows no sinks
    return name in inspect.signature(stock).parameters
