"""Muon for the inner matrices, AdamW for the rest: more progress a step for networks that train for
an hour.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest orthogonal matrix, found
by five Newton-Schulz steps with the coefficients of the reference implementation; a convolution
kernel counts as an (out, in * k * k) matrix, the weights of E experts (E, out, in) as E matrices.
Matrices of one shape are worked on together; with several processes each works on its share and
sends it to the others. Updates are scaled by 0.2 sqrt(max(rows, columns)) to the size of AdamW's
(Liu et al. 2025, arXiv:2502.16982, eq. 4), so that one learning rate serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
        super().__init__(
            groups,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps, "muon": False},
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not supported."""
        if closure is not None:
            raise ValueError("closure: this optimizer takes gradients as they are; needs None")
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                p.mul_(1 - group["lr"] * group["weight_decay"])
            if group["muon"]:
                self._muon(trained, group["lr"])
            else:
                for p in trained:
                    self._adam(p, p.grad, group)

    def _muon(self, params: list[Tensor], lr: float) -> None:
        ahead = [self._look_ahead(p) for p in params]
        for p, direction in zip(params, directions(ahead), strict=True):
            p.add_(direction.view(p.shape), alpha=-lr * 0.2 * max(direction.shape[-2:]) ** 0.5)

    def _look_ahead(self, p: Tensor) -> Tensor:
        """Nesterov's momentum of a parameter, as one matrix or a stack of them."""
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["m"] = torch.zeros_like(p)
        state["m"].lerp_(p.grad, 1 - MOMENTUM)
        ahead = p.grad.lerp(state["m"], MOMENTUM)
        return ahead if p.ndim == 3 else ahead.flatten(1)

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


def directions(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Orthogonal factors of matrices (m, n) and stacks of them (E, m, n), each bf16 in its own
    shape.

    Ranks take turns: the same matrices must be given on all of them.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, world_size = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
    )
    shares = [list(range(owner, len(matrices), world_size)) for owner in range(world_size)]
    found = dict(zip(shares[rank], _by_shape([matrices[i] for i in shares[rank]]), strict=True))
    for owner in range(world_size if world_size > 1 else 0):
        if shares[owner]:
            sizes = [matrices[i].numel() for i in shares[owner]]
            flat = matrices[0].new_empty(sum(sizes), dtype=torch.bfloat16)
            if owner == rank:
                torch.cat([found[i].flatten() for i in shares[owner]], out=flat)
            torch.distributed.broadcast(flat, owner)
            found |= {
                i: x.view_as(matrices[i])
                for i, x in zip(shares[owner], flat.split(sizes), strict=True)
            }
    return [found[i] for i in range(len(matrices))]


def _by_shape(matrices: Sequence[Tensor]) -> list[Tensor]:
    """`orthogonal` of each, computed for all matrices of one shape at once."""
    alike: dict[torch.Size, list[int]] = {}
    for i, x in enumerate(matrices):
        alike.setdefault(x.shape[-2:], []).append(i)
    result: list[Tensor] = [torch.empty(0)] * len(matrices)
    for members in alike.values():
        stacks = [matrices[i] if matrices[i].ndim == 3 else matrices[i][None] for i in members]
        parts = orthogonal(torch.cat(stacks)).split([len(s) for s in stacks])
        for i, part in zip(members, parts, strict=True):
            result[i] = part.view_as(matrices[i])
    return result


def orthogonal(matrix: Tensor) -> Tensor:
    """About the nearest matrices with singular values near 1 (0.7 to 1.2): (..., m, n) -> (..., m,
    n), in bf16.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def muon_groups(modules: Mapping[str, nn.Module], ends: tuple[str, ...]) -> list[dict[str, Any]]:
    """Trainable parameters in three groups: inner kernels for Muon, kernels named like one of
    `ends`, and vectors.

    The layers at the ends (pixels, latents) do better under AdamW, as embeddings and heads of
    language models do.
    """
    named = [
        (n, p)
        for module in modules.values()
        for n, p in module.named_parameters()
        if p.requires_grad
    ]
    inner = {id(p) for n, p in named if p.ndim > 1 and not any(end in n for end in ends)}
    return muon_split(inner, {"params": [p for _, p in named]})


def muon_split(inner: Collection[int], group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A group of parameters in up to three: those whose id is in `inner` for Muon, other matrices,
    vectors.
    """
    kinds: dict[str, list[Tensor]] = {"inner": [], "outer": [], "vectors": []}
    for p in group["params"]:
        kinds["inner" if id(p) in inner else "outer" if p.ndim > 1 else "vectors"].append(p)
    extra: dict[str, dict[str, Any]] = {
        "inner": {"muon": True},
        "outer": {},
        "vectors": {"weight_decay": 0.0},
    }
    return [{**group, **extra[kind], "params": params} for kind, params in kinds.items() if params]


def inner_matrices(named: Iterable[tuple[str, nn.Parameter]]) -> set[int]:
    """ids of the matrices inside transformer blocks: not tables, embeddings, memories or the
    ends.
    """
    inside = (
        (n, p)
        for n, p in named
        if any(part in n for part in (".transformer_blocks.", ".attns.", ".ffs."))
    )
    return {
        id(p) for n, p in inside if p.ndim in (2, 3) and "table" not in n and ".memory" not in n
    }
