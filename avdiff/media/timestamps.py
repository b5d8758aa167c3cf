"""Timestamps of a file's pictures, read from its packets without decoding (PyAV, like the rest of
`media`).
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avdiff.media.read import MediaError, reason

STEADY = (
    0.25  # frame durations that differ by more than this share of their median are a variable rate
)


def picture_times(path: str | Path) -> list[Fraction]:
    """Presentation times of all pictures in seconds, in order; empty for a file without pictures.

    Raises:
        MediaError: not a readable media file.
    """
    try:
        with av.open(
            str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace"
        ) as container:
            if not container.streams.video:
                return []
            stream = container.streams.video[0]
            step = Fraction(stream.time_base or 0)
            return sorted(p.pts * step for p in container.demux(stream) if p.pts is not None)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"path={path}: cannot be read as media ({reason(error)})") from error


def has_variable_rate(times: list[Fraction]) -> bool:
    """Whether the pictures are spaced unevenly; millisecond rounding (Matroska) does not count."""
    if len(times) < 3:
        return False
    gaps = np.diff(np.array([float(t) for t in times]))
    middle = float(np.median(gaps))
    return bool(np.abs(gaps - middle).max() > STEADY * middle + 0.0011)
