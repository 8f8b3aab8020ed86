"""Layers with sliding windows or chunks: their newest tokens in buffers whose addresses a CUDA graph may know.

transformers' own layer makes new tensors at every step. Here a decode step writes one slot of a buffer `[batch,
kv_heads, slots, head_dim]`, the same for all sequences, and attends to the rows of each sequence's window that end
there: `start` and `length`, which live on the device and move on by the same few launches at every step. They are those
of `kernels.ragged_decode`, so a step needs no mask, before and after the window is full. A full buffer is shifted in
place. Left padding is never in a window: of a later pass as well, each sequence's real rows are moved together.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from sparsemm_lmms.cpu_kernels import decode_plan
from sparsemm_lmms.handoff import hand_on
from sparsemm_lmms.kernels import ragged_decode

SLACK = 16  # rows kept beside a window, so that as many tokens can be rolled back; the decode loop may ask for 15
SHIFT = 128  # free slots behind a full window: so many steps lie between two shifts


class SlidingWindow:
    """Where the layers of one kind stand in their buffers; one object for all layers with equal arguments.

    The rows of sequence b are right-aligned: its newest token lies in slot `end - 1`, as that of all others.

    Args:
        size: tokens of a window or chunk, the newest included.
        chunked: whether windows are chunks: a token sees those of its own chunk only.
        heads, device: of the layers' keys.
        counts: real tokens of each sequence of the prompt, which has `tokens` columns.
        slack: rows kept beside the window for `rollback`.
        headroom: slots for new tokens at first; it doubles up to SHIFT, then the buffer is shifted.
        backend: of the kernels.

    Attributes:
        slot: int64 `[1]` on the device, where the newest token lies.
        start, length: int32 `[batch, heads]` on the device, rows of the flat buffer that the newest token sees.
        real: int64 `[batch]` on the host, tokens of each sequence so far.
        held: int64 `[batch]` on the host, the newest of them whose rows are still there.
    """

    def __init__(
        self,
        size: int,
        chunked: bool,
        heads: int,
        device: torch.device,
        counts: tuple[int, ...],
        tokens: int,
        slack: int,
        headroom: int,
        backend: str,
    ) -> None:
        self.size, self.chunked, self.heads, self.device = size, chunked, heads, device
        self.keep, self.headroom, self.backend = size - 1 + max(slack, SLACK), headroom, backend
        self.end = min(tokens, self.keep)
        self.real = np.array(counts, dtype=np.int64)
        self.held = np.minimum(self.real, self.end)
        self.older: tuple[int, np.ndarray] | None = None  # columns and `held` of what the layers keep beside the buffer
        self.order: Tensor | None = None  # of columns whose real rows have to be moved together
        self.before = self.past = 0  # rows before a pass of several tokens, and how many of them it may see
        self.mask = self.shown = torch.empty(0)
        self.slots = 0
        self.slot, self.start = torch.empty(0), torch.empty(0)
        self.ends = self.length = torch.empty(0)
        self._fit()

    def static_tensors(self) -> list[Tensor]:
        """See `RaggedCache.static_tensors`."""
        return [self.slot, self.ends, self.length, self.start]

    @property
    def counted(self) -> tuple[int, np.ndarray, np.ndarray]:
        """What Python counts at a decode step."""
        return self.end, self.real, self.held

    @counted.setter
    def counted(self, counted: tuple[int, np.ndarray, np.ndarray]) -> None:
        self.end, self.real, self.held = counted

    def advance(self) -> None:
        """One more token for every sequence, which the layers then write: the same launches at every step."""
        self.count(1)
        self.slot.add_(1)
        self.ends.add_(1)
        if self.chunked:
            self.length.remainder_(self.size).add_(1)
        else:
            self.length.add_(1).clamp_(max=self.size)
        torch.sub(self.ends, self.length, out=self.start)

    def count(self, tokens: int) -> None:
        """Count tokens appended one by one (negative: that did not happen), on the host alone."""
        self.counted = self.end + tokens, self.real + tokens, self.held + tokens
        self.older = None

    def begin(self, counts: tuple[int, ...], tokens: int) -> None:
        """Several more columns, of which the last `counts` are real: make their mask; the layers then store them."""
        real, pads = np.array(counts), tokens - np.array(counts)
        self.before, self.past = self.end, min(self.end, self.size - 1)
        column = np.arange(-self.past, tokens)
        place = self.real[:, None] + column - np.where(column < 0, 0, pads[:, None])  # of each column in its sequence
        place = np.where((column >= 0) & (column < pads[:, None]), -1, place)
        key = torch.as_tensor(place, device=self.device)
        query = key[:, None, -tokens:, None]
        first = query // self.size * self.size if self.chunked else query - self.size + 1
        key = key[:, None, None, :]
        own = torch.ones(tokens, self.past + tokens, dtype=torch.bool, device=self.device).tril(self.past)
        own = own.triu(self.past)  # padding sees itself, so that its output is finite
        self.mask = (key >= 0) & (key >= first) & (key <= query) | own
        self.shown = key[:, 0, 0] >= 0
        columns, held = self.end + tokens, self.held + real
        self.order = _closed(columns, pads, self.end + pads, self.device) if pads.any() else None
        self.older = (columns, held) if tokens > self.keep - self.size + 1 and columns > self.keep else None
        self.end, self.real = min(columns, self.keep), self.real + real
        self.held = np.minimum(held, self.end)
        self._fit()

    def mask_for(self, prefill: str, dtype: torch.dtype) -> Tensor | None:
        """The mask of a pass of several tokens, as the stock attention `prefill` takes it."""
        if "flash" in prefill:  # it knows windows, and the padding from a mask of the keys
            return None if bool(self.shown.all()) else self.shown
        if prefill == "eager":
            return torch.zeros(self.mask.shape, dtype=dtype, device=self.device).masked_fill_(
                ~self.mask, torch.finfo(dtype).min
            )
        return self.mask

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention of one new token of each sequence to its window; see `kernels.ragged_decode`.

        Args:
            query: `[batch, q_heads, 1, head_dim]`; key, value: a layer's buffers.
        """
        return ragged_decode(
            query,
            key.flatten(0, 2),
            value.flatten(0, 2),
            self.start,
            self.length,
            scaling=scaling,
            softcap=softcap,
            sinks=sinks,
            max_length=min(self.size, self.slots),
            plan=self.plan,
            backend=self.backend,
        )

    @property
    def room(self) -> int:
        """Tokens that can be appended one by one before the buffers are shifted or move."""
        return self.slots - self.end

    def wants(self, tokens: int) -> bool:
        """Whether there is no room for `tokens` more tokens, or for the SHIFT that a buffer has at most."""
        return self.room < min(tokens, SHIFT)

    def make_room(self) -> int:
        """Move the newest rows to the front, in place or into larger buffers; returns the end of the rows before."""
        end, self.end = self.end, min(self.end, self.keep)
        if self.slots < self.keep + SHIFT:
            self.headroom *= 2
            self.slots = self._most
        self.held = np.minimum(self.held, self.end)
        self.older = self.order = None
        self._fit()
        return end

    def can_rollback(self, tokens: int, counts: Tensor | None) -> bool:
        """Whether the rows of each sequence's window before its newest tokens are still there; see `rollback`."""
        gone, held = self._gone(tokens, counts), self.held if self.older is None else self.older[1]
        return bool((held - gone >= np.minimum(self.real - gone, self.size - 1)).all())

    def _gone(self, tokens: int, counts: Tensor | None) -> np.ndarray:
        return np.full_like(self.real, tokens) if counts is None else counts.cpu().numpy().astype(np.int64)

    def rollback(self, tokens: int, counts: Tensor | None) -> int:
        """Forget the newest tokens of each sequence (see `RaggedCache.rollback`); returns the columns still needed."""
        gone = self._gone(tokens, counts)
        columns, held = (self.end, self.held) if self.older is None else self.older
        left = columns - int(gone.min())
        uneven = gone - gone.min()
        self.order = _closed(left, uneven, np.full_like(uneven, left), self.device) if uneven.any() else None
        # Rows that neither move among each other nor lie beside the buffer stay where they are.
        self.end = left if self.order is None and self.older is None else min(left, self.keep)
        self.real = self.real - gone
        self.held = np.minimum(held - gone, self.end)
        self.older = None
        self._fit()
        return left

    def select(self, sequences: np.ndarray) -> None:
        """Go on with these sequences."""
        self.real, self.held = self.real[sequences], self.held[sequences]
        self.older = self.order = None
        self._fit()

    @property
    def _most(self) -> int:
        """Slots that buffers of the rows so far would have."""
        return min(self.end + self.headroom, self.keep + SHIFT)

    def _fit(self) -> None:
        """Find slots for the rows that the host counts, and tell the device where they are, at the addresses known."""
        shape = len(self.real), self.heads
        self.slots = self.slots if self.end <= self.slots else self._most
        if np.prod(shape) * self.slots >= 2**31:
            raise ValueError(
                f"{np.prod(shape) * self.slots} cache slots in one layer exceed int32 addressing; lower batch_size."
            )
        seen = (self.real - 1) % self.size + 1 if self.chunked else np.minimum(self.real, self.size)
        last = np.arange(np.prod(shape)).reshape(shape) * self.slots + self.end
        slot = torch.tensor([self.end - 1], device=self.device)
        ends = torch.tensor(last, dtype=torch.int32, device=self.device)
        length = torch.tensor(np.broadcast_to(seen[:, None], shape), dtype=torch.int32, device=self.device)
        if self.ends.shape == shape:
            self.slot.copy_(slot)
            self.ends.copy_(ends)
            self.length.copy_(length)
            torch.sub(ends, length, out=self.start)
        else:
            self.slot, self.ends, self.length, self.start = slot, ends, length, ends - length
        room = torch.full(shape, self.slots, dtype=torch.int32, device=self.device)
        first = self.ends - self.end
        # q_heads and head_dim play no part: segments lie evenly
        self.plan = decode_plan(first, room, int(np.prod(shape)) * self.slots, self.heads, 1)


