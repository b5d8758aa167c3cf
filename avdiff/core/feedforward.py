"""SwiGLU feed-forward (Shazeer 2020, arXiv:2002.05202), without biases."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """(B, N, dim) -> (B, N, dim): W_out(silu(W_gate x) * W_up x); gate and up are one matrix
    product.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, 2 * hidden, bias=False)
        self.proj_out = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.proj_in(x).chunk(2, dim=-1)
        if torch.is_grad_enabled():
            return self.proj_out(F.silu(gate) * up)
        return self.proj_out(F.silu(gate).mul_(up))  # the same numbers, one large buffer less
