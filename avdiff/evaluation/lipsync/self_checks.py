"""Is the lip-sync measurement itself right? Its own clips with the sound shifted, and with the
sound of other clips.

Shifts are certain, whatever a clip's true offset is: *relative* recovery compares with the clip's
own offset at shift 0. *Absolute* recovery takes every clip to be in sync, which real footage is not
always.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from avdiff.evaluation.lipsync.backends import Backend
from avdiff.evaluation.lipsync.measure import FRAME_MS, Measured
from avdiff.evaluation.report.report import Estimate, interval

SHIFTS = (-10, -5, -3, 0, 3, 5, 10)  # frames of 40 ms
MOST_SWAPS = 60  # clips that are held against each other's sound


def shifted(audio: np.ndarray, sample_rate: int, milliseconds: float) -> np.ndarray:
    """Sound (S,) made late (positive) or early, same length: what is pushed out is lost, silence
    comes in.
    """
    samples = round(milliseconds * sample_rate / 1000)
    late = np.zeros_like(audio)
    if samples >= 0:
        late[samples:] = audio[: len(audio) - samples]
    else:
        late[:samples] = audio[-samples:]
    return late


def shift_clip(
    measured: Measured, backend: Backend, shifts: Sequence[int] = SHIFTS
) -> list[float | None]:
    """Offsets in frames found with the sound shifted; None where a shift left nothing to
    evaluator.
    """
    assert measured.audio is not None, "called for clips with a measurement"
    found: list[float | None] = []
    for shift in shifts:
        late = shifted(measured.audio, measured.sample_rate, shift * FRAME_MS)
        try:
            found.append(
                backend.curves(measured.seen, late, measured.sample_rate).whole.offset
                * 1000
                / FRAME_MS
            )
        except ValueError:
            found.append(None)
    return found


def recovery(
    offsets: Sequence[Sequence[float | None]], shifts: Sequence[int] = SHIFTS
) -> dict[str, Any]:
    """Share of shifts that were found again, with intervals over clips.

    Args:
        offsets: for each clip the offsets of `shift_clip`; 0 must be among the shifts. A None
            counts as not found.

    Returns:
        absolute_1, absolute_2, relative_1, relative_2: within so many frames, over all shifts but 0
            for `relative`;
        zero_1, zero_2: of the unshifted clips; by_shift: shift -> (absolute_1, relative_1).
    """
    if 0 not in shifts:
        raise ValueError(f"shifts={tuple(shifts)}: needs 0 among them")
    rows = [[np.nan if value is None else value for value in row] for row in offsets]
    table = np.array(rows, np.float64).reshape(-1, len(shifts))
    planted = np.array(shifts, np.float64)
    zero = table[:, list(shifts).index(0)]
    absolute = np.abs(table - planted)
    relative = np.abs(table - zero[:, None] - planted)
    moved = planted != 0
    metrics: dict[str, Any] = {}
    for within in (1, 2):
        metrics[f"absolute_{within}"] = interval((absolute <= within).mean(axis=1))
        metrics[f"relative_{within}"] = interval((relative <= within)[:, moved].mean(axis=1))
        metrics[f"zero_{within}"] = interval((np.abs(zero) <= within).astype(float))
    metrics["by_shift"] = {
        int(shift): (float((absolute[:, i] <= 1).mean()), float((relative[:, i] <= 1).mean()))
        for i, shift in enumerate(shifts)
    }
    return metrics


def swap_auc(measured: Sequence[Measured], backend: Backend) -> dict[str, Estimate]:
    """Chance that a true pair of lips and sound scores above a swapped one, over all pairs of the
    first `MOST_SWAPS`.

    Returns:
        auc (score at the best lag) and auc_zero (at lag 0). The interval is over the clips of the
        true pairs.
    """
    clips = list(measured)[:MOST_SWAPS]
    if len(clips) < 2:
        raise ValueError(f"measured: {len(clips)} clips, needs at least 2 to swap their sounds")
    own: list[tuple[float, float]] = []
    foreign: list[tuple[float, float]] = []
    for one in clips:
        for other in clips:
            try:
                curve = backend.curves(one.seen, _sound(other), other.sample_rate).whole
            except ValueError:  # a sound too short to be held against this face
                continue
            (own if other is one else foreign).append((curve.score, curve.score_at_zero))
    if not own or not foreign:
        raise ValueError("measured: no clip's sound fits another clip's length")
    true = np.array(own)
    swapped = np.array(foreign)
    return {
        name: interval([_beaten(value, swapped[:, i]) for value in true[:, i]])
        for i, name in enumerate(("auc", "auc_zero"))
    }


def _sound(measured: Measured) -> np.ndarray:
    assert measured.audio is not None, "called for clips with a measurement"
    return measured.audio


def _beaten(value: float, others: np.ndarray) -> float:
    """Share of others below a value; ties count half."""
    return float((others < value).mean() + 0.5 * (others == value).mean())
