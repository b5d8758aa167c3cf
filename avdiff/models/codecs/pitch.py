"""A pitch axis in octaves and the smooth path through scores on it: shared by pitch tracking and
the vocoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# 55 Hz to 518 Hz in steps of 1.2 %
LOWEST = 55.0
BINS = 192
BINS_PER_OCTAVE = 59.0


def bin_hertz(position: Tensor) -> Tensor:
    """Position on the axis, 0 to BINS - 1, fractions allowed -> Hz."""
    return LOWEST * 2.0 ** (position / BINS_PER_OCTAVE)


def hertz_bin(hertz: Tensor) -> Tensor:
    """Inverse of `bin_hertz`, limited to the axis."""
    return ((hertz / LOWEST).log2() * BINS_PER_OCTAVE).clamp(0, BINS - 1)


def smooth_path(score: Tensor, reach: int, glide: float) -> Tensor:
    """Viterbi path through scores (N, T, BINS), maximising their sum less `glide` per octave moved
    -> bin (N, T).

    A path moves at most `reach` bins a frame.
    """
    steps, bins = score.shape[1:]
    cost = (
        glide / BINS_PER_OCTAVE * (torch.arange(2 * reach + 1, device=score.device) - reach).abs()
    )
    best = score[:, 0]
    back = []
    for t in range(1, steps):
        near = (
            F.pad(best, (reach, reach), value=-1e9).unfold(1, 2 * reach + 1, 1) - cost
        )  # (N, BINS, 2 reach + 1)
        value, move = near.max(dim=2)
        back.append(move - reach)
        best = value + score[:, t]
    path = [best.argmax(dim=1)]
    for move in reversed(back):
        path.append((path[-1] + move.gather(1, path[-1][:, None])[:, 0]).clamp(0, bins - 1))
    return torch.stack(path[::-1], dim=1)
