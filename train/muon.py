"""Muon for convolution kernels, AdamW for the rest: more progress a step for networks that train for an hour.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, found by five
Newton-Schulz steps with the coefficients of the reference implementation; a kernel counts as an (out, in * k * k)
matrix. Updates are scaled by 0.2 sqrt(max(rows, columns)) to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982,
eq. 4), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


class MuonAdam(torch.optim.Optimizer):
    """Groups with `muon=True` get orthogonalised momentum, the others AdamW."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.01,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "muon": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        if closure is not None:
            raise ValueError("closure: this optimizer takes gradients as they are; needs None")
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    update(p, p.grad, group)

    def _muon(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(grad, 1 - MOMENTUM)
        direction = orthogonal(grad.lerp(state["m"], MOMENTUM).flatten(1))  # Nesterov's look ahead
        p.add_(direction.view(p.shape), alpha=-group["lr"] * 0.2 * max(direction.shape) ** 0.5)

    def _adam(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (slow, fast) = self.state[p], group["betas"]
        if not state:
            state.update(m=torch.zeros_like(p), v=torch.zeros_like(p), n=torch.zeros(()))
        state["n"] += 1
        count = state["n"].item()
        state["m"].lerp_(grad, 1 - slow)
        state["v"].mul_(fast).addcmul_(grad, grad, value=1 - fast)
        size = (state["v"] / (1 - fast**count)).sqrt_().add_(group["eps"])
        p.addcdiv_(state["m"], size, value=-group["lr"] / (1 - slow**count))


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrix with singular values near 1 (0.7 to 1.2): (m, n) -> (m, n) fp32, computed in bf16."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


def muon_groups(modules: Mapping[str, nn.Module], ends: tuple[str, ...]) -> list[dict[str, Any]]:
    """Trainable parameters in three groups: inner kernels for Muon, kernels named like one of `ends`, and vectors.

    The layers at the ends (pixels, latents) do better under AdamW, as embeddings and heads of language models do.
    """
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for module in modules.values():
        for name, p in module.named_parameters():
            if p.requires_grad:
                (vectors if p.ndim < 2 else outer if any(end in name for end in ends) else inner).append(p)
    groups: list[dict[str, Any]] = [
        {"params": inner, "muon": True},
        {"params": outer},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
