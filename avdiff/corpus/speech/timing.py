"""Do phone labels sit on their sound? Regress log spectra on the labels and find the shift that
explains most.

With one-hot labels the regression is a table of class means, so the explained share is the variance
between classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

from avdiff.phonetics.phone import SILENCE, Phone

# seconds, seconds, bands from 80 Hz up
HOP = 0.005
WINDOW = 0.02
BANDS = 32
REACH = 0.06  # seconds searched to either side; frames nearer than this to silence are left out
FLOOR_DB = 70.0  # what lies this far under the loudest band is silence


def best_shift(
    spoken: Iterable[tuple[np.ndarray, Sequence[Phone]]], rate: int = 24000
) -> tuple[float, float]:
    """Shift of all labels that explains the log spectra best, and the share of variance explained
    there.

    Args:
        spoken: sounds (S,) with the phones that tile them. Some 20 sentences of one voice give a
            shift to 3 ms or so.

    Returns:
        (seconds, share): +0.01 says that the labels should come 10 ms later than they do; share in
        [0, 1].

    Raises:
        ValueError: no speech that is long enough.
    """
    steps = np.arange(-round(REACH / HOP), round(REACH / HOP) + 1)
    names: dict[str, int] = {}
    features = []
    labels = []
    for sound, phones in spoken:
        spectra = log_spectra(sound, rate)
        middles = np.arange(len(spectra)) * HOP
        codes = np.array([names.setdefault(p.symbol, len(names)) for p in phones])
        ends = np.array([p.end for p in phones])
        inside = _inside(phones, middles)
        if inside.any():
            at = (
                middles[inside][:, None] - steps * HOP
            )  # labels that come later are those of an earlier time
            labels.append(
                codes[np.minimum(np.searchsorted(ends, at, side="right"), len(codes) - 1)]
            )
            features.append(spectra[inside] - spectra[inside].mean(axis=0))
    if not features:
        raise ValueError("spoken: holds no stretch of speech that is long enough")
    x = np.concatenate(features)
    y = np.concatenate(labels)
    shares = np.array([_explained(x, y[:, i], len(names)) for i in range(len(steps))])
    return HOP * (float(steps[0]) + _peak(shares)), float(shares.max())


def log_spectra(sound: np.ndarray, rate: int) -> np.ndarray:
    """(S,) -> level in dB of 32 bands, frame i centred at i * 5 ms: (frames, 32)."""
    hop = round(HOP * rate)
    size = round(WINDOW * rate)
    padded = np.pad(np.asarray(sound, np.float64), size // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * np.hanning(size)
    power = np.abs(np.fft.rfft(frames)) ** 2
    hertz = np.fft.rfftfreq(size, 1 / rate)
    edges = np.geomspace(80, 0.45 * rate, BANDS + 1)
    places = np.clip(np.searchsorted(edges, hertz, side="right") - 1, 0, BANDS - 1)
    bands = np.zeros((BANDS, len(hertz)))
    bands[places, np.arange(len(hertz))] = 1
    level = 10 * np.log10(power @ bands[bands.any(axis=1)].T + 1e-12)
    return np.maximum(level, level.max() - FLOOR_DB)


def _inside(phones: Sequence[Phone], middles: np.ndarray) -> np.ndarray:
    """Which frames are further than `REACH` inside a stretch of speech."""
    kept = np.zeros(len(middles), bool)
    for silent, run in groupby(phones, key=lambda p: p.symbol == SILENCE):
        stretch = list(run)
        if not silent:
            kept |= (middles > stretch[0].start + REACH) & (middles < stretch[-1].end - REACH)
    return kept


def _explained(x: np.ndarray, labels: np.ndarray, classes: int) -> float:
    """Share of the variance of x (N, D) that lies between the classes."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels, minlength=classes)
    held = counts > 0
    first = np.concatenate([[0], np.cumsum(counts[held])[:-1]])
    sums = np.add.reduceat(x[order], first, axis=0)
    return float((sums**2 / counts[held][:, None]).sum() / (x**2).sum())


def _peak(values: np.ndarray) -> float:
    """Place of the maximum, between the samples by a parabola."""
    top = int(np.clip(values.argmax(), 1, len(values) - 2))
    a, b, c = values[top - 1 : top + 2]
    bend = a - 2 * b + c
    return float(top) + float(np.clip(0.5 * (a - c) / bend, -1, 1) if bend < 0 else 0.0)
