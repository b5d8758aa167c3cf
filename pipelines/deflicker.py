"""Flicker out of generated pictures: what hardly changes from frame to frame is averaged over time,
motion stays.
"""

from __future__ import annotations

import torch
from torch.nn.functional import avg_pool2d, interpolate, max_pool2d

REACH = 8  # frames to either side
SPREAD = 4.0  # of the weight over time, in frames
CELL = 4  # pixels a side whose mean tells flicker from motion


def smooth_flicker(video: torch.Tensor, deflicker_strength: float) -> torch.Tensor:
    """Bilateral filter over time (Tomasi and Manduchi, ICCV 1998): frames t and s share by
    exp(-(t-s)^2 / 2 SPREAD^2) exp(-d^2 / 2 deflicker_strength^2), d their difference around the
    pixel (RMS over colours, of 255). A change of three times `deflicker_strength` is motion and
    stays as it is.

    Args:
        video: (B, 3, F, H, W) in [-1, 1]. deflicker_strength: changes, of 255, that count as
            flicker; 0 returns the video.
    """
    batch, _, frames, height, width = video.shape
    if deflicker_strength <= 0 or frames == 1:
        return video
    own = video.transpose(1, 2).contiguous()  # (B, F, 3, H, W)
    coarse = avg_pool2d(own.flatten(0, 1), CELL, ceil_mode=True, count_include_pad=False)
    coarse = coarse.mul_(127.5 / deflicker_strength).unflatten(0, (batch, frames))
    total = own.clone()
    weights = torch.ones_like(own[:, :, :1])
    for k in range(1, min(REACH, frames - 1) + 1):
        distance = (coarse[:, k:] - coarse[:, :-k]).square_().mean(2, keepdim=True)
        distance = max_pool2d(
            distance.flatten(0, 1), 3, 1, 1
        )  # next to what moves, nothing is shared
        weight = distance.add_(k * k / SPREAD**2).mul_(-0.5).exp_()
        weight = interpolate(weight, (height, width), mode="bilinear").unflatten(
            0, (batch, frames - k)
        )
        total[:, k:].addcmul_(weight, own[:, :-k])
        total[:, :-k].addcmul_(weight, own[:, k:])
        weights[:, k:] += weight
        weights[:, :-k] += weight
    return total.div_(weights).transpose(1, 2)
