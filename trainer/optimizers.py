"""Optimizers of the training loop: AdamW, and Muon for what is trained from scratch.

Muon (K. Jordan et al., 2024; scaled as in arXiv 2502.16982, section 2.2) takes, in place of the gradient's momentum M,
the nearest orthogonal matrix U Vᵀ of M = U S Vᵀ, so that every direction of a weight learns as fast as the strongest
one. On the embedded world a small autoencoder came as far in 400 steps as with AdamW in 4000.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The quintic Newton-Schulz iteration that brings singular values of (0, 1] near 1 in five steps.
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Root mean square of AdamW's usual update: with it one learning rate serves both optimizers.
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.Optimizer):
    """For weights of two or more dimensions; a convolution (O, I, H, W) counts as a matrix (O, I H W).

    torch.optim.Muon takes matrices only, and most of an autoencoder is convolutions.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float = 1e-3, momentum: float = 0.95, weight_decay: float = 0.01
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                # Nesterov's: as if the momentum had already taken the next step.
                update = orthogonalised(weight.grad.lerp(momentum, group["momentum"]).flatten(1))
                scale = ROOT_MEAN_SQUARE * max(update.shape) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix (M, N) with all its singular values brought to about 1 (0.7 to 1.2)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    first, third, fifth = QUINTIC
    for _ in range(STEPS):
        square = wide @ wide.T
        wide = first * wide + (third * square + fifth * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimizers_of(groups: list[dict[str, Any]], rate: float) -> list[torch.optim.Optimizer]:
    """An optimizer for the groups marked `orthogonal`, if any are, and AdamW for the others."""
    marked = [{k: v for k, v in group.items() if k != "orthogonal"} for group in groups if group.get("orthogonal")]
    others = [{k: v for k, v in group.items() if k != "orthogonal"} for group in groups if not group.get("orthogonal")]
    made: list[torch.optim.Optimizer] = []
    if any(group["params"] for group in marked):
        made.append(Muon(marked, lr=rate))
    if any(group["params"] for group in others):
        made.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.99), fused=True))
    return made
