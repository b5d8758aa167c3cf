"""Noise levels of LTX-2: those that sampling walks, and those that training draws.

Sampling takes the folder's own scheduler. Training draws as ltx-trainer does
(`timestep_samplers.py`, ShiftedLogitNormalTimestepSampler): logit-normal, the more tokens the
noisier.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift
from diffusers.pipelines.ltx2.utils import DISTILLED_SIGMA_VALUES, STAGE_2_DISTILLED_SIGMA_VALUES
from torch import Tensor

from avdiff.schedulers.joint_flow_match import shift_time

DISTILLED = tuple(DISTILLED_SIGMA_VALUES)
DISTILLED_STAGE_2 = tuple(STAGE_2_DISTILLED_SIGMA_VALUES)
# The line through (1024 tokens, 0.95) and (4096 tokens, 2.05) gives the mean of the logit.
TOKENS = (1024, 4096)
SHIFTS = (0.95, 2.05)
QUANTILES = (-2.5758, 3.0902)  # normal quantiles of 0.5 % and 99.9 %, as the reference rounds them
MAX_TOKENS = 30720  # beyond it the stretch divides by almost nothing in fp32
FLOOR = 1e-3
UNIFORM_SHARE = 0.1


def is_distilled(scheduler: FlowMatchEulerDiscreteScheduler) -> bool:
    """Whether the folder is of a distilled model: no shift by token count and no terminal level."""
    config = scheduler.config
    return not config.use_dynamic_shifting and not config.shift_terminal


def sampling_levels(
    scheduler: FlowMatchEulerDiscreteScheduler,
    tokens: int,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """Falling fp32 noise levels (n,), the final 0 left out, as the folder's scheduler lays them
    out.

    Args:
        tokens: of the video, by which the levels are shifted. steps: n; a distilled folder has a
            list of eight of its own, which it takes if none is asked for. sigmas: own base levels.

    Raises:
        ValueError: a number of steps that this scheduler cannot walk.
    """
    config = scheduler.config
    if sigmas is None and steps is None and is_distilled(scheduler):
        sigmas = DISTILLED
    count = len(sigmas) if sigmas is not None else steps
    if count is None or count < 1 or (steps is not None and count != steps):
        raise ValueError(f"num_inference_steps={steps}: needs a whole number of at least 1")
    if count == 1 and config.shift_terminal:
        raise ValueError(
            f"num_inference_steps=1: this folder's scheduler stretches its levels to end at "
            f"{config.shift_terminal:g} and needs at least 2 steps"
        )
    own = copy.deepcopy(scheduler)
    base = np.linspace(1.0, 1 / count, count) if sigmas is None else np.asarray(sigmas)
    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", TOKENS[0]),
        config.get("max_image_seq_len", TOKENS[1]),
        config.get("base_shift", SHIFTS[0]),
        config.get("max_shift", SHIFTS[1]),
    )
    own.set_timesteps(sigmas=base, mu=mu)
    return own.sigmas[:-1].clone()


def audio_levels(video: Tensor, shift: float | None) -> Tensor:
    """Levels of the sound: those of the picture, or moved by a time shift of their own."""
    return video if shift is None else shift_time(video, shift)


def training_shift(tokens: int) -> float:
    """Mean of the logit for a modality of `tokens` tokens; extrapolated beyond the line's ends."""
    slope = (SHIFTS[1] - SHIFTS[0]) / (TOKENS[1] - TOKENS[0])
    return slope * min(tokens, MAX_TOKENS) + (SHIFTS[0] - slope * TOKENS[0])


def training_levels(
    batch: int,
    tokens: int,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Noise levels (B,) fp32 of one modality for training, in [1e-3, 1].

    Logit-normal with standard deviation 1, stretched so that its 0.5 % and 99.9 % points are 0 and
    1, reflected at 1e-3; a tenth is uniform instead.
    """
    mean = training_shift(tokens)
    normal = torch.randn((batch,), generator=generator, device=device) + mean
    low, high = torch.sigmoid(torch.tensor([mean + q for q in QUANTILES], device=device))
    stretched = (torch.sigmoid(normal) - low) / (high - low)
    reflected = torch.where(stretched >= FLOOR, stretched, 2 * FLOOR - stretched).clamp(0, 1)
    uniform = (1 - FLOOR) * torch.rand((batch,), generator=generator, device=device) + FLOOR
    chosen = torch.rand((batch,), generator=generator, device=device) > UNIFORM_SHARE
    return torch.where(chosen, reflected, uniform)
