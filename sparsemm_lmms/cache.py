"""The ragged KV cache: every (sequence, kv head) owns a segment of its own length in one flat store a layer."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)
from transformers.generation import GenerateDecoderOnlyOutput

from sparsemm_lmms.budgets import spend_exactly
from sparsemm_lmms.cpu_kernels import decode_plan
from sparsemm_lmms.handoff import hand_on
from sparsemm_lmms.kernels import DecodePlan, append, evict, ragged_decode
from sparsemm_lmms.methods import Method
from sparsemm_lmms.scorers.base import LayerView
from sparsemm_lmms.selection import Selection, select, select_newest
from sparsemm_lmms.sliding import SlidingLayer, SlidingWindow

OLD_CACHE_NAME = "past_key_values"  # of a model's argument and output until transformers 5.23, an alias since
CACHE_NAME = "cache" if "cache" in {known.name for known in fields(GenerateDecoderOnlyOutput)} else OLD_CACHE_NAME
DEFAULT_HEADROOM = 128  # tokens that a segment can take up when the caller does not say how many are to come
CHUNK_BYTES = 2**24  # rows of a store that are moved at once


@dataclass
class Prompt:
    """What the layers of one prompt share while it is compressed.

    Attributes:
        vision, rotary, state, turn, position: see `LayerView`.
        observed: what a cascading allocator saw of each layer.
        chosen: what each layer keeps, while a later one may shrink it.
    """

    vision: Tensor | None = None
    rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
    state: dict[str, Any] = field(default_factory=dict)
    turn: tuple[Tensor, Tensor] | None = None
    position: Tensor | None = None
    observed: list[np.ndarray] = field(default_factory=list)
    chosen: list[tuple[RaggedLayer, Selection]] = field(default_factory=list)

    def add(self, layer: RaggedLayer, chosen: Selection) -> None:
        """Note a layer that has been compressed, and shrink those before it."""
        if chosen.ranking is None:
            return
        pairs = zip(self.chosen, chosen.earlier, strict=True)
        self.chosen = [(earlier, earlier.shrink(outside, kept)) for (earlier, kept), outside in pairs]
        self.chosen.append((layer, chosen))
        if len(self.chosen) == layer.method.model.num_layers:
            for kept, _ in self.chosen:  # nothing is shrunk any more; one store after the other, each old one is freed
                kept.trim()
            self.chosen = []


@dataclass
class Newest:
    """What a layer needs to be compacted while the cache writes (`max_cache`).

    Attributes:
        queries: post-RoPE, `[batch, q_heads, window_size, head_dim]`: a ring of those of the newest tokens.
        cursor: int64 `[1]`, the place of the newest one; all layers share it.
        scaling, softcap, sinks, output: see `RaggedLayer.fill`.
        share: int64 `[batch, kv_heads]`, what each head keeps at a compaction, window included; None as long as there
            is no room for a chunk.
        dropped: int64 `[batch, kv_heads]`, tokens that compactions have evicted.
    """

    queries: Tensor
    cursor: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    output: Tensor | None
    dropped: np.ndarray
    share: np.ndarray | None = None

    def write(self, query: Tensor) -> None:
        """Put the queries `[batch, q_heads, 1, head_dim]` of a decode step where the oldest were."""
        self.queries.index_copy_(2, self.cursor.to(query.device), query)

    def in_order(self) -> Tensor:
        """The queries, the newest last."""
        rows = self.queries.shape[2]
        places = torch.arange(1, rows + 1, device=self.queries.device) + self.cursor.to(self.queries.device)
        return self.queries.index_select(2, places % rows)

    def select(self, rows: np.ndarray, picked: Tensor) -> None:
        """Go on with these sequences."""
        self.queries, self.dropped = self.queries[picked], self.dropped[rows]
        self.share = None if self.share is None else self.share[rows]


@dataclass
class Step:
    """What one forward pass brings to every layer; set by the session before the model runs.

    Attributes:
        counts: real (not padding) new tokens of each sequence, on the host.
        tokens: columns of this pass.
        new_count: the same as int32 `[batch]` on the device, or None when no sequence is padded.
        compress: choose again what to keep once these tokens are appended.
        prompt: what the layers share while they choose.
    """

    counts: tuple[int, ...]
    tokens: int
    new_count: Tensor | None = None
    compress: bool = False
    prompt: Prompt = field(default_factory=Prompt, compare=False)


class RaggedLayer(CacheLayerMixin):
    """One layer: `keys, values [slots, head_dim]` and, per (sequence, kv head), `start, length, capacity`.

    Segments lie one after the other in (sequence, head) order. Addresses never move while the headroom lasts, so an
    append is O(1) and a CUDA graph can replay it.

    Attributes:
        layer_idx: index among the compressed layers of the model (see `RaggedCache`).
        at_prompt: whether the pass under way is the one that brings the prompt.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    keys: Tensor  # type: ignore[assignment]  # None in the base class until it is filled
    values: Tensor  # type: ignore[assignment]

    def __init__(self, layer_idx: int, method: Method, headroom: int) -> None:
        super().__init__()
        self.layer_idx, self.method, self.headroom = layer_idx, method, headroom
        self.step: Step | None = None
        self.at_prompt = False
        self.cursor: Tensor | None = None  # of `Newest`
        masked = method.masked_heads()
        self.masked = None if masked is None else torch.from_numpy(masked[layer_idx])
        self.reset()

    def reset(self) -> None:
        """Forget everything, keep the settings."""
        self.keys = self.values = torch.empty(0)
        self.start = self.length = self.capacity = self.overflow = self.index = torch.empty(0, dtype=torch.int32)
        self.kept: np.ndarray = np.zeros((0, 0), dtype=np.int64)
        self.plan: DecodePlan | None = None  # how this store's decode steps are computed
        self.newest: Newest | None = None  # where `max_cache` is on
        self.prompt_lengths: tuple[int, ...] = ()
        self.longest = 0  # rows of the largest segment: picks launches, and is the same at every step of a layout
        self.columns = self.seen = self.appended = 0
        self.taken = 0  # tokens of the window that were rolled back since the last compression
        self.padded_until = 0  # `appended` after the last pass that brought padding: later columns are all real
        self.is_initialized = False

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the store is allocated when the prompt's selection is known."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on to the attention function, which has the queries as well."""
        self.seen += key_states.shape[-2]
        self.at_prompt = not self.is_initialized
        return hand_on(key_states, self), value_states

    def get_seq_length(self) -> int:
        """Tokens SEEN (positions depend on it), padding included; not the tokens kept."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "A compressed cache cannot be cropped, so assisted (speculative) decoding is not supported; call generate "
            "without an assistant."
        )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_sequences(beam_idx)

    # -- prefill and decode --------------------------------------------------------------------------------------------

    def fill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        step: Step,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        output: Tensor | None = None,
    ) -> None:
        """Compress the prompt: scores, counts, positions, and one copy into a fresh store.

        Args:
            query: `[batch, q_heads, n, head_dim]`; key, value: `[batch, kv_heads, n, head_dim]`, post-RoPE.
            softcap, sinks: of the logits and `[q_heads]`, see `kernels.ragged_decode`.
            output: weight of the output projection, see `LayerView`; None where it is not known.
        """
        held = np.broadcast_to(np.asarray(step.counts)[:, None], key.shape[:2])
        pads = None if step.new_count is None else step.tokens - step.new_count.to(key.device)
        view = self._view(query, key, value, scaling, softcap, sinks, output, step.prompt, pads, step.prompt.vision)
        chosen = select(self.method, view, held, step.counts, step.prompt.observed)
        self.index, self.prompt_lengths, self.columns = chosen.index, step.counts, step.tokens
        self.overflow = torch.zeros(1, dtype=torch.int32, device=key.device)  # stays when the store moves
        self._store(key, value, chosen.index, chosen.counts)
        step.prompt.add(self, chosen)
        if self.masked is not None:  # once: a copy from the host at every step could not be captured
            self.masked = self.masked.to(key.device)
        if self.method.config.chunk and self.cursor is not None:
            window, dropped = self.method.config.window_size, np.zeros_like(self.kept)
            queries = query.new_zeros(*query.shape[:2], window, query.shape[3])
            queries[:, :, -query.shape[2] :] = query[:, :, -window:]
            self.newest = Newest(queries, self.cursor, scaling, softcap, sinks, output, dropped)
        self.is_initialized = True

    def _view(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        output: Tensor | None,
        prompt: Prompt,
        pad: Tensor | None = None,
        vision: Tensor | None = None,
    ) -> LayerView:
        config, device = self.method.config, key.device
        return LayerView(
            self.layer_idx,
            query,
            key,
            scaling,
            window=min(config.window_size, key.shape[2]),
            pad=pad,
            softcap=softcap,
            sinks=sinks,
            vision=vision,
            rotary=prompt.rotary,
            state=prompt.state,
            backend=config.kernel_backend,
            values=value,
            output=output,
            turn=None if prompt.turn is None else (prompt.turn[0].to(device), prompt.turn[1].to(device)),
            position=None if prompt.position is None else prompt.position.to(device),
        )

    def _store(self, key: Tensor, value: Tensor, index: Tensor, counts: np.ndarray) -> None:
        """Copy the columns `index` of key and value, the first `counts` of each head, into a fresh store."""
        self.kept = counts
        self._allocate(key)
        self.length = torch.as_tensor(counts, dtype=torch.int32, device=key.device)
        backend = self.method.config.kernel_backend
        evict(key, value, index, self.length, self.start, self.keys, self.values, backend=backend)

    def extend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        step: Step,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        output: Tensor | None = None,
    ) -> Tensor:
        """Append new tokens in place and attend to each head's segment, causal among the new tokens; see `fill`.

        Returns:
            `[batch, q_heads, t, head_dim]` in the dtype of `query`.
        """
        tokens = key.shape[2]
        self.reserve(tokens)
        new = key.to(self.keys.dtype), value.to(self.values.dtype)
        new_count = None if step.new_count is None else step.new_count.to(key.device)
        store = self.keys, self.values, self.start, self.length
        backend = self.method.config.kernel_backend
        append(*store, self.capacity, *new, self.overflow, new_count, plan=self.plan, backend=backend)
        self.appended += tokens
        if new_count is not None:
            self.padded_until = self.appended
        if self.newest is not None:
            self.newest.write(query)
        answer = self.attend(query, scaling, step, softcap, sinks)
        if step.compress:
            self._compress_again(query, scaling, softcap, sinks, output, step.prompt)
        return answer

    def _compress_again(
        self,
        query: Tensor,
        scaling: float,
        softcap: float | None,
        sinks: Tensor | None,
        output: Tensor | None,
        prompt: Prompt,
    ) -> None:
        """Choose what the one sequence keeps of all it holds, judged by its newest tokens (see `select`)."""
        held = self.length[0].cpu().numpy().astype(np.int64)  # not `appended`, which counts padding as well
        new = int(held[0] - self.kept[0, 0])
        longest, seen = int(held.max()), self.prompt_lengths[0] + new
        device = self.keys.device
        column = torch.arange(longest, device=device)
        slot = (column - (longest - torch.as_tensor(held, device=device)[:, None])).clamp(min=0)  # right-aligned
        key, value = (x[self.start[0, :, None] + slot][None] for x in (self.keys, self.values))
        view = self._view(query, key, value, scaling, softcap, sinks, output, prompt)
        chosen = select(self.method, view, held[None], (seen,), prompt.observed)
        kept = torch.as_tensor(self.kept[0], device=device)[:, None]
        last = self.index.shape[2] - 1
        columns = torch.where(
            slot < kept, self.index[0].gather(1, slot.clamp(max=last)).long(), self.columns + slot - kept
        )
        picked = chosen.index.long().clamp(max=longest - 1)
        self.index = columns[None].gather(2, picked).to(torch.int32)
        self._store(key, value, chosen.index, chosen.counts)
        self.columns, self.prompt_lengths = self.columns + new, (seen,)
        self.appended = self.taken = self.padded_until = 0
        prompt.add(self, chosen)

    def compact(self, prompt: Prompt) -> None:
        """Keep each head's share of what it holds, in place: the newest window, and the best of what is before it.

        Args:
            prompt: what scorers remember from layer to layer.
        """
        newest, scorer, window = self.newest, self.method.compactor, self.method.config.window_size
        assert newest is not None and newest.share is not None and scorer is not None
        held = self.length.cpu().numpy().astype(np.int64)
        self.appended = self.padded_until = 0
        if (held <= newest.share).all():
            return
        longest, device = int(held.max()), self.keys.device
        first = longest - self.length[..., None]
        slot = (torch.arange(longest, device=device) - first).clamp(min=0)  # right-aligned
        key, value = (x[self.start[..., None] + slot] for x in (self.keys, self.values))
        facts = newest.scaling, newest.softcap, newest.sinks, newest.output
        view = self._view(newest.in_order(), key, value, *facts, prompt)
        chosen = select_newest(self.method, scorer, view, held, newest.share - window)
        newest.dropped += held - chosen.counts
        self.length.copy_(torch.as_tensor(chosen.counts))
        store = self.keys, self.values
        _move_rows(store, store, self.start, self.start, self.length, (chosen.index - first).clamp(min=0))

    def shrink(self, outside: np.ndarray, chosen: Selection) -> Selection:
        """Keep less of a prompt: what a cascading allocator leaves this layer once it has seen a later one.

        The store is compacted where it lies, CHUNK_BYTES of rows at a time. Its tail stays allocated until `trim`, or
        until less than half of it is in use: so while the later layers are prefilled, stores hold at most twice what
        is kept of them so far, however often they shrink, and their addresses change seldom.

        Args:
            outside: int64 `[batch, kv_heads]`, tokens outside the window.
            chosen: what the layer keeps now, with its ranking.

        Returns:
            What it keeps then.

        Raises:
            ValueError: if a head would have to keep more than it does.
        """
        ranking = chosen.ranking
        assert ranking is not None  # a cascading allocator's selections have one
        room = chosen.counts - np.minimum(ranking.held, ranking.window)
        outside = np.minimum(outside, np.maximum(ranking.held - ranking.window, 0))
        if (outside > room).any():
            raise ValueError(
                f"{type(self.method.allocator).__name__} gives layer {self.layer_idx} {outside.max()} tokens a head "
                f"after {room.max()}: what was evicted is gone, so counts_so_far may only shrink."
            )
        if (outside == room).all():
            return chosen
        fewer = ranking.first(outside)
        last = torch.as_tensor(chosen.counts - 1, dtype=torch.int32, device=self.index.device)[..., None]
        slot = torch.searchsorted(chosen.index, fewer.index, out_int32=True).minimum(last)
        self.index = self.index.gather(2, slot.long())
        start, self.kept, self.plan = self.start, fewer.counts, None  # `trim` makes a plan
        used = self._lay_out()
        self.length = torch.as_tensor(fewer.counts, dtype=torch.int32, device=slot.device)
        _move_rows((self.keys, self.values), (self.keys, self.values), start, self.start, self.length, slot)
        if 2 * used < self.keys.shape[0]:
            self.trim()
        return Selection(fewer.index, fewer.counts, ranking)

    def trim(self) -> None:
        """Give back what `shrink` has freed: the rows go to a store of just their size."""
        if int(self.capacity.sum()) < self.keys.shape[0]:
            self._relayout(None)

    def attend(
        self,
        query: Tensor,
        scaling: float,
        step: Step,
        softcap: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attention of another layer's queries to the segments, the newest tokens included; see `extend`."""
        return ragged_decode(
            query,
            self.keys,
            self.values,
            self.start,
            self.length,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            new_count=None if step.new_count is None else step.new_count.to(query.device),
            max_length=self.longest,
            plan=self.plan,
            backend=self.method.config.kernel_backend,
        )

    def rollback(self, tokens: int, counts: Tensor | None = None) -> None:
        """See `RaggedCache.rollback`."""
        into = tokens - self.appended  # tokens of the prompt
        whole = (length + self.taken for length in self.prompt_lengths)
        window = 0 if self.newest else min(self.method.config.window_size, *whole) - 1 - self.taken
        if into > window or (into > 0 and counts is not None):
            raise ValueError(
                f"{tokens} tokens cannot be rolled back: {self.appended} came after the last compression, and {window} "
                "of its window are left."
            )
        if counts is None and self.padded_until and tokens > self.appended - self.padded_until:
            raise ValueError(
                f"{tokens} tokens cannot be rolled back without counts: only the newest "
                f"{self.appended - self.padded_until} came without padding."
            )
        self.length -= tokens if counts is None else counts.to(self.length.device)[:, None]
        self.seen -= tokens
        self.appended -= min(tokens, self.appended)
        self.padded_until = min(self.padded_until, self.appended)
        if into > 0:
            self.taken += into
            self.kept, self.columns = self.kept - into, self.columns - into
            self.prompt_lengths = tuple(length - into for length in self.prompt_lengths)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens; only this moves addresses, by doubling the headroom."""
        if self.appended + tokens > self.headroom:
            self._relayout(None, headroom=max(2 * self.headroom, self.appended + tokens))

    # -- layout --------------------------------------------------------------------------------------------------------

    @property
    def _batch(self) -> int:
        return self.kept.shape[0]

    def _lay_out(self) -> int:
        """Place the segments of the tokens `kept`, with their headroom, one after the other; returns their rows."""
        capacity, device = self.kept + self.headroom, self.overflow.device
        if self.newest is not None and self.newest.share is not None:
            capacity = np.maximum(self.kept, self.newest.share) + self.headroom
        ends = np.cumsum(capacity.ravel()).reshape(capacity.shape)
        slots = int(ends[-1, -1])
        if slots >= 2**31:
            raise ValueError(f"{slots} cache slots in one layer exceed int32 addressing; lower batch_size or budget.")
        self.start = torch.as_tensor(ends - capacity, dtype=torch.int32, device=device)
        self.capacity = torch.as_tensor(capacity, dtype=torch.int32, device=device)
        self.longest = int(capacity.max())
        return slots

    def _allocate(self, like: Tensor) -> None:
        slots = self._lay_out()
        self.plan = decode_plan(self.start, self.capacity, slots, self.method.model.q_heads, like.shape[-1])
        self.keys, self.values = self.plan.new_store(like.dtype)

    def _relayout(self, sequences: Tensor | None, headroom: int | None = None) -> None:
        """Copy the segments of `sequences` (all when None) into a fresh store, with `headroom` slots for new tokens."""
        if not self.is_initialized:
            return
        device = self.keys.device
        rows = np.arange(self._batch) if sequences is None else sequences.cpu().numpy()
        picked = torch.as_tensor(rows, device=device)
        old_keys, old_values, old_start = self.keys, self.values, self.start
        self.headroom = self.headroom if headroom is None else headroom
        self.kept = self.kept[rows]
        self.prompt_lengths = tuple(self.prompt_lengths[row] for row in rows)
        self.index, self.length = self.index[picked], self.length[picked]
        if self.newest is not None and sequences is not None:
            self.newest.select(rows, picked)
        self._allocate(old_keys)
        _move_rows((old_keys, old_values), (self.keys, self.values), old_start[picked], self.start, self.length)

    def _select_sequences(self, sequences: Tensor) -> None:
        self._relayout(sequences)


class RaggedCache(Cache):
    """A compressed KV cache for `generate`. Made by `CompressionSession.new_cache`; one cache serves one batch.

    Only layers with full attention are compressed. Those with sliding windows or chunks keep their newest tokens (see
    `sparsemm_lmms.sliding`), linear attention keeps the states that transformers gives it, and layers that read another
    layer's keys have none. `layers` has one entry a layer of the model; methods, head scores, `full_layers`,
    `kept_positions` and `kept_per_head` number the compressed layers alone, from 0, in the model's order.

    Args:
        method: what to keep (see `sparsemm_lmms.selection.build_method`).
        max_new_tokens: room for tokens after the prompt; more tokens than planned are fine, but cost one copy of the
            store each time the headroom doubles. With `max_cache` it ends at `max_cache - budget` tokens: each time
            they are full, heads are compacted in place.
        stock: the layers of `DynamicCache(config=...)` for the model; None: all are full attention.
        shared: whether layers of the model read the keys of others.
        chunked: which layers have chunks, where transformers' cache has windows.

    Attributes:
        full_layers: the compressed layers.
        sliding_layers: those with sliding windows or chunks.
        has_states: whether other layers keep a state, which cannot be rolled back.
        compress_next: set it before a later prompt to have the cache compressed again when that prompt is appended.
    """

    layers: list[Any]

    def __init__(
        self,
        method: Method,
        max_new_tokens: int | None = None,
        stock: Sequence[Any] | None = None,
        shared: bool = False,
        chunked: Collection[int] = (),
    ) -> None:
        headroom = DEFAULT_HEADROOM if max_new_tokens is None else max_new_tokens
        if headroom < 1:
            raise ValueError(f"max_new_tokens={headroom} must be at least 1.")
        self.chunk = method.config.chunk
        layers: list[Any] = [DynamicLayer() for _ in range(method.model.num_layers)] if stock is None else list(stock)
        for i, layer in enumerate(layers):
            if type(layer) is DynamicSlidingWindowLayer:
                layers[i] = SlidingLayer(layer.sliding_window, i in chunked)
        full = [i for i, layer in enumerate(layers) if is_full(layer)]
        for number, i in enumerate(full):
            layers[i] = RaggedLayer(number, method, min(headroom, self.chunk) if self.chunk else headroom)
        super().__init__(layers=layers)
        self.method, self.shared, self.headroom = method, shared, headroom
        self.full_layers: list[RaggedLayer] = [layers[i] for i in full]
        self.sliding_layers = [layer for layer in layers if isinstance(layer, SlidingLayer)]
        self.windows: dict[tuple, SlidingWindow] = {}
        self.has_states = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
        self.columns: Tensor | None = None  # columns before this pass, on the device, while a graph is captured
        self.cursor: Tensor | None = None  # of the newest queries, with `max_cache`
        self.rolled_back = False
        self.closed = False
        self.step: Step | None = None
        self.compress_next = False
        self.rotary: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None  # of the model, for scorers

    def close(self) -> None:
        """Take no more tokens: the session is over. What is kept can still be read."""
        self.closed = True

    # -- what transformers asks of a cache ---------------------------------------------------------------------------

    @property
    def seen(self) -> int:
        """Columns so far, padding included."""
        return self.full_layers[0].seen

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Columns so far; while a graph is captured a tensor, as a number would be the same at every replay."""
        return super().get_seq_length(layer_idx) if self.columns is None else self.columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `RaggedLayer.update`; another layer's keys say that they are the stock attention's."""
        if self.closed:
            raise RuntimeError(
                "This cache belongs to a sparsemm_lmms.compress block that has ended: the stock attention cannot read "
                "it. Generate, streaming threads included, inside the block."
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, SlidingLayer) and layer.window is None:
            layer.window = self._window_of(layer, key_states)
        return layer.update(key_states, value_states, *args, **kwargs)

    def _window_of(self, layer: SlidingLayer, key: Tensor) -> SlidingWindow:
        """The state that a layer shares with those like it, made with the first of them."""
        kind = layer.size, layer.chunked, key.shape[1], key.device
        if kind not in self.windows:
            assert self.step is not None  # `begin` has set it
            config = self.method.config
            self.windows[kind] = SlidingWindow(
                *kind, self.step.counts, self.step.tokens, config.window_size, self.headroom, config.kernel_backend
            )
        return self.windows[kind]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select_sequences(torch.arange(self.full_layers[0]._batch)[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select_sequences(torch.arange(self.full_layers[0]._batch).repeat_interleave(repeats))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select_sequences(beam_idx)

    def _select_sequences(self, sequences: Tensor) -> None:
        for window in self.windows.values():
            window.select(sequences.cpu().numpy())
        for layer in self.layers:
            layer.reorder_cache(sequences)

    def __deepcopy__(self, memo: dict[int, Any]) -> RaggedCache:
        """A copy with tensors of its own, of the same session: one filled prefix can serve many questions."""
        made = copy.copy(self)
        memo |= {id(self): made, id(self.method): self.method}
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    def begin(
        self,
        tokens: int,
        batch: int,
        attention_mask: Tensor | None,
        device: torch.device,
        vision: Tensor | None = None,
    ) -> None:
        """Note what the coming forward pass brings: which of its columns are left padding, and which are images.

        Args:
            vision: bool `[batch, tokens]`, the image and video tokens, or None where that is not known.

        Raises:
            ValueError: for a mask that is not `[batch, seen + tokens]` or that pads on the right.
        """
        seen = self.seen
        if self.chunk:
            self._begin_bounded(tokens, device)
        if tokens == 1 and seen and not self.compress_next and self.step == Step((1,) * batch, 1):
            self._advance(self.step)  # one more token for every sequence, which is never padding: every layer knows
            return
        self.step = _read_step(tokens, batch, attention_mask, seen, device)
        self.step.prompt = Prompt(vision=None if seen else vision, rotary=self.rotary)
        if seen and tokens > 1 and attention_mask is not None:
            self._check_mask_of_the_past(attention_mask[:, :seen])
        if self.compress_next:
            if batch != 1 or self.step.new_count is not None:
                raise ValueError("Only one conversation at a time, without padding, can be compressed again.")
            if self.shared:
                raise ValueError("A model with layers that read the keys of others cannot be compressed again.")
            self.step.compress, self.compress_next = True, False
        for layer in self.full_layers:
            layer.step = self.step
        self._advance(self.step)

    def _begin_bounded(self, tokens: int, device: torch.device) -> None:
        """With `max_cache`: make room for a token before its step, perhaps by a compaction."""
        if not self.seen:
            self.cursor = torch.full((1,), self.method.config.window_size - 1, device=device)
            self.rolled_back = False
            for layer in self.full_layers:
                layer.cursor = self.cursor
            return
        if tokens > 1 or self.compress_next or self.rolled_back:
            raise ValueError(
                f"max_cache={self.method.config.max_cache} compacts the cache of one prompt while tokens are written "
                "one by one; likelihoods, later rounds (rounds=append, recompress), compress_before_question and steps "
                "behind a rollback need max_cache=0."
            )
        if self.headroom_left < 1:
            self.reserve(1)
        assert self.cursor is not None
        self.cursor.add_(1).remainder_(self.method.config.window_size)

    def _make_room(self) -> None:
        """With `max_cache`: room for one more token in each segment; a full chunk is made room by a compaction."""
        layers = self.full_layers
        appended, room = layers[0].appended, layers[0].headroom
        if appended == self.chunk:
            prompt = Prompt(rotary=self.rotary)
            for layer in layers:
                layer.compact(prompt)
        elif appended == room or self._unshared:
            room = room if appended < room else min(2 * room, self.chunk)
            if room == self.chunk:
                self._share_out()
            for layer in layers:
                layer._relayout(None, headroom=room)

    @property
    def _unshared(self) -> bool:
        """Whether there is room for a chunk, but not for the heads' shares."""
        first = self.full_layers[0]
        return first.newest is not None and first.newest.share is None and first.headroom == self.chunk

    def _share_out(self) -> None:
        """What heads keep at compactions: what they kept of their prompt, scaled so that the mean is the budget.

        Of what is outside the window, over all layers and heads of a sequence, whole numbers by largest remainder. A
        prompt of the window alone is shared out evenly.
        """
        config = self.method.config
        kept = np.stack([layer.kept for layer in self.full_layers], axis=1)  # [batch, layers, kv_heads]
        weights = np.maximum(kept - config.window_size, 0)
        total = config.base * weights[0].size
        limit = np.full(weights[0].shape, total)
        shares = np.stack([spend_exactly(np.zeros(limit.shape), row, limit, total) for row in weights], axis=1)
        for layer, share in zip(self.full_layers, shares + config.window_size, strict=True):
            assert layer.newest is not None
            layer.newest.share = share

    def _advance(self, step: Step) -> None:
        """Tell the windows what is coming; those of a prompt are not there yet."""
        if step.tokens == 1:
            self._reserve_windows(1)
            if self.columns is not None:
                self.columns.add_(1)
        for window in self.windows.values():
            if step.tokens == 1:
                window.advance()
            else:
                window.begin(step.counts, step.tokens)

    def _check_mask_of_the_past(self, mask: Tensor) -> None:
        """A segment holds exactly what may be attended to: a later mask cannot hide some of it, or bring some back."""
        layer = self._filled(0)
        appended = layer.length[:, 0].cpu() - torch.from_numpy(layer.kept[:, 0])
        real = [a + b for a, b in zip(layer.prompt_lengths, appended.tolist(), strict=True)]
        shown = mask.bool().sum(1).tolist()
        if shown != real:
            raise ValueError(
                f"attention_mask shows {shown} tokens of the earlier passes, which brought {real}; a compressed cache "
                "attends to all that it keeps, so pass the mask of those passes, extended by the new tokens."
            )

    def activate_past_recording(self) -> None:
        raise ValueError(
            "Assisted (speculative) decoding is not supported on a compressed cache; call generate without an "
            "assistant."
        )

    def kept_positions(self, layer_idx: int) -> list[list[Tensor]]:
        """Prompt positions that a layer kept: `[sequence][kv head]` -> ascending int64, counted without padding.

        Args:
            layer_idx: index among the compressed layers.
        """
        layer = self._filled(layer_idx)
        rows = []
        for b, length in enumerate(layer.prompt_lengths):
            pad = layer.columns - length
            rows.append([layer.index[b, h, : layer.kept[b, h]].long().cpu() - pad for h in range(layer.kept.shape[1])])
        return rows

    def kept_per_head(self) -> Tensor:
        """Tokens that the compressed layers kept after prefill, int64 `[layers, batch, kv_heads]`, window included."""
        return torch.from_numpy(np.stack([self._filled(i).kept for i in range(len(self.full_layers))]))

    @property
    def prompt_lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that the last compression saw, padding excluded."""
        return self.full_layers[0].prompt_lengths

    def report(self) -> dict[str, Any]:
        """What the cache holds: real tokens and bytes beside the nominal budget.

        Returns:
            `kept_tokens` (mean per kv head), `prompt_tokens` (mean), `nominal_budget` (None for fullkv),
            `kept_per_head`, `kv_bytes_allocated`, `kv_bytes_used` and `kv_bytes_full` (of an uncompressed cache now).
            Tokens are those of the compressed layers after prefill, bytes those of all layers now, allocated ones with
            the newest queries that `max_cache` keeps.
        """
        kept = self.kept_per_head()
        layers = self.full_layers
        states = sum(x.nbytes for x in self._states())
        sliding = sum(layer.used_bytes for layer in self.sliding_layers) + states
        allocated = sum(layer.allocated_bytes for layer in self.sliding_layers) + states
        row = 2 * layers[0].keys.shape[1] * layers[0].keys.element_size()
        used = sum(int(layer.length.sum()) for layer in layers)
        config = self.method.config
        evicted = sum(layers[0].prompt_lengths) * kept.shape[0] * kept.shape[2] - int(kept.sum())
        bounded = [layer.newest for layer in layers if layer.newest is not None]
        evicted += sum(int(newest.dropped.sum()) for newest in bounded)
        allocated += sum(newest.queries.nbytes for newest in bounded)
        return {
            "kept_tokens": float(kept.double().mean()),
            "prompt_tokens": float(np.mean(layers[0].prompt_lengths)),
            "nominal_budget": config.budget if self.method.compresses else None,
            "kept_per_head": kept,
            "kv_bytes_allocated": sum(layer.keys.shape[0] for layer in layers) * row + allocated,
            "kv_bytes_used": used * row + sliding,
            "kv_bytes_full": (used + evicted) * row + sliding,
        }

    # -- for a captured decode step: its replays append on the device, Python counts here ------------------------------

    @property
    def headroom_left(self) -> int:
        """Tokens that every layer can still take up as it is."""
        if self._unshared:
            return 0
        room = [layer.headroom - layer.appended for layer in self.full_layers]
        return min([*room, *(window.room for window in self.windows.values())])

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens in every layer; at most `sliding.SHIFT` in those with windows.

        With `max_cache` for one token; it moves the store until that has its final size, and then compacts it in place.

        It may move the store: captured graphs are void if `static_tensors` are no longer the same.
        """
        if self.chunk:
            self._make_room()
        else:
            for layer in self.full_layers:
                layer.reserve(tokens)
        self._reserve_windows(tokens)

    def _reserve_windows(self, tokens: int) -> None:
        for window in self.windows.values():
            while window.wants(tokens):
                end = window.make_room()
                for layer in self.sliding_layers:
                    if layer.window is window:
                        layer.make_room(end)

    @property
    def counted(self) -> list[Any]:
        """All that Python counts while a step runs, to be set again if the device did not run it."""
        counts: list[Any] = [(layer.seen, layer.appended) for layer in self.full_layers]
        return [*counts, *(layer.seen for layer in self.sliding_layers), *(x.counted for x in self.windows.values())]

    @counted.setter
    def counted(self, counted: list[Any]) -> None:
        counts = iter(counted)
        for full in self.full_layers:
            full.seen, full.appended = next(counts)
        for sliding in self.sliding_layers:
            sliding.seen = next(counts)
        for window in self.windows.values():
            window.counted = next(counts)

    def count(self, tokens: int) -> None:
        """Count tokens that were appended without this Python code, or (negative) that did not happen."""
        for layer in self.full_layers:
            layer.seen += tokens
            layer.appended += tokens
        for sliding in self.sliding_layers:
            sliding.seen += tokens
        for window in self.windows.values():
            window.count(tokens)

    def rollback(self, tokens: int, counts: Tensor | None = None) -> None:
        """Forget the newest `tokens` columns of every sequence, exactly: segments end as they were before.

        It may reach into the prompt's last tokens, which every head keeps (its window), not further.

        Args:
            tokens: columns to forget.
            counts: int32 `[batch]`: how many of them were no padding, None for all.

        Raises:
            ValueError: if that is more than the tokens since the last compression and its window, or more than another
                layer can forget: a sliding window holds little more than the last pass, and a state nothing of before.
        """
        if tokens == 0:
            return
        for i, layer in enumerate(self.layers):
            if isinstance(layer, LinearAttentionCacheLayerMixin) or (
                isinstance(layer, SlidingLayer) and layer.window and not layer.window.can_rollback(tokens, counts)
            ):
                raise ValueError(
                    f"{tokens} tokens cannot be rolled back: layer {i}, a {type(layer).__name__}, no longer holds what "
                    "was before them."
                )
        self.rolled_back = True
        for full in self.full_layers:
            full.rollback(tokens, counts)
        for window in self.windows.values():
            left = window.rollback(tokens, counts)
            for sliding in self.sliding_layers:
                if sliding.window is window:
                    sliding.rollback(tokens, left)

    def static_tensors(self) -> list[Tensor]:
        """Everything that a decode step reads and writes of the cache, and whose address a captured graph knows."""
        names = ("keys", "values", "start", "length", "capacity", "overflow")
        found = [getattr(layer, name) for layer in self.full_layers for name in names]
        found += [layer.newest.queries for layer in self.full_layers if layer.newest is not None]
        found += [] if self.cursor is None else [self.cursor]
        found += [x for layer in self.sliding_layers for x in (layer.keys, layer.values)]
        found += [x for window in self.windows.values() for x in window.static_tensors()]
        return found + self._states()

    def _states(self) -> list[Tensor]:
        """What layers of linear attention hold: tensors that transformers overwrites in place."""
        states = [getattr(layer, name, {}) for layer in self.layers for name in ("conv_states", "recurrent_states")]
        return [x for state in states for x in state.values() if x is not None]

    def check_overflow(self) -> None:
        """Raise if any append found its segment full (one host synchronisation; not for the decode loop)."""
        flags = [layer.overflow for layer in self.full_layers if layer.is_initialized]
        full = torch.cat([flag.to(flags[0].device) for flag in flags]).nonzero().flatten().tolist() if flags else []
        if full:
            raise RuntimeError(f"Layer {full[0]} of the KV cache ran out of room for new tokens.")

    def _filled(self, layer_idx: int) -> RaggedLayer:
        layer = self.full_layers[layer_idx]
        if not layer.is_initialized:
            raise ValueError("The cache is empty: run the prompt through the model first.")
        return layer


