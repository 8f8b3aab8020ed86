"""Watch where each head looks, without attention matrices.

``watch(model)`` gives the text model an attention function of ours, registered through transformers' own
``AttentionInterface``, and takes it back in ``finally``; which watcher and layer it is in, the keys say (``handoff``).
The function returns ``sdpa``'s output untouched (that of ``eager`` where logits are soft-capped or there are sinks)
and, for the last ``rows`` query positions only, keeps per (sequence, query head) the position of the largest attention
weight and the attention mass on each word's image tokens: numbers that don't grow with the prompt.
``output_attentions=True`` would keep layers x heads x length x length of them.

The row watched for a token is the one that PREDICTS it (the query of the token before), as in the research code
(``visual_head/llava_visual_head.py``: ``outputs.attentions[...][-1]`` of the step whose logits gave the token).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparsemm_lmms.cache import CACHE_NAME, OLD_CACHE_NAME, is_full
from sparsemm_lmms.handoff import hand_on, handed

NAME = "sparsemm_chase"
# Elements of the largest temporary (chunk of rows x heads x keys, float32): 64 MiB.
CHUNK_ELEMENTS = 1 << 24


class Logits(NamedTuple):
    """How a layer makes attention logits of products: their factor, the bound of what comes of it (``softcap``), and
    the logits ``[q_heads]`` of what stands beside the keys in the softmax (attention ``sinks``)."""

    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = None


class Looks(Protocol):
    """What `watch` calls with the queries and keys of each layer of full attention."""

    def look(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits
    ) -> None: ...


Watching = TypeVar("Watching", bound=Looks)


@dataclass
class Watcher:
    """What one forward pass left behind; ``clear()`` before each.

    rows: how many of the last query positions are watched.
    words: bool ``[batch, words, prompt]``, which (padded) prompt positions belong to which word box; a pass over more
    keys than ``prompt`` (decoding, teacher forcing) treats the others as outside every word.
    targets: int64 ``[batch, rows]``, the word that each row is about to write, -1 for none; None when not known yet,
    then the mass on every word is kept (free running: the token is known only after the pass).
    argmax: per layer with full attention, numbered among those, int64 ``[batch, q_heads, rows]``, key position of the
    largest weight.
    mass: per layer likewise, float32 ``[batch, q_heads, rows]`` with targets, else ``[batch, q_heads, rows, words]``.
    """

    words: torch.Tensor
    rows: int = 1
    targets: torch.Tensor | None = None
    argmax: dict[int, torch.Tensor] = field(default_factory=dict)
    mass: dict[int, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def _members(self) -> torch.Tensor:
        """``words`` as float32 ``[batch, prompt, words]``, made once: a cast a layer and step would cost more."""
        return self.words.transpose(1, 2).float().contiguous()

    def clear(self) -> None:
        self.argmax.clear()
        self.mass.clear()

    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """``argmax`` and ``mass`` of all layers, stacked in front."""
        layers = sorted(self.argmax)
        return torch.stack([self.argmax[i] for i in layers]), torch.stack([self.mass[i] for i in layers])

    def look(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits
    ) -> None:
        """query ``[batch, q_heads, q, d]``, key ``[batch, kv_heads, k, d]`` after RoPE; mask as for sdpa."""
        batch, q_heads, q_length, _ = query.shape
        rows, k_length = min(self.rows, q_length), key.shape[2]
        key = key.float()  # bf16 products tie within 8 bits, and the argmax of a tie is noise
        if rows == 1:  # a decoding step
            weights = step_weights(query, key, mask, logits)
            self.argmax[layer], self.mass[layer] = weights.argmax(dim=-1), self._mass(weights, 0)
            return
        size = max(1, CHUNK_ELEMENTS // (batch * q_heads * k_length))
        argmax, mass = [], []
        for start in range(q_length - rows, q_length, size):
            stop = min(start + size, q_length)
            weights = rows_weights(query, key, mask, logits, start, stop)
            argmax.append(weights.argmax(dim=-1))
            mass.append(self._mass(weights, start - (q_length - rows)))
        self.argmax[layer], self.mass[layer] = torch.cat(argmax, dim=2), torch.cat(mass, dim=2)

    def _mass(self, weights: torch.Tensor, first: int) -> torch.Tensor:
        """weights ``[batch, q_heads, rows, keys]`` of a chunk that begins at watched row ``first``."""
        prompt = min(self.words.shape[-1], weights.shape[-1])
        weights = weights[..., :prompt]
        if self.targets is None:  # heads as rows of one product: a broadcast over heads would copy the words for each
            return torch.bmm(weights.flatten(1, 2), self._members[:, :prompt]).unflatten(1, weights.shape[1:3])
        words = self.words[..., :prompt]
        chosen = self.targets[:, first : first + weights.shape[2]]
        index = chosen.clamp(min=0).unsqueeze(-1).expand(-1, -1, prompt)
        return weights.masked_fill_(~words.gather(1, index).unsqueeze(1), 0.0).sum(dim=-1)


class WatchedCache(DynamicCache):
    """The stock cache, whose keys say who watches them.

    numbers: of each layer with full attention, by its index in the model: layers of other kinds are not watched.
    keeps: whether keys and values are kept for later passes.
    """

    watcher: Looks
    numbers: dict[int, int]
    keeps = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keeps:
            key_states, value_states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return hand_on(key_states, (self.watcher, self.numbers.get(layer_idx))), value_states


def _weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits) -> torch.Tensor:
    """Attention weights, float32 ``[batch, q_heads, rows, keys]``; keys are not repeated over their query heads.

    A row sums to less than 1 where a sink takes its share.
    """
    batch, q_heads, rows, dim = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, q_heads // kv_heads * rows, dim)
    table = torch.matmul(grouped * logits.scaling, key.transpose(2, 3)).view(batch, q_heads, rows, -1)
    if logits.softcap is not None:
        table = torch.tanh(table / logits.softcap) * logits.softcap
    if mask is not None:
        if mask.dtype == torch.bool:
            table = table.masked_fill_(~mask, torch.finfo(torch.float32).min)
        else:
            table = table + mask.float()
    if logits.sinks is None:
        return table.softmax(dim=-1)
    sinks = logits.sinks.float().view(1, -1, 1, 1).expand(batch, -1, rows, 1)
    return torch.cat([table, sinks], dim=-1).softmax(dim=-1)[..., :-1]


def rows_weights(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits, start: int, stop: int
) -> torch.Tensor:
    """Attention weights of the queries start..stop, float32 ``[batch, q_heads, stop - start, keys]``."""
    return _weights(query[:, :, start:stop], key, _mask_rows(mask, start, stop, query.shape[2], key), logits)


def step_weights(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, logits: Logits) -> torch.Tensor:
    """Attention weights of the last query only, float32 ``[batch, q_heads, 1, keys]``."""
    length = query.shape[2]
    return rows_weights(query, key.float(), mask, logits, length - 1, length)


def _mask_rows(
    mask: torch.Tensor | None, start: int, stop: int, q_length: int, key: torch.Tensor
) -> torch.Tensor | None:
    """Mask rows ``[batch or 1, 1, rows, keys]`` of queries start..stop; sdpa's None is causal, aligned at the end."""
    k_length = key.shape[2]
    if mask is not None:
        return mask[:, :, start:stop, :k_length]
    if q_length == 1:
        return None
    last = torch.arange(start, stop, device=key.device) + k_length - q_length
    return (torch.arange(k_length, device=key.device)[None, :] <= last[:, None])[None, None]


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """``sdpa`` plus a look at the last rows; the model's own ``eager`` attention where ``sdpa`` knows too little."""
    handoff = handed(key)
    if handoff is None:
        raise RuntimeError(f"{type(module).__name__} is being watched, but its keys come from no watched cache.")
    watcher, layer = handoff.source
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if layer is not None and handoff.readers == 1:  # not a later layer that shares these keys
        watcher.look(layer, query, key, attention_mask, Logits(scale, softcap, s_aux))
    given = {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
    if not given:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    rows = _mask_rows(attention_mask, 0, query.shape[2], query.shape[2], key)
    if rows is not None and rows.dtype == torch.bool:
        rows = torch.zeros_like(rows, dtype=query.dtype).masked_fill_(~rows, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, rows, scaling=scale, **given, **kwargs)[0], None


def full_numbers(config: Any) -> dict[int, int]:
    """Of each layer with full attention: its index in the model -> its index among them, as head scores number it."""
    full = [i for i, layer in enumerate(DynamicCache(config=config).layers) if is_full(layer)]
    return {i: number for number, i in enumerate(full)}


def _before_forward(
    watcher: Looks, numbers: dict[int, int], model: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook: every pass runs on a watched cache, which keeps nothing where the pass wants none."""
    name = OLD_CACHE_NAME if OLD_CACHE_NAME in kwargs else CACHE_NAME
    cache = kwargs.get(name)
    if cache is None:
        cache = WatchedCache(config=model.config)
        cache.keeps = kwargs.get("use_cache") is not False
    elif type(cache) is DynamicCache:
        cache.__class__ = WatchedCache  # type: ignore[assignment]  # it stays the caller's own
    if not isinstance(cache, WatchedCache):
        raise ValueError(f"{name} is a {type(cache).__name__}, whose keys cannot be watched; pass a DynamicCache.")
    cache.watcher, cache.numbers = watcher, numbers
    return args, {**kwargs, name: cache}


@contextmanager
def watch(model: Any, watcher: Watching) -> Iterator[Watching]:
    """Inside, every forward of ``model``'s text model fills ``watcher``; outside, the model is as before."""
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    text = model.config.get_text_config(decoder=True)
    key = next((key for key in model.config.sub_configs if getattr(model.config, key) is text), None)
    before = text._attn_implementation
    if before == NAME:
        raise RuntimeError("This model is already being watched; leave the other `watch` first.")
    numbers = full_numbers(model.config)
    hook = model.register_forward_pre_hook(partial(_before_forward, watcher, numbers), with_kwargs=True)
    try:
        model.set_attn_implementation({key: NAME} if key else NAME)
        yield watcher
    finally:
        hook.remove()
        model.set_attn_implementation({key: before} if key else before)
