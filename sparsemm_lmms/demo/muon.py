"""Muon: momentum whose matrices are made orthogonal by a Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/).

torch.optim.Muon iterates in bfloat16, which costs seconds a step on CPUs without bfloat16 units; this one uses
float32 and treats matrices of one shape together.
"""  # noqa: E501

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly: [N, rows, columns] float32."""
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay; steps have the size of AdamW's at the same rate."""

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for shape, params in shapes.items():
                updates = []
                for p in params:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(state["momentum"], group["momentum"]))
                # 0.2 * sqrt(longer side) gives the root mean square of an AdamW step (arXiv:2502.16982).
                scale = 0.2 * max(shape) ** 0.5 * group["lr"]
                for p, update in zip(params, orthogonalised(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)
