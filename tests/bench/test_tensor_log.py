"""What the log of tensors counts: storages made inside the block, and no view of what was there before."""

from __future__ import annotations

import torch

from sparsemm_lmms.bench.tensor_log import TensorLog


@torch.no_grad()
def test_views_of_weights_are_no_tensors_of_the_block() -> None:
    weight, x = torch.randn(8, 4), torch.randn(2, 4)
    with TensorLog() as log:
        made = x @ weight.t().view(4, 8)
    assert made.shape == (2, 8) and log.peak == 2 * 8 * 4 and dict(log.sizes) == {64: 1}


@torch.no_grad()
def test_views_of_new_tensors_count_once_and_go() -> None:
    with TensorLog() as log:
        a = torch.zeros(16)
        b = a.view(4, 4).t()
        del a, b
        torch.zeros(8)
    assert log.peak == 64 and dict(log.sizes) == {64: 1, 32: 1}
