"""Decode media files by their timestamps; callers import these names from `avdiff.media.write`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image, ImageOps

from avdiff.clip import as_fps

AAC_FRAME = 1024  # samples in an AAC access unit (ISO/IEC 14496-3)
MAX_BYTES = (
    4 * 2**30
)  # decoded frames held at once; beyond it a request is a mistake and would exhaust memory
NOTICE = "AI-generated"  # first words of the comment tag; the rest is one JSON object


class MediaError(ValueError):
    """A file cannot be read or written as asked; the message is one plain sentence."""


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
    """

    frames: np.ndarray | None
    audio: np.ndarray | None
    fps: Fraction | None
    sample_rate: int | None
    start_gap: Fraction = Fraction(0)
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MediaInfo:
    """Header facts of a media file; a stream that is missing has None in its fields. Durations in
    exact seconds.
    """

    fps: Fraction | None
    num_frames: int | None
    height: int | None
    width: int | None
    video_codec: str | None
    video_seconds: Fraction | None
    sample_rate: int | None
    channels: int | None
    audio_codec: str | None
    audio_seconds: Fraction | None
    start_gap: Fraction
    metadata: dict[str, Any]


def reason(error: BaseException) -> str:
    """The system's or FFmpeg's words for an error, without its class, number and path."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


def probe(path: str | Path) -> MediaInfo:
    """Header facts of a file, without decoding it. Raises MediaError if it is not a readable media
    file.
    """
    with _opened(path) as container:
        video, audio = _streams(container)
        rate = _rate(video) if video else None
        seconds = _stream_seconds(video, container)
        count = (
            (video.frames or (round(seconds * rate) if seconds and rate else None))
            if video
            else None
        )
        gap = _start(audio) - _start(video) if video and audio else Fraction(0)
        return MediaInfo(
            fps=rate,
            num_frames=count,
            height=video.codec_context.height if video else None,
            width=video.codec_context.width if video else None,
            video_codec=video.codec_context.name if video else None,
            video_seconds=seconds,
            sample_rate=audio.codec_context.sample_rate if audio else None,
            channels=audio.codec_context.channels if audio else None,
            audio_codec=audio.codec_context.name if audio else None,
            audio_seconds=_stream_seconds(audio, container),
            start_gap=gap,
            metadata=_tags(container),
        )


def read_clip(
    path: str | Path,
    fps: Fraction | float | str | None = None,
    size: int | tuple[int, int] | None = None,
    sample_rate: int | None = None,
    max_seconds: Fraction | float | None = None,
) -> Clip:
    """Decode a file by its timestamps.

    Args:
        fps: frames wanted per second; output frame i is the picture on screen at (i + 1/2) / fps
            after the first one, so that variable rates, dropped frames and millisecond timestamps
            come out right. None: the file's own rate.
        size: (height, width) or one number for both; the picture is cropped at the centre to the
            shape, then scaled.
        sample_rate: Hz wanted; None: the file's own. max_seconds: read only so much from the start.

    Raises:
        MediaError: no such file, a folder, not a media file, cut short, or more frames than memory
            should hold.
    """
    target = (size, size) if isinstance(size, int) else size
    if target is not None and not all(1 <= side <= 16384 for side in target):
        raise MediaError(f"size={size}: needs sides from 1 to 16384 pixels")
    if max_seconds is not None and not 0 < max_seconds < float("inf"):
        raise MediaError(f"max_seconds={max_seconds}: needs a positive number")
    if sample_rate is not None and not 1000 <= sample_rate <= 384_000:
        raise MediaError(f"sample_rate={sample_rate}: needs 1000 to 384000 Hz")
    limit = None if max_seconds is None else Fraction(max_seconds)
    frames = rate = start = None
    with _opened(path) as container:
        video, _ = _streams(container)
        tags = _tags(container)
        if video is not None:
            rate = as_fps(fps) if fps is not None else _rate(video)
            start, frames = _read_pictures(path, container, video, rate, target, limit)
    with _opened(
        path
    ) as container:  # a second pass: two decoders in one pass would hold packets of both
        _, audio = _streams(container)
        if audio is None:
            return Clip(frames, None, rate, None, Fraction(0), tags)
        own_rate = audio.codec_context.sample_rate
        sound_start, sound = _read_sound(path, container, audio, start, limit)
    gap = Fraction(0) if start is None else sound_start - start
    sound = _align(sound, round(gap * own_rate), None if limit is None else round(limit * own_rate))
    if sample_rate is not None and sample_rate != own_rate:
        sound = resample_audio(sound, own_rate, sample_rate)
    return Clip(frames, sound, rate, sample_rate or own_rate, gap, tags)


def resample_audio(audio: np.ndarray, from_rate: int, to_rate: int) -> np.ndarray:
    """(C, S) float32 at `from_rate` Hz -> (C, round(S * to_rate / from_rate)) at `to_rate`, without
    delay.
    """
    length = round(audio.shape[1] * Fraction(to_rate, from_rate))
    result = np.zeros((len(audio), length), np.float32)
    for channel, samples in enumerate(audio):
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=to_rate)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples[None]), format="fltp", layout="mono"
        )
        frame.sample_rate = from_rate
        frame.pts = 0
        frame.time_base = Fraction(1, from_rate)
        parts = [f.to_ndarray()[0] for f in (*resampler.resample(frame), *resampler.resample(None))]
        line = np.concatenate(parts)[:length] if parts else np.zeros(0, np.float32)
        result[channel, : len(line)] = line
    return result


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """Open a local file for reading; FFmpeg's errors become one sentence."""
    path = Path(path)
    if path.is_dir():
        raise MediaError(f"path={path}: is a folder, needs a media file")
    if not path.is_file():
        raise MediaError(f"path={path}: no such file")
    try:  # play-lists may name other places: nothing but local files is opened
        with av.open(
            str(path), options={"protocol_whitelist": "file"}, metadata_errors="replace"
        ) as container:
            if not any(_streams(container)):
                raise MediaError(f"path={path}: holds neither pictures nor sound")
            for stream in filter(None, _streams(container)):
                if stream.codec_context is None or not stream.time_base:
                    raise MediaError(
                        f"path={path}: its {stream.type} is in a form that cannot be decoded"
                    )
            yield container
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"path={path}: cannot be read as media ({reason(error)})") from error


