"""Facts of a media file: streams, sizes as shown, lengths, tags, and what a user should know."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from avdiff.media.container import (
    frame_rate,
    header_notes,
    header_seconds,
    length_is_exact,
    measured_seconds,
    open_media,
    read_tags,
    start_time,
)
from avdiff.media.display import Display, display_of_frame, sensible_aspect

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream


@dataclass(frozen=True)
class MediaInfo:
    """Facts of a media file; a stream that is missing has None in its fields.

    `height` and `width` are those of the picture as it is shown, upright and with square pixels.
    Durations are exact seconds: of the header, or, where a header only guesses, of the packets.
    `notes` are sentences that a user should read: other sound tracks, HDR, interlacing.
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
    audio_tracks: int = 0
    notes: tuple[str, ...] = ()


def probe(path: str | Path, audio_track: int | None = None) -> MediaInfo:
    """Facts of a file; no more than its first picture is decoded.

    Args:
        audio_track: number of the sound track, from 1; None takes the one that players play.

    Raises:
        MediaError: it is not a readable media file.
    """
    with open_media(path, audio_track) as (container, streams):
        video = streams.video
        audio = streams.audio
        exact = length_is_exact(path, container)
        video_seconds = header_seconds(video, container)
        audio_seconds = header_seconds(audio, container)
        tags = read_tags(container)
        notes = header_notes(container, streams)
        tracks = len(container.streams.audio)
        height = width = None
        if video is not None:
            stored = (video.codec_context.height, video.codec_context.width)
            height, width = _first_display(container, video).size(*stored)
    if not exact:
        measured = measured_seconds(path, audio_track)
        video_seconds = measured.get("video", video_seconds) if video is not None else None
        audio_seconds = measured.get("audio", audio_seconds) if audio is not None else None
    fps = frame_rate(video) if video is not None else None
    count = None
    if video is not None:
        count = video.frames or (round(video_seconds * fps) if video_seconds and fps else None)
    gap = start_time(audio) - start_time(video) if video and audio else Fraction(0)
    return MediaInfo(
        fps=fps,
        num_frames=count,
        height=height,
        width=width,
        video_codec=video.codec_context.name if video is not None else None,
        video_seconds=video_seconds,
        sample_rate=audio.codec_context.sample_rate if audio is not None else None,
        channels=audio.codec_context.channels if audio is not None else None,
        audio_codec=audio.codec_context.name if audio is not None else None,
        audio_seconds=audio_seconds,
        start_gap=gap,
        metadata=tags,
        audio_tracks=tracks,
        notes=notes,
    )


def _first_display(container: InputContainer, video: VideoStream) -> Display:
    """How the first picture is shown; a file whose first picture is damaged counts as upright."""
    aspect = video.sample_aspect_ratio
    with suppress(av.FFmpegError, StopIteration):
        return display_of_frame(next(container.decode(video)), aspect)
    return Display(pixel_aspect=sensible_aspect(aspect))
