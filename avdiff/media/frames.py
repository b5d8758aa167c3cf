"""One picture after the other with its own time, for measurements of files of any length and any
frame rate.

`read_clip` puts pictures on a steady clock and holds them all; here each picture keeps its
timestamp and none is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avdiff.media.color import conversion_note
from avdiff.media.container import (
    MediaError,
    check_frame_size,
    frame_rate,
    header_seconds,
    length_is_exact,
    open_media,
)
from avdiff.media.display import display_of_frame
from avdiff.media.read import show_frame
from avdiff.media.sound import (
    align,
    channels_cancel,
    check_complete,
    choose_channel,
    decode_sound,
    too_long,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

LEAST_GAP = 1 / 32  # s; of faster films (50, 60 frames a second) every second picture is taken
LONGEST_SIDE = 1280  # pixels; larger pictures are scaled down
LONGEST_SOUND = Fraction(3600)  # seconds of mono sound that are held at once
LISTENED = 60  # seconds from which is told whether channels cancel each other


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
    with open_media(path) as (container, streams):
        video = streams.video
        if video is None:
            raise MediaError(f"path={path}: has no pictures")
        video.thread_type = "AUTO"
        half = 1 / (2 * frame_rate(video))
        start = end = None
        last = float("-inf")
        for frame in container.decode(video):
            if frame.pts is None:
                continue
            time = frame.pts * Fraction(video.time_base or 0)
            start = time if start is None else start
            end = time + 2 * half
            if time - start < last + LEAST_GAP:
                continue
            last = float(time - start)
            yield float(time - start + half), _scaled(path, frame, video, longest_side)
        if end is None:
            raise MediaError(f"path={path}: its video holds no decodable frame")
        if length_is_exact(path, container):
            check_complete(path, video, end, None)


def read_sound(
    path: str | Path, audio_track: int | None = None, audio_channel: int | None = None
) -> tuple[np.ndarray, int] | None:
    """All sound of a file, mono (S,) float32 in [-1, 1], and its rate in Hz; None without a sound
    track.

    Sample 0 sounds at the start of the first picture. Where channels cancel each other out when
    they are mixed, the first one is taken instead. Track and channel are counted from 1.

    Raises:
        MediaError: not a readable media file, cut short, or longer than `LONGEST_SOUND`.
    """
    with open_media(path, audio_track) as (container, streams):
        audio = streams.audio
        if audio is None:
            return None
        seconds = header_seconds(audio, container)
        if length_is_exact(path, container) and seconds and seconds > LONGEST_SOUND:
            raise MediaError(too_long(path, seconds, LONGEST_SOUND))
        start = _first_time(container, streams.video) if streams.video is not None else None
    several = audio.codec_context.channels > 1
    if audio_channel is None and several and _cancels(path, audio_track, start):
        audio_channel = 1
    mix = (
        _mean_of_channels
        if audio_channel is None
        else partial(choose_channel, channel=audio_channel)
    )
    with open_media(path, audio_track) as (container, streams):
        # again: the decoder of the pictures has read ahead
        assert streams.audio is not None, "it was there a moment ago"
        sound = decode_sound(path, container, streams.audio, start, None, LONGEST_SOUND, mix)
    late = Fraction(0) if start is None else sound.begin - start
    if abs(late) > LONGEST_SOUND:
        raise MediaError(f"path={path}: its sound begins {float(late):+.0f} s after its pictures")
    return align(sound.samples, round(late * sound.rate), None)[0], sound.rate


def _mean_of_channels(samples: np.ndarray) -> np.ndarray:
    return samples.mean(axis=0, dtype=np.float32)[None]


def _cancels(path: str | Path, audio_track: int | None, start: Fraction | None) -> bool:
    """Whether the channels of a file's beginning leave nothing when they are mixed."""
    with open_media(path, audio_track) as (container, streams):
        assert streams.audio is not None, "asked for files with sound"
        sound = decode_sound(path, container, streams.audio, start, Fraction(LISTENED))
    return channels_cancel(sound.samples)


def _first_time(container: InputContainer, video: VideoStream) -> Fraction | None:
    """Timestamp of the first picture in seconds; None if none can be decoded."""
    step = Fraction(video.time_base or 0)
    frames = container.decode(video)
    return next((frame.pts * step for frame in frames if frame.pts is not None), None)


def _scaled(path: str | Path, frame: Any, video: VideoStream, longest_side: int) -> np.ndarray:
    """A decoded frame, upright and at most so long on a side."""
    display = display_of_frame(frame, video.sample_aspect_ratio)
    height, width = display.size(frame.height, frame.width)
    check_frame_size(path, height, width)
    share = longest_side / max(height, width)
    wide = conversion_note(int(frame.color_trc), int(frame.color_primaries)) is not None
    if share >= 1 or wide:
        size = None if share >= 1 else (max(1, round(height * share)), max(1, round(width * share)))
        return show_frame(frame, video, size, path)
    if display.transpose:
        height, width = width, height
    small = frame.reformat(
        width=max(1, round(width * share)),
        height=max(1, round(height * share)),
        format="rgb24",
        interpolation="AREA",
    ).to_ndarray()
    return np.ascontiguousarray(display.turn(small))
