"""Timestamps of a file's pictures, read from its packets without decoding."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np

from avdiff.media.container import open_media

STEADY = (
    0.25  # frame durations that differ by more than this share of their median are a variable rate
)


def picture_times(path: str | Path) -> list[Fraction]:
    """Presentation times of all pictures in seconds, in order; empty for a file without pictures.

    Raises:
        MediaError: not a readable media file.
    """
    with open_media(path) as (container, streams):
        if streams.video is None:
            return []
        step = Fraction(streams.video.time_base or 0)
        packets = container.demux(streams.video)
        return sorted(packet.pts * step for packet in packets if packet.pts is not None)


def has_variable_rate(times: list[Fraction]) -> bool:
    """Whether the pictures are spaced unevenly; millisecond rounding (Matroska) does not count."""
    if len(times) < 3:
        return False
    gaps = np.diff(np.array([float(t) for t in times]))
    middle = float(np.median(gaps))
    return bool(np.abs(gaps - middle).max() > STEADY * middle + 0.0011)
