"""The path from noise to data that one run walks: our joint scheduler, or diffusers' flow-matching
schedulers, one copy a modality.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin

from avdiff.latents import Joint, JointLatents, per_token
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

TIMESTEPS = 1000  # of diffusers' clock: noise level 1 is timestep 1000, as its caches expect
Sigmas = Sequence[float] | torch.Tensor | Joint[torch.Tensor] | None


class Schedule(Protocol):
    """What a run needs of a scheduler.

    Attributes:
        sigmas: (n + 1,) noise levels of each modality, the last is 0. timesteps: (n,) in [0, 1].
    """

    sigmas: Joint[torch.Tensor]
    timesteps: torch.Tensor

    def step(
        self, x0: Joint[torch.Tensor], index: int, state: JointLatents, mask: Joint[torch.Tensor]
    ) -> JointLatents:
        """Go from level `index` to the next; what the mask holds keeps its value and level 0."""
        ...


def make_schedule(
    scheduler: SchedulerMixin, steps: int, sigmas: Sigmas, device: torch.device
) -> Schedule:
    """Lay out the path of a run."""
    if isinstance(scheduler, JointFlowMatchScheduler):
        scheduler.set_timesteps(steps, device=device, sigmas=sigmas)
        return scheduler  # type: ignore[return-value]
    return ForeignSchedule(scheduler, steps, sigmas, device)


class ForeignSchedule:
    """A flow-matching scheduler of diffusers, stepped by a copy for each modality, since schedulers
    of several steps remember the tokens of the last ones.
    """

    def __init__(
        self, scheduler: SchedulerMixin, steps: int, sigmas: Sigmas, device: torch.device
    ) -> None:
        levels = sigmas if isinstance(sigmas, Joint) else Joint(sigmas, sigmas)
        self._copies: Joint[Any] = Joint(copy.deepcopy(scheduler), copy.deepcopy(scheduler))
        for modality, stepper in self._copies.items():
            own = getattr(levels, modality)
            if own is None:
                stepper.set_timesteps(steps, device=device)
            else:
                stepper.set_timesteps(sigmas=[float(level) for level in own], device=device)
        self.sigmas = self._copies.map(lambda stepper: stepper.sigmas.to(device))
        assert self._copies.video is not None
        self.timesteps = self._copies.video.timesteps.float() / TIMESTEPS

    def step(
        self, x0: Joint[torch.Tensor], index: int, state: JointLatents, mask: Joint[torch.Tensor]
    ) -> JointLatents:
        """As `Schedule.step`: the schedulers take velocities (z - x0) / sigma."""
        tokens: dict[str, torch.Tensor] = {}
        levels: dict[str, torch.Tensor] = {}
        for modality, old in state.latents.items():
            given = getattr(mask, modality)
            sigmas = getattr(self.sigmas, modality)
            stepper = getattr(self._copies, modality)
            velocity = (old - getattr(x0, modality)) / sigmas[index].clamp(min=1e-3).to(old)
            new = stepper.step(velocity, stepper.timesteps[index], old, return_dict=False)[0]
            tokens[modality] = torch.where(per_token(given, old), old, new.to(old.dtype))
            level = sigmas[index + 1].float().expand(given.shape)
            levels[modality] = level.masked_fill(given, 0.0)
        return state.with_latents(Joint(**tokens), Joint(**levels))


def correlate_frames(scheduler: SchedulerMixin, white: torch.Tensor, frames: int) -> torch.Tensor:
    """Noise as the weights were trained with it: our scheduler shares a part between frames."""
    if isinstance(scheduler, JointFlowMatchScheduler):
        return scheduler.share_frames(white, frames)
    return white


def check_scheduler(scheduler: Any) -> None:
    """Refuse a scheduler that does not walk the straight path of flow matching.

    Raises:
        ValueError: names the class and what fits.
    """
    if isinstance(scheduler, JointFlowMatchScheduler):
        return
    name = type(scheduler).__name__
    fits = "a JointFlowMatchScheduler or a flow-matching scheduler of diffusers of order 1"
    config = getattr(scheduler, "config", {})
    flow = name.startswith("FlowMatch") or (
        config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction"
    )
    if not flow or getattr(scheduler, "order", 1) != 1:
        raise ValueError(f"scheduler={name}: needs {fits}")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            f"scheduler={name}: use_dynamic_shifting=True shifts by the size of one modality; "
            "needs a fixed shift"
        )


def check_sigmas(scheduler: Any, sigmas: Any, timesteps: Any) -> Sigmas:
    """Noise levels that a call names by `sigmas` or by `timesteps`.

    Raises:
        ValueError: both are given, they do not fall, leave (0, 1], or the scheduler takes none.
    """
    if sigmas is None and timesteps is None:
        return None
    if sigmas is not None and timesteps is not None:
        raise ValueError("sigmas and timesteps are both given: needs one of them")
    name = "timesteps" if sigmas is None else "sigmas"
    if isinstance(sigmas, Joint):
        for modality in ("video", "audio"):
            _check_levels(f"sigmas.{modality}", getattr(sigmas, modality), 1)
        if len(sigmas.video) != len(sigmas.audio):
            raise ValueError(
                f"sigmas of {len(sigmas.video)} and {len(sigmas.audio)} levels: needs as many for "
                "both modalities"
            )
        levels: Any = sigmas.map(lambda own: torch.as_tensor(own, dtype=torch.float64))
    else:
        unit = TIMESTEPS if sigmas is None else 1
        levels = _check_levels(name, timesteps if sigmas is None else sigmas, unit)
    if "sigmas" not in inspect.signature(scheduler.set_timesteps).parameters:
        raise ValueError(f"{name}: {type(scheduler).__name__} takes no noise levels, needs None")
    return levels


def _check_levels(name: str, levels: Any, unit: float) -> list[float]:
    try:
        values = [float(level) / unit for level in levels]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={levels!r:.60}: needs a list of falling numbers") from error
    falling = all(a > b for a, b in pairwise(values))
    if not values or not falling or not all(0 < value <= 1 for value in values):
        raise ValueError(
            f"{name}={levels!r:.60}: needs numbers that fall strictly and lie in (0, {unit}], the "
            "final 0 left out"
        )
    return values