def _streams(container: Any) -> tuple[Any | None, Any | None]:
    """First video and first audio stream; a cover picture in a sound file is not video."""
    moving = [
        s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
    ]
    return (moving[0] if moving else None), (
        container.streams.audio[0] if container.streams.audio else None
    )


def _rate(video: Any) -> Fraction:
    return video.average_rate or video.guessed_rate or Fraction(25)


def _start(stream: Any) -> Fraction:
    return (stream.start_time or 0) * stream.time_base


def _stream_seconds(stream: Any | None, container: Any) -> Fraction | None:
    """Exact length by the stream's header; Matroska has only the container's, in microseconds."""
    if stream is None:
        return None
    if stream.duration is not None:
        return stream.duration * stream.time_base
    return None if container.duration is None else Fraction(container.duration, av.time_base)


def _tags(container: Any) -> dict[str, Any]:
    """The file's tags; our own comment is unfolded into the facts it lists."""
    tags: dict[str, Any] = dict(container.metadata)
    notice, _, facts = tags.get("comment", "").partition(" ")
    if notice == NOTICE:
        with contextlib.suppress(
            ValueError, TypeError
        ):  # somebody edited it: the text itself stays under "comment"
            tags |= json.loads(facts)
    return tags


def _read_pictures(
    path: str | Path,
    container: Any,
    video: Any,
    fps: Fraction,
    size: tuple[int, int] | None,
    limit: Fraction | None,
) -> tuple[Fraction, np.ndarray]:
    """Start time of the first picture and (F, H, W, 3) uint8 at `fps`, chosen by timestamp."""
    video.thread_type = "AUTO"
    kept: list[np.ndarray] = []
    shown = start = end = None

    def emit(until: Fraction) -> None:
        """Repeat the picture on screen for each output frame whose midpoint lies before `until`
        (since the start).
        """
        picture = None
        while (len(kept) + Fraction(1, 2)) / fps < until:
            if picture is None:
                picture = _picture(shown, size)
            kept.append(picture)
            if len(kept) * picture.nbytes > MAX_BYTES:
                size_text = f"{len(kept)} frames of {picture.shape[1]} x {picture.shape[0]}"
                raise MediaError(
                    f"path={path}: {size_text} are too many for memory; give max_seconds or a "
                    "smaller size"
                )

    for frame in container.decode(video):
        if frame.pts is None:
            continue
        time = frame.pts * video.time_base
        start = time if start is None else start
        if shown is not None:
            emit(min(time - start, limit) if limit is not None else time - start)
        shown = frame
        end = time + (frame.duration * video.time_base if frame.duration else 1 / _rate(video))
        if limit is not None and time - start >= limit:
            break
    if start is None or end is None:
        raise MediaError(f"path={path}: its video holds no decodable frame")
    emit(min(end - start, limit) if limit is not None else end - start)
    _check_complete(path, video, end, limit)
    if not kept:  # a single picture shorter than half an output frame still is a picture
        kept.append(_picture(shown, size))
    return start, np.stack(kept)


