"""A cache through prompts, later turns, rolling back and compressing again, against plain lists of rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig, RaggedCache
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method

from . import slow

DIM, SCALING = 4, 0.5
ROW = 2 * DIM * 4  # bytes of a key and its value


@dataclass
class Segment:
    """What one head holds of one sequence: positions and keys, those that were judged first."""

    positions: list[int]
    keys: list[torch.Tensor]
    kept: int  # of the last compression


@dataclass
class Plain:
    """The cache as lists. A value is twice its key."""

    config: CompressionConfig
    model: Model
    table: np.ndarray | None
    room: int
    segments: list[list[list[Segment]]] = field(default_factory=list)  # [sequence][layer][head]
    prompts: list[int] = field(default_factory=list)  # tokens at the last compression
    tokens: list[int] = field(default_factory=list)
    passes: list[list[bool]] = field(default_factory=list)  # columns since then, of each sequence: real?
    shown: list[list[bool]] = field(default_factory=list)  # all columns so far, padding is False
    mixed: list[bool] = field(default_factory=list)  # columns of `passes`: did their pass bring padding?
    taken: int = 0  # of the window
    seen: int = 0
    allocated: int = 0

    def prompt(self, query: torch.Tensor, key: torch.Tensor, lengths: list[int]) -> None:
        """query `[layers, batch, q_heads, n, d]`, key `[layers, batch, kv_heads, n, d]`."""
        columns = key.shape[3]
        self.prompts, self.tokens, self.seen = list(lengths), list(lengths), columns
        self.passes = [[] for _ in lengths]
        self.shown = [[False] * (columns - length) + [True] * length for length in lengths]
        for b, length in enumerate(lengths):
            layers = []
            for i in range(self.model.num_layers):
                q, k = query[i, b, :, columns - length :], list(key[i, b, :, columns - length :])
                kept = slow.keep(self.config, self.model, self.table, i, q, k, length)
                layers.append([Segment(p, [k[h][j] for j in p], len(p)) for h, p in enumerate(kept)])
            self.segments.append(layers)
        self.allocate()

    def allocate(self) -> None:
        self.allocated = sum(s.kept + self.room for layers in self.segments for heads in layers for s in heads)

    def extend(self, query: torch.Tensor, key: torch.Tensor, counts: list[int], compress: bool) -> torch.Tensor:
        """Outputs float64 of the shape of `query`, 0 in the padding."""
        tokens, out = key.shape[3], torch.zeros(query.shape, dtype=torch.float64)
        before = len(self.passes[0])
        if before + tokens > self.room:
            self.room = max(2 * self.room, before + tokens)
            self.allocate()
        group = self.model.q_heads // self.model.kv_heads
        for b, count in enumerate(counts):
            for columns in (self.passes[b], self.shown[b]):
                columns += [False] * (tokens - count) + [True] * count
            for t in range(tokens - count, tokens):
                for i, heads in enumerate(self.segments[b]):
                    for h, segment in enumerate(heads):
                        segment.positions.append(self.tokens[b])
                        segment.keys.append(key[i, b, h, t])
                        held = torch.stack(segment.keys).double()
                        for g in range(h * group, (h + 1) * group):
                            weights = torch.softmax(held @ query[i, b, g, t].double() * SCALING, 0)
                            out[i, b, g, t] = weights @ (2 * held)
                self.tokens[b] += 1
        self.mixed += [min(counts) < tokens] * tokens
        self.seen += tokens
        if compress:
            for i, heads in enumerate(self.segments[0]):
                k = [torch.stack(s.keys) for s in heads]
                kept = slow.keep(self.config, self.model, self.table, i, query[i, 0], k, self.tokens[0])
                for s, chosen in zip(heads, kept, strict=True):
                    s.positions, s.keys = [s.positions[j] for j in chosen], [s.keys[j] for j in chosen]
                    s.kept = len(chosen)
            self.prompts, self.passes, self.mixed, self.taken = list(self.tokens), [[]], [], 0
            self.allocate()
        return out

    def may_rollback(self, columns: int, counted: bool) -> bool:
        since = len(self.passes[0])
        padded = any(self.mixed[max(since - columns, 0) :])
        left = min(self.config.window_size, *(n + self.taken for n in self.prompts)) - 1 - self.taken
        return not (padded and not counted) and (columns <= since or (not counted and columns <= since + left))

    def real(self, columns: int) -> list[int]:
        return [sum(row[len(row) - columns :]) for row in self.passes]

    def rollback(self, columns: int) -> None:
        since = len(self.passes[0])
        into = max(columns - since, 0)
        for b, row in enumerate(self.passes):
            number = sum(row[len(row) - columns :]) if not into else sum(row) + into
            del row[max(since - columns, 0) :], self.shown[b][self.seen - columns :]
            for s in (s for heads in self.segments[b] for s in heads):
                del s.positions[len(s.positions) - number :], s.keys[len(s.keys) - number :]
                s.kept -= into
            self.tokens[b] -= number
            self.prompts[b] -= into
        del self.mixed[max(since - columns, 0) :]
        self.taken += into
        self.seen -= columns

    def pick(self, sequences: list[int]) -> None:
        self.segments = [copy.deepcopy(self.segments[b]) for b in sequences]
        self.passes = [list(self.passes[b]) for b in sequences]
        self.shown = [list(self.shown[b]) for b in sequences]
        self.prompts = [self.prompts[b] for b in sequences]
        self.tokens = [self.tokens[b] for b in sequences]
        self.allocate()


def run(
    cache: RaggedCache, plain: Plain, lengths: list[int], tokens: int, dice: torch.Generator, compress=False
) -> None:
    """One pass of `tokens` columns, of which the last `lengths` are real, through both."""
    batch, model = len(lengths), plain.model
    query = torch.randn(model.num_layers, batch, model.q_heads, tokens, DIM, generator=dice)
    key = torch.randn(model.num_layers, batch, model.kv_heads, tokens, DIM, generator=dice)
    real = torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]
    past = torch.tensor(plain.shown, dtype=torch.bool).view(batch, plain.seen)
    mask = torch.cat([past, real], 1).long()
    cache.compress_next = compress
    cache.begin(tokens, batch, None if bool(mask.all()) else mask, torch.device("cpu"))
    filled = cache.layers[0].is_initialized
    outputs = []
    for layer, q, k in zip(cache.layers, query, key, strict=True):
        layer.update(k, 2 * k)
        outputs.append((layer.extend if filled else layer.fill)(q, k, 2 * k, SCALING, layer.step))
    if not filled:
        plain.prompt(query, key, lengths)
        return
    wanted = plain.extend(query, key, lengths, compress)
    shown = real[None, :, None, :, None]
    torch.testing.assert_close((torch.stack(outputs).double() * shown), wanted, atol=1e-5, rtol=1e-5)


def check(cache: RaggedCache, plain: Plain) -> None:
    report = cache.report()
    kept = [
        [[s.kept for s in plain.segments[b][i]] for b in range(len(plain.prompts))] for i in range(len(cache.layers))
    ]
    assert report["kept_per_head"].tolist() == cache.kept_per_head().tolist() == kept
    assert report["kept_tokens"] == pytest.approx(np.mean(kept))
    assert report["prompt_tokens"] == pytest.approx(np.mean(plain.prompts))
    heads = len(cache.layers) * plain.model.kv_heads
    held = sum(len(s.keys) for layers in plain.segments for row in layers for s in row)
    assert report["kv_bytes_used"] == held * ROW
    assert report["kv_bytes_full"] == sum(plain.tokens) * heads * ROW
    assert report["kv_bytes_allocated"] == plain.allocated * ROW
    assert cache.headroom_left == plain.room - len(plain.passes[0])
    assert cache.get_seq_length() == plain.seen
    cache.check_overflow()
    for i, layer in enumerate(cache.layers):
        positions = cache.kept_positions(i)
        for b, layers in enumerate(plain.segments):
            for h, s in enumerate(layers[i]):
                rows = slice(int(layer.start[b, h]), int(layer.start[b, h] + layer.length[b, h]))
                assert torch.equal(layer.keys[rows], torch.stack(s.keys)), (i, b, h)
                assert torch.equal(layer.values[rows], 2 * torch.stack(s.keys))
                assert positions[b][h].tolist() == s.positions[: s.kept]


@settings(max_examples=150, derandomize=True, deadline=None)
@given(st.data())
def test_any_conversation(data: st.DataObject) -> None:
    kv_heads, layers = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    model = Model(layers, kv_heads * data.draw(st.integers(1, 2)), kv_heads)
    window = data.draw(st.integers(1, 5))
    config = CompressionConfig(
        method=data.draw(st.sampled_from(["snapkv", "sparsemm", "local_window", "adakv", "pyramidkv", "fullkv"])),
        budget=window + data.draw(st.integers(1, 8)),
        window_size=window,
        kernel_size=3,
        redistribute=data.draw(st.booleans()),
        beta=2,
        floor_ratio=0.5,
    )
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    table = np.random.default_rng(1).random((layers, model.q_heads)) if config.method == "sparsemm" else None
    room = data.draw(st.integers(1, 6))
    cache, plain = RaggedCache(build_method(config, model, table), room), Plain(config, model, table, room)
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=1, max_size=2))
    run(cache, plain, lengths, max(lengths), dice)
    check(cache, plain)
    twin = None
    kinds = ["turn", "padded turn", "take back", "count back", "pick", "again", "take back", "again", "repeat", "copy"]
    for what in data.draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=9)):
        batch = len(plain.prompts)
        if what == "again" and batch > 1:
            what = "turn"
        if what in ("turn", "again"):
            tokens = data.draw(st.integers(1, 7))
            run(cache, plain, [tokens] * batch, tokens, dice, compress=what == "again")
        elif what == "padded turn":
            counts = data.draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch))
            run(cache, plain, counts, max(counts) + data.draw(st.integers(0, 1)), dice)
        elif what in ("take back", "count back"):
            counted = what == "count back"
            columns = data.draw(st.integers(1, len(plain.passes[0]) + 3))
            counts = (
                torch.tensor(plain.real(min(columns, len(plain.passes[0]))), dtype=torch.int32) if counted else None
            )
            if plain.may_rollback(columns, counted):
                cache.rollback(columns, counts)
                plain.rollback(columns)
            else:
                with pytest.raises(ValueError, match="cannot be rolled back"):
                    cache.rollback(columns, counts)
        elif what == "repeat":
            cache.batch_repeat_interleave(2)
            plain.pick([b for b in range(batch) for _ in range(2)])
            cache.batch_select_indices(torch.arange(2 * batch)[:3])
            plain.pick(list(range(2 * batch))[:3])
        elif what == "pick":
            chosen = data.draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=batch))
            cache.batch_select_indices(torch.tensor(chosen))
            plain.pick(chosen)
        else:
            twin = copy.deepcopy(cache), copy.deepcopy(plain)
        check(cache, plain)
    if twin is not None:  # what came later did not touch the copy, which goes on by itself
        check(*twin)
        run(*twin, [2] * len(twin[1].prompts), 2, dice)
        check(*twin)


@pytest.mark.parametrize(
    "steps",
    [
        [("padded", 3), ("again", 2), ("turn", 1), ("back", 1)],
        [("turn", 2), ("padded", 3), ("count", 4), ("turn", 3), ("back", 3)],
        [("padded", 1), ("padded", 1), ("turn", 1), ("back", 1), ("refused", 2), ("count", 2), ("refused", 2)],
        [("back", 1), ("back", 1), ("back", 1), ("refused", 1), ("again", 2), ("back", 3), ("refused", 1)],
        [("turn", 2), ("back", 4), ("turn", 1), ("refused", 3), ("back", 2), ("refused", 1)],
    ],
    ids=["compressed again", "padding went", "padding stayed", "window", "into the window"],
)
def test_what_may_be_taken_back(steps: list[tuple[str, int]]) -> None:
    """A window of 4 gives up 3 tokens between two compressions; "padded" is a turn behind one column of padding."""
    config = CompressionConfig(method="snapkv", budget=7, window_size=4)
    cache = RaggedCache(build_method(config, Model(1, 1, 1)), 20)
    plain, dice = Plain(config, cache.method.model, None, 20), torch.Generator().manual_seed(0)
    run(cache, plain, [12], 12, dice)
    for what, columns in steps:
        if what in ("turn", "padded", "again"):
            run(cache, plain, [columns], columns + (what == "padded"), dice, compress=what == "again")
        elif what == "refused":
            with pytest.raises(ValueError, match="cannot be rolled back"):
                cache.rollback(columns)
            assert not plain.may_rollback(columns, False)
        else:
            counted = what == "count"
            cache.rollback(columns, torch.tensor(plain.real(columns), dtype=torch.int32) if counted else None)
            plain.rollback(columns)
        check(cache, plain)


def test_the_room_doubles() -> None:
    """So that a long answer costs few copies; a prompt that needs more gets just that."""
    config = CompressionConfig(method="snapkv", budget=6, window_size=2)
    cache = RaggedCache(build_method(config, Model(1, 1, 1)), 2)
    plain = Plain(config, cache.method.model, None, 2)
    dice = torch.Generator().manual_seed(0)
    run(cache, plain, [9], 9, dice)
    rooms = []
    for tokens in (1, 1, 1, 1, 1, 1, 20, 1):
        run(cache, plain, [tokens], tokens, dice)
        rooms.append(cache.layers[0].headroom)
    assert rooms == [2, 2, 4, 4, 8, 8, 26, 52]
    assert cache.report()["kv_bytes_allocated"] == (6 + 52) * ROW
