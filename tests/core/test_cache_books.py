"""What a cache counts after rolling back and compressing again: the same in every layer, and of real tokens only."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sparsemm_lmms import CompressionConfig, RaggedCache
from sparsemm_lmms.methods import Model
from sparsemm_lmms.selection import build_method

DIM = 4


class Driver:
    def __init__(self, method: str, layers: int = 1, scores: np.ndarray | None = None, **settings) -> None:
        config = CompressionConfig(method=method, window_size=8, **settings)
        self.cache = RaggedCache(build_method(config, Model(layers, 1, 1), scores), 40)
        self.dice = torch.Generator().manual_seed(0)

    def put(self, tokens: int, batch: int = 1, mask: torch.Tensor | None = None) -> torch.Tensor:
        self.cache.begin(tokens, batch, mask, torch.device("cpu"))
        for layer in self.cache.layers:
            x = torch.randn(batch, 1, tokens, DIM, generator=self.dice)
            layer.update(x, x)
            (layer.extend if layer.is_initialized else layer.fill)(x, x, x, 0.5, layer.step)
        return x


def test_a_window_is_taken_back_once() -> None:
    driver = Driver("snapkv", budget=11)
    driver.put(30)
    cache, layer = driver.cache, driver.cache.layers[0]
    cache.rollback(4)
    assert (layer.length.tolist(), layer.kept.tolist(), layer.prompt_lengths) == ([[7]], [[7]], (26,))
    with pytest.raises(ValueError, match="4 tokens cannot be rolled back: 0 came .* 3 of its window are left"):
        cache.rollback(4)
    cache.rollback(3)
    assert (layer.length.tolist(), layer.prompt_lengths, layer.columns) == ([[4]], (23,), 23)


def test_a_short_prompt_keeps_its_first_token() -> None:
    driver = Driver("snapkv", budget=11)
    driver.put(5)
    driver.cache.rollback(3)
    with pytest.raises(ValueError, match="1 of its window are left"):
        driver.cache.rollback(2)
    driver.cache.rollback(1)
    assert driver.cache.layers[0].length.tolist() == [[1]]


def test_padding_is_not_taken_back_blindly() -> None:
    driver = Driver("snapkv", budget=11)
    driver.put(9, 2)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:13] = 0
    driver.put(5, 2, mask)
    driver.put(1, 2)
    with pytest.raises(ValueError, match="without counts: only the newest 1"):
        driver.cache.rollback(2)
    driver.cache.rollback(1)
    driver.cache.rollback(5, torch.tensor([5, 1], dtype=torch.int32))
    assert driver.cache.layers[0].length.tolist() == [[9], [9]] and driver.cache.layers[0].appended == 0


def test_compressing_again_after_padding_keeps_real_tokens() -> None:
    driver = Driver("local_window", budget=11)
    first = driver.put(9, 2)
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, 9:13] = 0
    second = driver.put(5, 2, mask)  # one real token of 5 in the second row
    driver.cache.batch_select_indices(torch.tensor([1]))
    driver.cache.compress_next = True
    with pytest.raises(ValueError, match=r"shows \[14\] tokens of the earlier passes, which brought \[10\]"):
        driver.put(3, 1, torch.ones(1, 17, dtype=torch.long))
    driver.cache.compress_next = True
    third = driver.put(3, 1, torch.cat([mask[1:], torch.ones(1, 3, dtype=torch.long)], 1))
    layer = driver.cache.layers[0]
    real = torch.cat([first[1, 0], second[1, 0, -1:], third[0, 0]])
    start, length = int(layer.start[0, 0]), int(layer.length[0, 0])
    assert torch.equal(layer.keys[start : start + length], real[-11:])
    assert layer.prompt_lengths == (13,) and driver.cache.kept_positions(0)[0][0].tolist() == list(range(2, 13))


def test_every_layer_tells_the_same_prompt() -> None:
    scores = np.array([[1.0], [0.0]])
    driver = Driver("sparsemm", layers=2, scores=scores, budget=9, ratio=0.0)
    driver.put(30)
    for tokens in (20, 1):
        driver.cache.compress_next = True
        driver.put(tokens)
        driver.cache.rollback(1)
    books = {(layer.prompt_lengths, layer.appended, layer.columns) for layer in driver.cache.layers}
    assert books == {((49,), 0, 49)}
    assert driver.cache.report()["kv_bytes_full"] == 49 * 2 * 2 * DIM * 4
