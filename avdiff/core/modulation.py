"""Timestep modulation: one embedding MLP for the model, one small table for each block (ada-single,
PixArt-alpha).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Modulation(NamedTuple):
    """Shift, scale and gate, each broadcastable to (B, N, D)."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise x (B, N, D), then scale and shift it."""
        return torch.addcmul(self.shift.to(x.dtype), rms_norm(x), (1 + self.scale).to(x.dtype))


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm over the last axis without weights."""
    return F.rms_norm(x, x.shape[-1:])


def sinusoid(sigma: torch.Tensor, dim: int) -> torch.Tensor:
    """Noise levels (...,) in [0, 1] -> (..., dim) fp32 sines and cosines, scaled by 1000 as is the
    custom.
    """
    rates = torch.exp(
        -math.log(10000.0)
        * torch.arange(dim // 2, dtype=torch.float32, device=sigma.device)
        / (dim // 2)
    )
    angles = sigma.float()[..., None] * 1000.0 * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Noise level of one modality -> embedding, and `rows` modulation rows shared by all blocks.

    The row projection starts at zero, so at first each block is modulated by its own table alone.
    """

    def __init__(self, dim: int, rows: int, frequencies: int = 128) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.rows = rows
        self.linear_1 = nn.Linear(frequencies, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.to_rows = nn.Linear(dim, rows * dim)
        nn.init.zeros_(self.to_rows.weight)
        nn.init.zeros_(self.to_rows.bias)

    def forward(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """sigma (B,) or (B, N) -> embedding (B, 1|N, D) and rows (B, 1|N, rows, D)."""
        sigma = sigma[:, None] if sigma.ndim == 1 else sigma
        h = sinusoid(sigma, self.frequencies).to(self.linear_1.weight.dtype)
        embedding = self.linear_2(F.silu(self.linear_1(h)))
        rows = self.to_rows(F.silu(embedding))
        return embedding, rows.unflatten(-1, (self.rows, -1))


class ModulationTable(nn.Module):
    """A block's own learned offsets for `records` Modulations; shifts and scales start at 0, gates
    at `gate`.
    """

    def __init__(self, dim: int, records: int, gate: float = 1.0) -> None:
        super().__init__()
        start = torch.zeros(records, 3, dim)
        start[:, 2] = gate
        self.table = nn.Parameter(start.flatten(0, 1))

    def forward(self, rows: torch.Tensor) -> list[Modulation]:
        """rows (B, 1|N, 3 * records, D) from `TimestepEmbedding` -> one Modulation for each
        record.
        """
        shift_scale_gate = (self.table + rows).unbind(dim=-2)
        return [
            Modulation(*shift_scale_gate[i : i + 3]) for i in range(0, len(shift_scale_gate), 3)
        ]
