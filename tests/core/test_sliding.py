"""Random lives of layers with sliding windows and chunks, beside lists of all tokens of each sequence."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sparsemm_lmms import CompressionConfig, RaggedCache, sliding
from sparsemm_lmms.attention import ragged_attention
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method

Q_HEADS, KV_HEADS, DIM, SCALE, SLACK = 4, 2, 4, 0.5, 5
SIZES = (6, 7)  # of a window, and of a chunk
MODULE = SimpleNamespace(num_key_value_groups=Q_HEADS // KV_HEADS, is_causal=True)


class Pair:
    def __init__(self, seed: int) -> None:
        config = CompressionConfig(method="fullkv", window_size=SLACK)
        stock = [*map(DynamicSlidingWindowLayer, SIZES), DynamicLayer()]
        method = build_method(config, Model(1, Q_HEADS, KV_HEADS))
        self.cache = RaggedCache(method, 3, stock, chunked={1})
        self.dice = torch.Generator().manual_seed(seed)
        self.tokens: list[list[torch.Tensor]] = []  # [sequence] -> real tokens, each [2, layers, kv_heads, dim]
        self.mask = torch.zeros(0, 0, dtype=torch.long)

    def forward(self, counts: list[int], columns: int) -> None:
        """One pass of `columns` columns, of which the last `counts[b]` are real."""
        first, batch = not self.tokens, len(counts)
        new = torch.arange(columns) >= columns - torch.tensor(counts)[:, None]
        self.mask = torch.cat([torch.zeros(batch, 0, dtype=torch.long) if first else self.mask, new.long()], 1)
        self.cache.begin(columns, batch, self.mask if columns > 1 else None, torch.device("cpu"))
        query = torch.randn(2, batch, Q_HEADS, columns, DIM, generator=self.dice)
        new = torch.randn(2, 3, batch, KV_HEADS, columns, DIM, generator=self.dice)
        outputs = []
        for i in range(2):
            key, value = self.cache.update(*new[:, i], i)
            if not first:
                outputs.append(ragged_attention("sdpa", MODULE, query[i], key, value, None, SCALE)[0].transpose(1, 2))
        full = self.cache.layers[2]
        self.cache.update(*new[:, 2], 2)
        (full.extend if full.is_initialized else full.fill)(query[0], *new[:, 2], SCALE, full.step)
        self.tokens = [[] for _ in counts] if first else self.tokens
        for b, count in enumerate(counts):
            for j in range(columns - count, columns):
                self.tokens[b].append(new[:, :, b, :, j])
                for i, output in enumerate(outputs):
                    torch.testing.assert_close(output[b, :, j], self.slow(b, i, query[i, b, :, j]))

    def slow(self, b: int, i: int, query: torch.Tensor) -> torch.Tensor:
        """What the newest token of a sequence attends to in a layer, `[q_heads, dim]`."""
        seen, size = len(self.tokens[b]), SIZES[i]
        first = (seen - 1) // size * size if i == 1 else max(seen - size, 0)
        keys, values = torch.stack(self.tokens[b][first:], 3)[:, i].repeat_interleave(Q_HEADS // KV_HEADS, 1)
        return ((keys @ query[..., None] * SCALE).softmax(1) * values).sum(1)

    def rollback(self, columns: int) -> None:
        real = self.mask[:, self.mask.shape[1] - columns :].sum(1)
        counts = None if (real == columns).all() else real.int()
        known = self.cache.full_layers[0]
        try:
            self.cache.rollback(columns, counts)
        except ValueError as error:
            assert columns > SLACK or "of its window are left" in str(error) or known.appended < columns
            return
        self.mask = self.mask[:, : self.mask.shape[1] - columns]
        for tokens, count in zip(self.tokens, real.tolist(), strict=True):
            del tokens[len(tokens) - count :]

    def pick(self, sequences: list[int]) -> None:
        self.cache.reorder_cache(torch.tensor(sequences))
        self.tokens, self.mask = [list(self.tokens[b]) for b in sequences], self.mask[sequences]

    def check(self) -> None:
        assert {layer.get_seq_length() for layer in self.cache.layers} == {self.mask.shape[1]}
        for layer, size in zip(self.cache.layers[:2], SIZES, strict=True):
            rows = size - 1
            for b, tokens in enumerate(self.tokens):
                newest, end = tokens[-rows:], layer.window.end
                for part, x in enumerate((layer.keys, layer.values)):
                    want = torch.stack([token[part, self.cache.layers.index(layer)] for token in newest], 1)
                    assert torch.equal(x[b, :, end - len(newest) : end], want)
            assert layer.used_bytes == sum(min(len(x), rows) for x in self.tokens) * KV_HEADS * DIM * 2 * 4


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_life_is_that_of_the_lists(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sliding, "SLACK", 2)
        patch.setattr(sliding, "SHIFT", 4)
        pair = Pair(data.draw(st.integers(0, 10**6), label="seed"))
        batch = data.draw(st.integers(1, 3), label="batch")
        lengths = data.draw(st.lists(st.integers(1, 16), min_size=batch, max_size=batch), label="prompts")
        pair.forward(lengths, max(lengths))
        for _ in range(data.draw(st.integers(0, 9), label="passes")):
            pair.check()
            batch = len(pair.tokens)
            kinds = ["one", "one", "append", "padded", "back", "pick", "reserve"]
            kind = data.draw(st.sampled_from(kinds), label="kind")
            if kind == "one":
                for _ in range(data.draw(st.integers(1, 9), label="steps")):
                    pair.forward([1] * batch, 1)
            elif kind == "append":
                tokens = data.draw(st.integers(2, 15), label="tokens")
                pair.forward([tokens] * batch, tokens)
            elif kind == "padded":
                counts = data.draw(st.lists(st.integers(1, 9), min_size=batch, max_size=batch), label="counts")
                pair.forward(counts, max(counts))
            elif kind == "back":
                pair.rollback(data.draw(st.integers(1, 15), label="columns"))
            elif kind == "reserve":
                pair.cache.reserve(data.draw(st.integers(1, 9), label="room"))
                assert pair.cache.headroom_left >= 1
            else:
                rows = st.integers(0, batch - 1)
                pair.pick(data.draw(st.lists(rows, min_size=1, max_size=3), label="rows"))
        pair.check()


def test_masks_of_a_padded_pass() -> None:
    """One mask, as each stock attention takes it: places in the sequence count, padding sees itself alone."""
    window = sliding.SlidingWindow(4, False, 1, torch.device("cpu"), (3, 1), 3, 2, 8, "auto")
    window.begin((3, 1), 3)
    want = np.zeros((2, 3, 6), dtype=bool)
    want[0] = np.tri(3, 6, 3) * (1 - np.tri(3, 6, -1))
    want[1, 0, 3] = want[1, 1, 4] = True
    want[1, 2, [2, 5]] = True
    assert window.mask_for("sdpa", torch.float32)[:, 0].tolist() == want.tolist()
    eager = window.mask_for("eager", torch.float32)
    assert torch.equal(eager == 0, window.mask) and (eager[~window.mask] < -1e38).all()
    real = [[True] * 6, [False] * 2 + [True] + [False] * 2 + [True]]
    assert window.mask_for("flash_attention_2", torch.float32).tolist() == real
    window.begin((2, 2), 2)
    assert window.mask_for("flash_attention_2", torch.float32).tolist() == [[True] * 5, [False] + [True] * 4]
    window.begin((2, 2), 2)
    assert window.mask_for("flash_attention_2", torch.float32) is None
