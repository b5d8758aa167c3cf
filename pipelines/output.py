"""What a pipeline call returns."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from diffusers.utils import BaseOutput


@dataclass
class AVPipelineOutput(BaseOutput):
    """Sound and picture of a batch of clips.

    Args:
        frames: list (one per clip) of lists of PIL images, or (B, F, H, W, 3) numpy in [0, 1], or
            (B, F, 3, H, W) torch in [0, 1], or packed latents (B, N_v, C_v); None when no video was
            asked for.
        audio: (B, channels, samples) fp32 in [-1, 1], or packed latents (B, N_a, C_a); None without
            sound.
        sampling_rate: Hz. frame_rate: exact.
    """

    frames: Any = None
    audio: torch.Tensor | None = None
    sampling_rate: int = 24000
    frame_rate: Fraction = Fraction(25)
