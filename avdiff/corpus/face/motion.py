"""How the presenter moves: head sway, blinks, gaze and brows as functions of time in seconds.

Slow parts are sums of sines with random periods; blinks and glances are events at random moments.
Stressed syllables nod the head and lift the brows, as speakers do (Graf et al. 2002, "Visual
prosody").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avdiff.phonetics.phone import Phone


class Pose(NamedTuple):
    """Head and eyes at one moment, all zero at rest.

    yaw, pitch in [-1, 1] (about 20 degrees; yaw > 0 looks to the right of the picture, pitch > 0
    down); tilt in degrees clockwise; dx, dy in 1/128 of the picture; blink 0 open to 1 closed;
    gaze_x, gaze_y in [-1, 1]; brow -1 down to 1 up.
    """

    yaw: float = 0.0
    pitch: float = 0.0
    tilt: float = 0.0
    dx: float = 0.0
    dy: float = 0.0
    blink: float = 0.0
    gaze_x: float = 0.0
    gaze_y: float = 0.0
    brow: float = 0.0


_SWAY = {
    "yaw": 0.42,
    "pitch": 0.22,
    "tilt": 2.2,
    "dx": 1.2,
    "dy": 0.7,
    "brow": 0.22,
}  # standard deviations
_PERIODS = (1.6, 5.5)  # s
_WAVES = 3


def _wander(rng: np.random.Generator, times: np.ndarray, deviation: float) -> np.ndarray:
    """Sum of sines with random periods and phases. (F,)"""
    rates = 2 * np.pi / rng.uniform(*_PERIODS, _WAVES)
    phases = rng.uniform(0, 2 * np.pi, _WAVES)
    heights = rng.dirichlet(np.full(_WAVES, 3.0)) * deviation * 1.7
    return (heights[:, None] * np.sin(rates[:, None] * times + phases[:, None])).sum(0)


def _moments(rng: np.random.Generator, end: float, low: float, high: float) -> list[float]:
    """Random moments from before 0 to `end`, `low`-`high` seconds apart; a longer end only adds
    moments.
    """
    moments = []
    now = float(rng.uniform(-low, high * 0.7))
    while now < end + 1.0:
        moments.append(now)
        now += float(rng.uniform(low, high))
    return moments


def _blinks(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """Lids: closing 80 ms, opening 140 ms. (F,) in [0, 1]"""
    lid = np.zeros_like(times)
    for moment in _moments(rng, float(times.max(initial=0.0)), 1.6, 4.6):
        away = times - moment
        shape = np.where(away < 0, 1 + away / 0.08, 1 - np.maximum(away - 0.03, 0) / 0.14)
        lid = np.maximum(lid, np.clip(shape, 0.0, 1.0))
    return lid * lid * (3 - 2 * lid)


def _gaze(rng: np.random.Generator, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mostly into the camera, with glances aside; jumps take 50 ms. ((F,), (F,))"""
    across = np.zeros_like(times)
    down = np.zeros_like(times)
    last = (0.0, 0.0)
    clock, rng = rng.spawn(2)  # apart, so that the number of moments does not shift the goals
    for moment in _moments(clock, float(times.max(initial=0.0)), 0.5, 2.2):
        temporary_path = rng.random() < 0.35
        scale = 0.75 if temporary_path else 0.10
        target = (
            float(np.clip(rng.normal(0, scale), -1, 1)),
            float(np.clip(rng.normal(0, scale * 0.5), -1, 1)),
        )
        step = np.clip((times - moment) / 0.05, 0.0, 1.0)
        across = across + step * (target[0] - last[0])
        down = down + step * (target[1] - last[1])
        last = target
    return across, down


def _beats(
    rng: np.random.Generator, times: np.ndarray, phones: Sequence[Phone]
) -> tuple[np.ndarray, np.ndarray]:
    """Nods and brow lifts on some of the stressed vowels. ((F,), (F,))"""
    nod = np.zeros_like(times)
    lift = np.zeros_like(times)
    for phone in phones:
        strength, chance = rng.random(2)
        if phone.stress_tone != 1 or chance > 0.6:
            continue
        away = (times - (phone.start + phone.end) / 2) / 0.13
        bump = np.exp(-0.5 * away * away) * (0.3 + 0.7 * strength)
        nod += bump
        lift += bump if chance < 0.3 else 0.0
    return np.minimum(nod, 1.2), np.minimum(lift, 1.2)


def pose_track(
    rng: np.random.Generator,
    times: np.ndarray,
    phones: Sequence[Phone] = (),
    liveliness: float = 1.0,
) -> list[Pose]:
    """Motion of head and eyes at each time.

    Args:
        rng: one draw is taken from it, so that the motion at a time depends on nothing but the seed
            and the time.
        times: (F,) seconds.
        phones: spoken phones; stressed vowels (mark 1) add nods and brow lifts.
        liveliness: factor of the sway, 0 holds the head still.

    Returns:
        One `Pose` a frame.
    """
    times = np.asarray(times, np.float64)
    seeds = np.random.SeedSequence(int(rng.integers(1 << 62))).spawn(4)
    sway, lids, eyes, beat = (np.random.default_rng(seed) for seed in seeds)
    track = {
        name: _wander(sway, times, deviation) * liveliness for name, deviation in _SWAY.items()
    }
    rest = {"yaw": float(sway.normal(0, 0.22)), "tilt": float(sway.normal(0, 1.2))}
    nod, lift = _beats(beat, times, phones)
    track["yaw"] = np.clip(track["yaw"] + rest["yaw"], -1, 1)
    track["tilt"] = track["tilt"] + rest["tilt"]
    track["pitch"] = np.clip(track["pitch"] + 0.35 * nod * liveliness, -1, 1)
    track["dy"] = track["dy"] + 0.9 * nod * liveliness
    track["brow"] = np.clip(track["brow"] + 0.8 * lift, -1, 1)
    track["blink"] = _blinks(lids, times)
    track["gaze_x"], track["gaze_y"] = _gaze(eyes, times)
    columns = [track[name] for name in Pose._fields]
    return [Pose(*(float(value) for value in row)) for row in zip(*columns, strict=True)]
