"""Random lives of a cache, beside a slow model that keeps every token of every head in Python lists.

Appends with and without padding, rolling back, choosing, copying and reordering sequences, reserving room and
compressing again come in any order; after each, the rows that the heads hold, their positions and what attention makes
of them must be those of the lists.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemm_lmms import CompressionConfig, RaggedCache
from sparsemm_lmms.budgets import sparsemm_capacities, visual_shares
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method

from ..kernels import naive

LAYERS, Q_HEADS, KV_HEADS, DIM, WINDOW, BUDGET, SCALE = 2, 4, 2, 4, 4, 9, 0.5
SCORES = np.array([[5.0, 1.0, 0.0, 0.5], [0.2, 0.1, 2.0, 2.0]])


class Pair:
    """A cache and, for each sequence, its real tokens (`[layer, head]` keys and values) and the ids each head holds."""

    def __init__(self, method: str, seed: int) -> None:
        config = CompressionConfig(method=method, budget=BUDGET, window_size=WINDOW, kernel_size=3)
        scores = SCORES if method == "sparsemm" else None
        self.method = build_method(config, Model(LAYERS, Q_HEADS, KV_HEADS), scores)
        self.cache = RaggedCache(self.method, 3)
        self.dice = torch.Generator().manual_seed(seed)
        self.tokens: list[list[torch.Tensor]] = []  # [sequence] -> tokens, each [2, layers, kv_heads, dim]
        self.held: list[list[list[list[int]]]] = []  # [sequence][layer][head] -> ids
        self.prompt: list[int] = []  # tokens that the last compression saw, of each sequence
        self.passes: list[list[int]] = []  # real tokens of each column since, newest last: [column][sequence]
        self.padded: list[bool] = []  # whether the pass of a column brought padding
        self.taken = 0
        self.columns = 0

    def forward(self, counts: list[int], columns: int, again: bool = False) -> None:
        """One pass of `columns` columns, of which the last `counts[b]` are real."""
        batch, first = len(counts), not self.held
        mask = torch.zeros(batch, self.columns + columns, dtype=torch.long)
        for b, count in enumerate(counts):
            past = 0 if first else len(self.tokens[b])
            mask[b, self.columns - past : self.columns] = 1  # where in the past does not matter, how many does
            mask[b, mask.shape[1] - count :] = 1
        self.cache.compress_next = again
        self.cache.begin(columns, batch, mask, torch.device("cpu"))
        query = torch.randn(LAYERS, batch, Q_HEADS, columns, DIM, generator=self.dice)
        new = torch.randn(2, LAYERS, batch, KV_HEADS, columns, DIM, generator=self.dice)
        if first:
            self.tokens, self.held = [[] for _ in counts], [[[[], []] for _ in range(LAYERS)] for _ in counts]
        outputs = []
        for i, layer in enumerate(self.cache.layers):
            layer.update(new[0, i], new[1, i])
            run = layer.extend if layer.is_initialized else layer.fill
            outputs.append(run(query[i], new[0, i], new[1, i], SCALE, layer.step))
        for b, count in enumerate(counts):
            ids = range(len(self.tokens[b]), len(self.tokens[b]) + count)
            self.tokens[b].extend(new[:, :, b, :, columns - count + j] for j in range(count))
            for heads in self.held[b]:
                for head in heads:
                    head.extend(ids)
        if not first:
            self._check_outputs(outputs, query, counts, columns)
        self.columns += columns
        if first or again:
            for b, count in enumerate(counts):
                self._compress(b, query[:, b, :, columns - count :])
            self.prompt = [len(tokens) for tokens in self.tokens]
            self.passes, self.padded, self.taken = [], [], 0
        else:
            self.passes += [[int(columns - c <= j) for c in counts] for j in range(columns)]
            self.padded += [min(counts) < columns] * columns

    def _rows(self, b: int, layer: int, head: int, part: int) -> torch.Tensor:
        return torch.stack([self.tokens[b][i][part, layer, head] for i in self.held[b][layer][head]])

    def _check_outputs(self, outputs: list[torch.Tensor], query: torch.Tensor, counts: list[int], columns: int) -> None:
        for b, count in enumerate(counts):
            for i in range(LAYERS):
                for q in range(Q_HEADS):
                    head = q * KV_HEADS // Q_HEADS
                    keys, values = (self._rows(b, i, head, part) for part in (0, 1))
                    for j in range(count):
                        visible = len(keys) - (count - 1 - j)
                        logits = keys[:visible] @ query[i, b, q, columns - count + j] * SCALE
                        want = logits.softmax(0) @ values[:visible]
                        torch.testing.assert_close(outputs[i][b, q, columns - count + j], want, rtol=1e-4, atol=1e-5)

    def _compress(self, b: int, query: torch.Tensor) -> None:
        """SnapKV's rule with this method's counts, from the lists."""
        seen = len(self.tokens[b])
        if not self.method.compresses or seen < BUDGET:
            return
        for i in range(LAYERS):
            for head in range(KV_HEADS):
                ids = self.held[b][i][head]
                window = min(WINDOW, len(ids))
                share = self._share(i, head)
                keep = max(min(share, seen - window, len(ids) - window), 0)
                if self.method.config.method == "local_window":
                    best = list(range(len(ids) - window))
                else:
                    group = slice(head * Q_HEADS // KV_HEADS, (head + 1) * Q_HEADS // KV_HEADS)
                    judges = query[i, group][None, :, -WINDOW:]
                    keys = self._rows(b, i, head, 0)[None, None]
                    scores = naive.window_score(judges, keys, SCALE, 3, "avgpool", "mean")[0, 0, : len(ids) - window]
                    best = torch.argsort(scores, stable=True).tolist()
                chosen = sorted(best[len(best) - keep :])
                self.held[b][i][head] = [ids[j] for j in [*chosen, *range(len(ids) - window, len(ids))]]

    def _share(self, layer: int, head: int) -> int:
        if self.method.config.method != "sparsemm":
            return BUDGET - WINDOW
        return int(sparsemm_capacities(visual_shares(SCORES, KV_HEADS), BUDGET - WINDOW, 0.1)[layer, head])

    def rollback(self, columns: int) -> None:
        """The newest `columns` columns, with counts where some were padding."""
        batch = len(self.tokens)
        inside = self.passes[max(len(self.passes) - columns, 0) :]
        into = max(columns - len(self.passes), 0)
        real = [sum(column[b] for column in inside) + into for b in range(batch)]
        padded = any(self.padded[len(self.passes) - len(inside) :])
        left = min(WINDOW, *(p + self.taken for p in self.prompt)) - 1 - self.taken
        if into > left or (into and padded):
            with pytest.raises(ValueError, match="cannot be rolled back"):
                self.cache.rollback(columns, torch.tensor(real, dtype=torch.int32) if padded else None)
            return
        if padded:
            with pytest.raises(ValueError, match="without counts"):
                self.cache.rollback(columns)
        self.cache.rollback(columns, torch.tensor(real, dtype=torch.int32) if padded else None)
        for b, count in enumerate(real):
            size = len(self.tokens[b]) - count
            del self.tokens[b][size:]
            self.held[b] = [[[i for i in head if i < size] for head in heads] for heads in self.held[b]]
        del self.padded[len(self.passes) - len(inside) :]
        del self.passes[len(self.passes) - len(inside) :]
        self.prompt = [p - into for p in self.prompt]
        self.taken += into
        self.columns -= columns

    def pick(self, sequences: list[int], how: str) -> None:
        index = torch.tensor(sequences)
        if how == "reorder":
            self.cache.reorder_cache(index)
        else:
            self.cache.batch_select_indices(index)
        self._copy(sequences)

    def repeat(self, times: int) -> None:
        self.cache.batch_repeat_interleave(times)
        self._copy([b for b in range(len(self.tokens)) for _ in range(times)])

    def _copy(self, sequences: list[int]) -> None:
        self.tokens = [list(self.tokens[b]) for b in sequences]
        self.held = [[[list(head) for head in heads] for heads in self.held[b]] for b in sequences]
        self.prompt = [self.prompt[b] for b in sequences]
        self.passes = [[column[b] for b in sequences] for column in self.passes]

    def check(self) -> None:
        assert self.cache.get_seq_length() == self.columns
        self.cache.check_overflow()
        for i, layer in enumerate(self.cache.layers):
            positions = self.cache.kept_positions(i)
            assert layer.prompt_lengths == tuple(self.prompt)
            for b in range(len(self.tokens)):
                for head in range(KV_HEADS):
                    ids, start = self.held[b][i][head], int(layer.start[b, head])
                    end = start + int(layer.length[b, head])
                    assert torch.equal(layer.keys[start:end], self._rows(b, i, head, 0))
                    assert torch.equal(layer.values[start:end], self._rows(b, i, head, 1))
                    assert positions[b][head].tolist() == [t for t in ids if t < self.prompt[b]]
        report, row = self.cache.report(), 2 * DIM * 4
        held = sum(len(head) for sequence in self.held for heads in sequence for head in heads)
        whole = sum(len(tokens) for tokens in self.tokens) * LAYERS * KV_HEADS
        assert (report["kv_bytes_used"], report["kv_bytes_full"]) == (held * row, whole * row)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
@pytest.mark.parametrize("method", ["sparsemm", "snapkv", "local_window", "fullkv"])
def test_any_life_of_a_cache_is_that_of_the_lists(method: str, data: st.DataObject) -> None:
    pair = Pair(method, data.draw(st.integers(0, 10**6), label="seed"))
    batch = data.draw(st.integers(1, 3), label="batch")
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=batch, max_size=batch), label="prompts")
    pair.forward(lengths, max(lengths))
    pair.check()
    for _ in range(data.draw(st.integers(0, 8), label="steps")):
        batch = len(pair.tokens)
        kinds = ["append", "padded", "back", "select", "reorder", "repeat", "reserve"]
        kind = data.draw(st.sampled_from([*kinds, *(["again"] * 3 if batch == 1 else [])]), label="kind")
        if kind in ("append", "again"):
            tokens = data.draw(st.integers(1, 6), label="tokens")
            pair.forward([tokens] * batch, tokens, again=kind == "again")
        elif kind == "padded":
            counts = data.draw(st.lists(st.integers(1, 5), min_size=batch, max_size=batch), label="counts")
            pair.forward(counts, max(counts))
        elif kind == "back":
            pair.rollback(data.draw(st.integers(1, 6), label="columns"))
        elif kind == "reserve":
            pair.cache.reserve(data.draw(st.integers(1, 9), label="room"))
        elif kind == "repeat":
            pair.repeat(2 if batch < 3 else 1)
        else:
            rows = st.integers(0, batch - 1)
            pair.pick(data.draw(st.lists(rows, min_size=1, max_size=3), label="rows"), kind)
        pair.check()
