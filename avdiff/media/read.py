"""Decode clips by their timestamps: pictures on a steady clock, sound aligned with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avdiff.clip import as_fps
from avdiff.media.animation import is_sequence, read_sequence
from avdiff.media.color import conversion_note, to_sdr
from avdiff.media.container import (
    INTERLACED_NOTE,
    LONGEST_CLIP,
    LONGEST_GAP,
    MAX_BYTES,
    NOTICE,
    SAMPLE_RATES,
    MediaError,
    check_frame_size,
    frame_rate,
    header_notes,
    header_seconds,
    length_is_exact,
    open_media,
    read_tags,
    reason,
)
from avdiff.media.display import display_of_frame
from avdiff.media.probe import MediaInfo, probe
from avdiff.media.sound import (
    AAC_FRAME,
    align,
    check_complete,
    choose_channel,
    decode_sound,
    resample_audio,
    too_long,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

__all__ = [
    "AAC_FRAME",
    "NOTICE",
    "Clip",
    "MediaError",
    "MediaInfo",
    "probe",
    "read_clip",
    "reason",
    "resample_audio",
]

MAX_SIDE = 16384  # pixels of a picture that is asked for


@dataclass(frozen=True)
class Clip:
    """What a media file holds, on the clock of its video.

    Args:
        frames: (F, H, W, 3) uint8 RGB, or None for a file without pictures. fps: exact rate of
            `frames`.
        audio: (C, S) float32 in [-1, 1], sample 0 at the instant of frame 0, or None. sample_rate:
            Hz.
        start_gap: seconds by which the sound began after (+) or before (-) the first frame in the
            file; `audio` is already aligned (silence put in front, or the early part cut).
        metadata: the file's tags; what `write_clip` was given comes back as the same dict.
        notes: sentences that a user should read: HDR, interlacing, other sound tracks, holes.
    """

    frames: np.ndarray | None
    audio: np.ndarray | None
    fps: Fraction | None
    sample_rate: int | None
    start_gap: Fraction = Fraction(0)
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_clip(
    path: str | Path,
    fps: Fraction | float | str | None = None,
    size: int | tuple[int, int] | None = None,
    sample_rate: int | None = None,
    max_seconds: Fraction | float | None = None,
    audio_track: int | None = None,
    audio_channel: int | None = None,
) -> Clip:
    """Decode a film, a sound, an animation or a folder of pictures by its timestamps.

    Args:
        fps: frames wanted per second; output frame i is the picture on screen at (i + 1/2) / fps
            after the first one, so that variable rates, dropped frames and millisecond timestamps
            come out right. None: the file's own rate.
        size: (height, width) or one number for both; the picture as shown is cropped at the centre
            to the shape, then scaled.
        sample_rate: Hz wanted; None: the file's own. max_seconds: read only so much from the start.
        audio_track, audio_channel: which sound, counted from 1; None takes the track that players
            play, and all channels.

    Raises:
        MediaError: no such file, a folder, not a media file, cut short, a gap of more than
            `LONGEST_GAP`, or more than `LONGEST_CLIP` or memory should hold.
    """
    target = (size, size) if isinstance(size, int) else size
    if target is not None and not all(1 <= side <= MAX_SIDE for side in target):
        raise MediaError(f"size={size}: needs sides from 1 to {MAX_SIDE} pixels")
    if max_seconds is not None and not 0 < max_seconds < float("inf"):
        raise MediaError(f"max_seconds={max_seconds}: needs a positive number")
    if sample_rate is not None and not SAMPLE_RATES[0] <= sample_rate <= SAMPLE_RATES[1]:
        raise MediaError(
            f"sample_rate={sample_rate}: needs {SAMPLE_RATES[0]} to {SAMPLE_RATES[1]} Hz"
        )
    limit = None if max_seconds is None else Fraction(max_seconds)
    if "\0" not in str(path) and is_sequence(Path(path)):
        asked = None if fps is None else as_fps(fps)
        frames, rate = read_sequence(Path(path), asked, target, limit)
        return Clip(frames, None, rate, None)
    frames = rate = start = None
    with open_media(path, audio_track) as (container, streams):
        video = streams.video
        tags = read_tags(container)
        notes = list(header_notes(container, streams))
        if limit is None:
            _check_length(path, container, streams)
        if video is not None:
            rate = as_fps(fps) if fps is not None else frame_rate(video)
            film = _PictureReader(path, video, rate, target, limit)
            frames = film.read(container)
            start = film.start
            notes += [note for note in film.notes if note not in notes]
    # a second pass: two decoders in one pass would hold packets of both
    with open_media(path, audio_track) as (container, streams):
        if streams.audio is None:
            return Clip(frames, None, rate, None, Fraction(0), tags, tuple(notes))
        sound = decode_sound(path, container, streams.audio, start, limit)
    notes += sound.notes
    gap = Fraction(0) if start is None else sound.begin - start
    if abs(gap) > LONGEST_CLIP:
        raise MediaError(f"path={path}: its sound begins {float(gap):+.0f} s after its pictures")
    length = None if limit is None else round(limit * sound.rate)
    samples = align(choose_channel(sound.samples, audio_channel), round(gap * sound.rate), length)
    if sample_rate is not None and sample_rate != sound.rate:
        samples = resample_audio(samples, sound.rate, sample_rate)
    return Clip(frames, samples, rate, sample_rate or sound.rate, gap, tags, tuple(notes))


def _check_length(path: str | Path, container: InputContainer, streams: Any) -> None:
    """Refuse a file whose header says that it is too long, before anything is decoded."""
    if not length_is_exact(path, container):
        return
    for stream in (streams.video, streams.audio):
        seconds = header_seconds(stream, container)
        if seconds is not None and seconds > LONGEST_CLIP:
            raise MediaError(too_long(path, seconds))


class _PictureReader:
    """Puts the pictures of a file on a steady clock, chosen by timestamp."""

    def __init__(
        self,
        path: str | Path,
        video: VideoStream,
        fps: Fraction,
        size: tuple[int, int] | None,
        limit: Fraction | None,
    ) -> None:
        self.path = path
        self.video = video
        self.fps = fps
        self.size = size
        self.limit = limit
        self.kept: list[np.ndarray] = []
        self.shown: VideoFrame | None = None  # the picture on screen
        self.start: Fraction | None = None  # time of the first picture in the file, seconds
        self.interlaced = 0

    @property
    def notes(self) -> list[str]:
        """What the decoded pictures tell beyond the header."""
        return [INTERLACED_NOTE] if self.interlaced > 1 else []

    def read(self, container: InputContainer) -> np.ndarray:
        """(F, H, W, 3) uint8 at `fps`."""
        self.video.thread_type = "AUTO"
        step = Fraction(self.video.time_base or 0)
        last = end = Fraction(0)
        for frame in container.decode(self.video):
            if frame.pts is None:
                continue
            time = frame.pts * step
            if self.start is None:
                self.start = time
            if self.shown is not None:
                self._check_gap(last, time - self.start)
                self._emit(time - self.start)
            self.shown = frame
            self.interlaced += frame.interlaced_frame
            last = time - self.start
            end = time + (frame.duration * step if frame.duration else 1 / frame_rate(self.video))
            if self.limit is not None and last >= self.limit:
                break
        if self.start is None or self.shown is None:
            raise MediaError(f"path={self.path}: its video holds no decodable frame")
        self._check_gap(last, end - self.start)
        self._emit(end - self.start)
        if length_is_exact(self.path, container):
            check_complete(self.path, self.video, end, self.limit)
        if not self.kept:  # a single picture shorter than half an output frame still is a picture
            self.kept.append(show_frame(self.shown, self.video, self.size))
        return self._stacked()

    def _check_gap(self, last: Fraction, now: Fraction) -> None:
        """Refuse a picture that would stand for longer than `LONGEST_GAP`."""
        until = now if self.limit is None else min(now, self.limit)
        if until - last > LONGEST_GAP:
            raise MediaError(
                f"path={self.path}: its pictures have a gap of {float(now - last):.0f} s after "
                f"{float(last):.1f} s; needs at most {LONGEST_GAP} s (ffmpeg -i IN -r 25 OUT fills "
                "it)"
            )
        if self.limit is None and until > LONGEST_CLIP:
            raise MediaError(too_long(self.path, None))

    def _emit(self, until: Fraction) -> None:
        """Repeat the picture on screen for each output frame whose midpoint lies before `until`
        (since the start).
        """
        if self.limit is not None:
            until = min(until, self.limit)
        picture = None
        while (len(self.kept) + Fraction(1, 2)) / self.fps < until:
            if picture is None:
                picture = show_frame(self.shown, self.video, self.size)
            if self.kept and picture.shape != self.kept[0].shape:
                raise MediaError(f"path={self.path}: its pictures change their size midway")
            self.kept.append(picture)
            if len(self.kept) * picture.nbytes > MAX_BYTES:
                height, width = picture.shape[:2]
                raise MediaError(
                    f"path={self.path}: {len(self.kept)} frames of {width} x {height} are too many "
                    "for memory; give max_seconds or a smaller size"
                )

    def _stacked(self) -> np.ndarray:
        """All pictures as one array; each is let go when it is copied, so that memory holds them
        once.
        """
        self.kept.reverse()
        frames = np.empty((len(self.kept), *self.kept[0].shape), np.uint8)
        for index in range(len(frames)):
            frames[index] = self.kept.pop()
        return frames


def show_frame(
    frame: Any, video: VideoStream, size: tuple[int, int] | None, path: str | Path = ""
) -> np.ndarray:
    """One decoded frame as it is shown, (H, W, 3) uint8 sRGB, cropped and scaled to `size`."""
    display = display_of_frame(frame, video.sample_aspect_ratio)
    check_frame_size(path, *display.size(frame.height, frame.width))
    transfer = int(frame.color_trc)
    primaries = int(frame.color_primaries)
    if conversion_note(transfer, primaries) is None:
        return display.show(frame.to_ndarray(format="rgb24"), size)
    coded = frame.to_ndarray(format="rgb48le")
    return display.show(to_sdr(coded, transfer, primaries), size)
