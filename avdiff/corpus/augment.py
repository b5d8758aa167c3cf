"""Degraded speech: level, noise, room and pitch, so that speech from a real microphone can drive a
face later.

Everything keeps time: the direct sound of a room comes first, and a change of pitch (by resampling)
reports its factor so that phone times can follow.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
from scipy.signal import fftconvolve, resample_poly

KINDS = ("level", "noise", "room", "pitch")
PITCH_FACTORS = tuple(
    Fraction(n, 50) for n in (45, 46, 47, 48, 52, 53, 54, 55)
)  # above 1: higher and faster
SNR_DB = (6.0, 28.0)
REVERB_SECONDS = (0.15, 0.6)  # RT60
LEVEL_DB = (-14.0, 6.0)


class Plan(NamedTuple):
    """What is done to one clip; `kinds` in the order of `KINDS`."""

    kinds: tuple[str, ...] = ()
    pitch: Fraction = Fraction(1)


def draw_plan(rng: np.random.Generator, share: float) -> Plan:
    """Leave the clip alone with probability 1 - share, else choose one to three of `KINDS`."""
    if rng.random() >= share:
        return Plan()
    count = int(rng.choice([1, 2, 3], p=[0.5, 0.35, 0.15]))
    kinds = set(rng.choice(KINDS, size=count, replace=False).tolist())
    pitch = (
        PITCH_FACTORS[int(rng.integers(len(PITCH_FACTORS)))] if "pitch" in kinds else Fraction(1)
    )
    return Plan(tuple(kind for kind in KINDS if kind in kinds), pitch)


def shift_pitch(audio: np.ndarray, factor: Fraction) -> np.ndarray:
    """(S,) -> (about S / factor,) float32: higher and faster by `factor`; times divide by it."""
    return resample_poly(audio, factor.denominator, factor.numerator).astype(np.float32)


def degrade(
    rng: np.random.Generator, audio: np.ndarray, kinds: tuple[str, ...], rate: int
) -> np.ndarray:
    """Room, then noise, then level (the order of a real recording): (S,) float32 -> (S,) float32 in
    [-1, 1].
    """
    room, hiss, gain = rng.spawn(3)
    loudness = float(np.sqrt(np.mean(audio**2)) + 1e-6)
    if "room" in kinds:
        audio = add_room(room, audio, rate)
    if "noise" in kinds:
        noise = coloured_noise(hiss, len(audio), rate)
        audio = audio + noise * np.float32(loudness * 10 ** (-hiss.uniform(*SNR_DB) / 20))
    if "level" in kinds:
        audio = audio * np.float32(10 ** (gain.uniform(*LEVEL_DB) / 20))
    peak = float(np.abs(audio).max(initial=0.0))
    if peak > 0.99:
        # half of loud microphones clip, half have a limiter
        audio = (
            np.clip(audio, -0.99, 0.99) if gain.random() < 0.5 else audio * np.float32(0.99 / peak)
        )
    return audio.astype(np.float32)


def add_room(rng: np.random.Generator, audio: np.ndarray, rate: int) -> np.ndarray:
    """Convolve with the direct sound and an exponentially decaying tail (Polack 1988): (S,) ->
    (S,), no delay.
    """
    seconds = rng.uniform(*REVERB_SECONDS)
    length = round(seconds * rate)
    times = np.arange(length) / rate
    tail = rng.standard_normal(length) * 10 ** (-3 * times / seconds)  # -60 dB at RT60
    tail[: round(rng.uniform(0.002, 0.012) * rate)] = 0.0  # before the first reflection
    tail *= 10 ** (rng.uniform(-9.0, 3.0) / 20) / (np.linalg.norm(tail) + 1e-9)
    tail[0] = 1.0
    wet = fftconvolve(audio, tail)[: len(audio)]
    return (wet * np.sqrt(np.mean(audio**2) / (np.mean(wet**2) + 1e-12))).astype(np.float32)


def coloured_noise(rng: np.random.Generator, length: int, rate: int) -> np.ndarray:
    """Hiss between white and brown, sometimes with mains hum: (length,) float32 with RMS 1."""
    spectrum = np.fft.rfft(rng.standard_normal(length))
    hertz = np.maximum(np.fft.rfftfreq(length, 1 / rate), 40.0)
    noise = np.fft.irfft(spectrum * hertz ** (-rng.uniform(0.0, 1.0)), length)
    noise /= np.sqrt(np.mean(noise**2)) + 1e-12
    if rng.random() < 0.25:
        phase = 2 * np.pi * float(rng.choice([50.0, 60.0])) * np.arange(length) / rate
        noise += rng.uniform(0.2, 0.8) * (
            np.sin(phase) + 0.5 * np.sin(2 * phase + 1) + 0.3 * np.sin(3 * phase + 2)
        )
    return (noise / (np.sqrt(np.mean(noise**2)) + 1e-12)).astype(np.float32)