def _move_rows(
    source: tuple[Tensor, Tensor],
    target: tuple[Tensor, Tensor],
    old: Tensor,
    new: Tensor,
    length: Tensor,
    slot: Tensor | None = None,
) -> None:
    """Copy row `old + slot[j]` of the source to row `new + j` of the target, for the first `length` j of each segment.

    In one store too, where rows only move towards its front: they go in ascending order, and a row is written once all
    that lie before it have been read. Beside the stores this takes CHUNK_BYTES of keys or values, and their indices.

    Args:
        source, target: keys and values `[slots, head_dim]`.
        old, new, length: int `[batch, kv_heads]`.
        slot: int `[batch, kv_heads, most]`, ascending; None: `slot[j] = j`.
    """
    ends = length.flatten().cumsum(0)
    first, old, new = ends - length.flatten(), old.flatten(), new.flatten()
    rows = max(CHUNK_BYTES // (source[0].shape[1] * source[0].element_size()), 1)
    total = int(ends[-1])
    for begin in range(0, total, rows):
        row = torch.arange(begin, min(begin + rows, total), device=ends.device)
        segment = torch.searchsorted(ends, row, right=True)
        j = row - first[segment]
        taken = old[segment] + (j if slot is None else slot.flatten()[segment * slot.shape[2] + j])
        put = new[segment] + j
        for x, y in zip(source, target, strict=True):
            y.index_copy_(0, put, x.index_select(0, taken))


def is_full(layer: Any) -> bool:
    """Whether a layer of transformers' dynamic cache holds all keys and values, and these alone."""
    return type(layer) is DynamicLayer


def _read_step(tokens: int, batch: int, mask: Tensor | None, seen: int, device: torch.device) -> Step:
    if mask is None or tokens == 1 and seen > 0:  # one decoded token is never padding
        return Step((tokens,) * batch, tokens)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != (batch, seen + tokens):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must have shape [{batch}, {seen + tokens}] (batch, tokens seen), not {shape}."
        )
    new = mask[:, seen:].bool().cpu()
    if not bool(new[:, -1].all()) or bool((new[:, :-1] & ~new[:, 1:]).any()):
        raise ValueError("attention_mask pads on the right; set processor.tokenizer.padding_side = 'left'.")
    counts = tuple(new.sum(1).tolist())
    if min(counts) == tokens:
        return Step(counts, tokens)
    return Step(counts, tokens, torch.tensor(counts, dtype=torch.int32, device=device))