class SlidingLayer(CacheLayerMixin):
    """The keys and values of one layer with a window: `[batch, kv_heads, slots, head_dim]`; see `SlidingWindow`.

    Attributes:
        window: where the rows lie; None before the prompt.
        seen: columns so far, padding included.
        older: keys and values that a pass of many tokens brought, until the next pass, for `rollback`.
    """

    is_sliding = True
    is_compileable = False
    is_croppable = False
    keys: Tensor  # type: ignore[assignment]  # None in the base class until it is filled
    values: Tensor  # type: ignore[assignment]

    def __init__(self, size: int, chunked: bool) -> None:
        super().__init__()
        self.size, self.chunked = size, chunked
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = torch.empty(0)
        self.window: SlidingWindow | None = None
        self.older: tuple[Tensor, Tensor] | None = None
        self.seen = 0
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are made when the prompt is here."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new keys and values, and return what the attention function needs: all of a prompt, the buffers for one
        token, the window and the new tokens for several."""
        window, tokens = self.window, key_states.shape[2]
        assert window is not None  # the cache has set it
        self.seen += tokens
        new = key_states.detach().to(value_states.dtype), value_states.detach()
        if not self.is_initialized:
            self.is_initialized = True
            self._store(new)
            return hand_on(key_states, None), value_states
        self.older = None
        if tokens == 1:
            for buffer, x in zip((self.keys, self.values), new, strict=True):
                buffer.index_copy_(2, window.slot, x.to(buffer.dtype))
            return hand_on(self.keys[:], window), self.values
        key, value = (
            torch.cat([x[:, :, : window.before], y.to(x.dtype)], 2)
            for x, y in zip((self.keys, self.values), new, strict=True)
        )
        rows = self._in_order((key, value))
        self._store(rows)
        self.older = None if window.older is None else rows
        return hand_on(key[:, :, -window.past - tokens :], window), value[:, :, -window.past - tokens :]

    def _in_order(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows moved as the window says, `[batch, kv_heads, n, head_dim]`."""
        order = None if self.window is None else self.window.order
        if order is None:
            return rows
        key, value = (x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])) for x in rows)
        return key, value

    def _store(self, rows: tuple[Tensor, Tensor]) -> None:
        """Put the newest rows into the buffers; one of the two at a time is copied."""
        assert self.window is not None
        end, slots = self.window.end, self.window.slots
        for name, x in zip(("keys", "values"), rows, strict=True):
            buffer, newest = getattr(self, name), x[:, :, x.shape[2] - end :]
            if buffer.ndim < 4 or buffer.shape[2] != slots:
                buffer = newest.new_zeros(*x.shape[:2], slots, x.shape[3])
            elif newest.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr():
                newest = newest.clone()  # a shift: the two overlap
            buffer[:, :, :end] = newest
            setattr(self, name, buffer)

    def make_room(self, end: int) -> None:
        """Follow `SlidingWindow.make_room`."""
        self.older = None
        self._store((self.keys[:, :, :end], self.values[:, :, :end]))

    def rollback(self, tokens: int, left: int) -> None:
        """Follow `SlidingWindow.rollback`."""
        assert self.window is not None
        self.seen -= tokens
        if self.older is not None or self.window.order is not None:
            key, value = (self.keys, self.values) if self.older is None else self.older
            self._store(self._in_order((key[:, :, :left], value[:, :, :left])))
        self.older = None

    @property
    def used_bytes(self) -> int:
        """Bytes of the rows that the next token may see."""
        if self.window is None:
            return 0
        rows = int(np.minimum(self.window.real, self.size - 1).sum()) * self.keys.shape[1]
        return rows * (self.keys.shape[3] + self.values.shape[3]) * self.keys.element_size()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the buffers, and of what is kept beside them."""
        return sum(x.nbytes for x in (self.keys, self.values, *(self.older or ())))

    # -- what transformers asks of a layer ---------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow `SlidingWindow.select`."""
        if self.is_initialized:
            picked = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, picked), self.values.index_select(0, picked)
            self.older = None


def _closed(columns: int, width: np.ndarray, end: np.ndarray, device: torch.device) -> Tensor:
    """Which column comes to each place once the `width` columns before `end` are cut out of each sequence.

    Args:
        width, end: `[batch]`.

    Returns:
        int64 `[batch, columns]`; the first `width` places have no meaning.
    """
    column = np.arange(columns)
    moved = np.where(column < end[:, None], column - width[:, None], column)
    return torch.as_tensor(np.maximum(moved, 0), device=device)
