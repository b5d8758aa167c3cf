"""Where in its swing a thing is that strikes or falls: continuous features of an onset track.

A token that only says "an onset is here" leaves the picture between two onsets open. These features
say, at any time, how long ago the last onset was, how long until the next, and how far along the
flight between them is, so that a ball's height or a stick's angle is a function of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = ("since", "until", "phase_sin", "phase_cos", "flight", "sounding", "present")
REACH = 0.25  # s; time constant of `since` and `until`, some frames on both sides of an onset
LONGEST_FLIGHT = 1.0  # s; a longer wait is no flight
SOUNDING = 0.06  # s after an onset


def onset_features(onsets: Sequence[Sequence[float]], times: Tensor) -> Tensor:
    """Features of B onset tracks at M times.

    Args:
        onsets: for each clip, the seconds of its onsets in ascending order; empty for a clip
            without events.
        times: (M,) seconds, such as the middles of frames.

    Returns:
        (B, M, 7) fp32 in [-1, 1], named by `FEATURES`: exp(-t / 0.25 s) since the last and until
        the next onset, sine and cosine of the flight's phase (2 pi from one onset to the next),
        the flight's length as a share of a second, 1 while an onset sounds, 1 for a clip with
        events. All are 0 where no onset comes before, or after, and in clips without events.

    Raises:
        ValueError: onsets that do not ascend.
    """
    return torch.stack([_features_of(row, times.float()) for row in onsets])


def _features_of(onsets: Sequence[float], times: Tensor) -> Tensor:
    """One clip: (M, 7)."""
    if not onsets:
        return times.new_zeros(len(times), len(FEATURES))
    marks = torch.tensor(list(onsets), dtype=times.dtype, device=times.device)
    if bool((marks.diff() <= 0).any()):
        raise ValueError(f"onsets={list(onsets)}: needs ascending seconds")
    later = torch.searchsorted(marks, times, right=True)  # index of the next onset
    last = marks[(later - 1).clamp(min=0)]
    following = marks[later.clamp(max=len(marks) - 1)]
    begun = later > 0
    awaited = later < len(marks)
    since = times - last
    until = following - times
    between = begun & awaited
    flight = torch.where(between, following - last, torch.ones_like(times))
    angle = 2 * torch.pi * since / flight
    nothing = torch.zeros_like(times)
    columns = [
        torch.where(begun, torch.exp(-since / REACH), nothing),
        torch.where(awaited, torch.exp(-until / REACH), nothing),
        torch.where(between, torch.sin(angle), nothing),
        torch.where(between, torch.cos(angle), nothing),
        torch.where(between, (flight / LONGEST_FLIGHT).clamp(max=1.0), nothing),
        (begun & (since < SOUNDING)).to(times.dtype),
        torch.ones_like(times),
    ]
    return torch.stack(columns, dim=-1)