def _picture(frame: Any, size: tuple[int, int] | None) -> np.ndarray:
    """One decoded frame upright, (H, W, 3) uint8, cropped and scaled to `size`."""
    picture = frame.to_ndarray(format="rgb24")
    if (
        frame.rotation % 90 == 0
    ):  # phones film sideways and note it; the sign follows FFmpeg's display matrix
        picture = np.rot90(picture, frame.rotation // 90)
    if size is not None and picture.shape[:2] != size:
        picture = np.asarray(
            ImageOps.fit(Image.fromarray(picture), (size[1], size[0]), Image.Resampling.BICUBIC)
        )
    return np.ascontiguousarray(picture)


def _read_sound(
    path: str | Path, container: Any, audio: Any, start: Fraction | None, limit: Fraction | None
) -> tuple[Fraction, np.ndarray]:
    """Start time of the first sample and (C, S) float32 at the file's rate; holes in the timestamps
    become silence.
    """
    rate = audio.codec_context.sample_rate
    converter = av.AudioResampler(format="fltp")
    parts: list[np.ndarray] = []
    begin = None
    position = 0
    for frame in container.decode(audio):
        here = (begin or Fraction(0)) + Fraction(position, rate)
        time = here if frame.pts is None else frame.pts * frame.time_base
        begin = time if begin is None else begin
        hole = round((time - begin) * rate) - position
        for piece in converter.resample(frame):
            samples = piece.to_ndarray()
            if hole > 2 * AAC_FRAME:  # smaller ones are rounded timestamps
                if samples.shape[0] * hole * 4 > MAX_BYTES:
                    raise MediaError(f"path={path}: its sound has a hole of {hole // rate} s")
                parts.append(np.zeros((samples.shape[0], hole), np.float32))
                position = position + hole
                hole = 0
            parts.append(samples)
            position += samples.shape[1]
        if (
            limit is not None
            and begin + Fraction(position, rate) >= (begin if start is None else start) + limit
        ):
            break
    if begin is None or not parts:
        raise MediaError(f"path={path}: its sound holds no decodable sample")
    _check_complete(path, audio, begin + Fraction(position, rate), limit)
    sound = np.concatenate(parts, axis=1)
    if (
        audio.duration is not None
    ):  # the last AAC frame is padded: the header knows where the sound ends
        sound = sound[
            :, : max(1, round((audio.duration * audio.time_base + _start(audio) - begin) * rate))
        ]
    return begin, sound


def _check_complete(path: str | Path, stream: Any, end: Fraction, limit: Fraction | None) -> None:
    """A file cut short decodes without complaint up to the cut; its header tells."""
    if stream.duration is not None:
        seconds = stream.duration * stream.time_base
        expected = _start(stream) + (seconds if limit is None else min(seconds, limit))
        if end < expected - max(Fraction(1, 4), expected / 50):
            found = f"its {stream.type} ends at {float(end):.2f} s of {float(expected):.2f} s"
            raise MediaError(f"path={path}: is cut short, {found}")


def _align(sound: np.ndarray, late: int, length: int | None) -> np.ndarray:
    """Put `late` samples of silence in front (negative: cut them off), then keep at most `length`
    samples.
    """
    sound = np.pad(sound, ((0, 0), (late, 0))) if late > 0 else sound[:, -late:]
    return sound if length is None else sound[:, :length]
