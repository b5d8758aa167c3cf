"""One picture after the other with its own time, for measurements of files of any length and any
frame rate.

`read_clip` puts pictures on a steady clock and holds them all; here each picture keeps its
timestamp and none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.media.read import (
    MediaError,
    _align,
    _check_complete,
    _opened,
    _picture,
    _rate,
    _read_sound,
    _streams,
)

LEAST_GAP = 1 / 32  # s; of faster films (50, 60 frames a second) every second picture is taken
LONGEST_SIDE = 1280  # pixels; larger pictures are scaled down


def walk_pictures(
    path: str | Path, longest_side: int = LONGEST_SIDE
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield (seconds, picture) of a file's video: uint8 (H, W, 3), upright.

    Seconds count from the first picture's start and name the middle of a picture: its timestamp and
    half a frame at the file's mean rate. They ascend.

    Raises:
        MediaError: not a readable media file, no pictures in it, or cut short (after the last
            picture).
    """
    with _opened(path) as container:
        video, _ = _streams(container)
        if video is None:
            raise MediaError(f"path={path}: has no pictures")
        video.thread_type = "AUTO"
        half = 1 / (2 * _rate(video))
        start = end = None
        last = float("-inf")
        for frame in container.decode(video):
            if frame.pts is None:
                continue
            time = frame.pts * video.time_base
            start = time if start is None else start
            end = time + 2 * half
            if time - start < last + LEAST_GAP:
                continue
            last = float(time - start)
            yield float(time - start + half), _scaled(frame, longest_side)
        if end is None:
            raise MediaError(f"path={path}: its video holds no decodable frame")
        _check_complete(path, video, end, None)


def read_sound(path: str | Path) -> tuple[np.ndarray, int] | None:
    """All sound of a file, mono (S,) float32 in [-1, 1], and its rate in Hz; None without a sound
    track.

    Sample 0 sounds at the start of the first picture.

    Raises:
        MediaError: not a readable media file, or cut short.
    """
    with _opened(path) as container:
        video, audio = _streams(container)
        if audio is None:
            return None
        start = _first_time(container, video) if video is not None else None
    with _opened(path) as container:  # again: the decoder of the pictures has read ahead
        audio = container.streams.audio[0]
        rate = audio.codec_context.sample_rate
        begin, sound = _read_sound(path, container, audio, start, None)
    late = Fraction(0) if start is None else begin - start
    return _align(sound, round(late * rate), None).mean(axis=0, dtype=np.float32), rate


def _first_time(container: Any, video: Any) -> Fraction | None:
    """Timestamp of the first picture in seconds; None if none can be decoded."""
    return next(
        (frame.pts * video.time_base for frame in container.decode(video) if frame.pts is not None),
        None,
    )


def _scaled(frame: Any, longest_side: int) -> np.ndarray:
    """A decoded frame, upright and at most so long on a side."""
    share = longest_side / max(frame.height, frame.width)
    if share >= 1:
        return _picture(frame, None)
    turned = frame.rotation
    small = frame.reformat(
        width=max(1, round(frame.width * share)),
        height=max(1, round(frame.height * share)),
        format="rgb24",
        interpolation="AREA",
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(small, turned // 90) if turned % 90 == 0 else small)
