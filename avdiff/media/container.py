"""Open media files safely: which containers are read, within which bounds, what headers say.

No file may start an interpreter or name another file to be opened: play-lists, scripts and
concatenations are not on the list of containers, and `file` is the only protocol. Whatever a header
claims, memory and time stay bounded by the limits below.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av

from avdiff.media.color import conversion_note

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.video.stream import VideoStream

NOTICE = "AI-generated"  # first words of the comment tag; the rest is one JSON object
# FFmpeg's demuxers that read the one file they are given and nothing else.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,asf,flv,mpeg,mpegts,mxf,nut,"
    "wav,w64,mp3,aac,flac,ogg,aiff,caf,au,ac3,eac3,amr,wv,tta,"
    "gif,apng,png_pipe,jpeg_pipe,bmp_pipe,webp_pipe,tiff_pipe"
)
CONTAINER_NAMES = (
    "MP4, MOV, MKV, WebM, AVI, MPEG, ASF, FLV, WAV, MP3, AAC, FLAC, Ogg, AIFF, CAF or a picture"
)
# Of these the header knows where a stream ends; others guess it from the bit rate or the last page.
EXACT_CONTAINERS = ("mov", "matroska", "wav", "w64", "flac", "ogg", "aiff", "caf", "avi", "nut")
LONGEST_CLIP = Fraction(600)  # seconds that are read at once unless the caller gives a length
LONGEST_GAP = Fraction(10)  # seconds between two pictures, or without sound, inside a clip
MAX_PIXELS = 2**25  # in a picture: 8K UHD (7680 x 4320) is the largest
MAX_BYTES = 3 * 2**29  # decoded frames held at once, 1.5 GiB
MAX_CHANNELS = 64
SAMPLE_RATES = (1000, 384_000)  # Hz
MAX_FRAME_RATE = 1000
XING_BYTES = 4096  # where an MP3 file says how many frames it has, if it says so


class MediaError(ValueError):
    """A file cannot be read or written as asked; the message is one plain sentence."""


@dataclass(frozen=True)
class Streams:
    """The streams of a file that are read: one of pictures, one of sound, either may be missing."""

    video: VideoStream | None
    audio: AudioStream | None


def reason(error: BaseException) -> str:
    """The system's or FFmpeg's words for an error, without its class, number and path."""
    return getattr(error, "strerror", None) or str(error).split("\n")[0]


def media_url(path: str | Path) -> str:
    """A file's name as FFmpeg takes it literally: a colon in it is no protocol, a dash no option.

    Raises:
        MediaError: the name holds a NUL character, at which FFmpeg would stop reading it.
    """
    if "\0" in str(path):
        raise MediaError(f"path={str(path)!r}: holds a NUL character")
    return f"file:{path}"


@contextmanager
def open_media(
    path: str | Path, audio_track: int | None = None
) -> Iterator[tuple[InputContainer, Streams]]:
    """Open a local file for reading, with its streams checked against the bounds.

    Args:
        audio_track: number of the sound track, from 1; None takes the one that players play.

    Raises:
        MediaError: no such file, none of the containers, no stream, or a header out of bounds.
    """
    path = Path(path)
    url = media_url(path)
    if path.is_dir():
        raise MediaError(f"path={path}: is a folder, needs a media file")
    if not path.is_file():
        raise MediaError(f"path={path}: no such file")
    options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
    try:
        with av.open(url, options=options, metadata_errors="replace") as container:
            streams = Streams(video_stream(container), audio_stream(path, container, audio_track))
            if streams.video is None and streams.audio is None:
                raise MediaError(f"path={path}: holds neither pictures nor sound")
            _check_video(path, streams.video)
            _check_audio(path, streams.audio)
            yield container, streams
    except av.error.ArgumentError as error:  # how FFmpeg answers to a container off the list
        raise MediaError(
            f"path={path}: cannot be read as media; needs {CONTAINER_NAMES}"
        ) from error
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"path={path}: cannot be read as media ({reason(error)})") from error


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first stream of pictures; a cover picture in a sound file is none."""
    cover = av.stream.Disposition.attached_pic
    moving = [stream for stream in container.streams.video if not stream.disposition & cover]
    return moving[0] if moving else None


def audio_stream(
    path: str | Path, container: InputContainer, number: int | None = None
) -> AudioStream | None:
    """A sound track by its number from 1, or the one that players play: the default, else the
    first.

    Raises:
        MediaError: there is no track of that number.
    """
    tracks = container.streams.audio
    if number is not None:
        if not 1 <= number <= len(tracks):
            raise MediaError(
                f"audio_track={number}: {path} has {len(tracks)} sound tracks, counted from 1"
            )
        return tracks[number - 1]
    default = av.stream.Disposition.default
    marked = [stream for stream in tracks if stream.disposition & default]
    return next(iter(marked or tracks), None)


def _check_video(path: Path, video: VideoStream | None) -> None:
    if video is None:
        return
    if video.codec_context is None or not video.time_base:
        raise MediaError(f"path={path}: its video is in a form that cannot be decoded")
    check_frame_size(path, video.codec_context.height, video.codec_context.width)
    if frame_rate(video) > MAX_FRAME_RATE:
        raise MediaError(
            f"path={path}: its header says {float(frame_rate(video)):.0f} frames a second; needs "
            f"at most {MAX_FRAME_RATE}"
        )


def _check_audio(path: Path, audio: AudioStream | None) -> None:
    if audio is None:
        return
    context = audio.codec_context
    if context is None or not audio.time_base:
        raise MediaError(f"path={path}: its audio is in a form that cannot be decoded")
    if not SAMPLE_RATES[0] <= context.sample_rate <= SAMPLE_RATES[1]:
        raise MediaError(
            f"path={path}: its sound has {context.sample_rate} samples a second; needs "
            f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[1]}"
        )
    if context.channels > MAX_CHANNELS:
        raise MediaError(
            f"path={path}: its sound has {context.channels} channels; needs at most {MAX_CHANNELS}"
        )


def check_frame_size(path: str | Path, height: int, width: int) -> None:
    """Refuse pictures beyond `MAX_PIXELS`.

    Raises:
        MediaError: too large.
    """
    if height * width > MAX_PIXELS:
        raise MediaError(
            f"path={path}: its pictures are {width} x {height}; needs at most {MAX_PIXELS} pixels"
        )


def frame_rate(video: VideoStream) -> Fraction:
    """Frames a second by the header; 25 where it does not say."""
    return video.average_rate or video.guessed_rate or Fraction(25)


def start_time(stream: VideoStream | AudioStream) -> Fraction:
    """Seconds at which a stream begins, by its header."""
    return (stream.start_time or 0) * Fraction(stream.time_base or 0)


def header_seconds(
    stream: VideoStream | AudioStream | None, container: InputContainer
) -> Fraction | None:
    """Length of a stream by its header; Matroska has it as a tag, else only the container's."""
    if stream is None:
        return None
    if stream.duration is not None:
        return stream.duration * Fraction(stream.time_base or 0)
    tagged = _clock_seconds(stream.metadata.get("DURATION", ""))
    if tagged is not None:
        return tagged
    return None if container.duration is None else Fraction(container.duration, av.time_base)


def _clock_seconds(text: str) -> Fraction | None:
    """ "00:00:01.200000000" -> 6/5, as Matroska tags tell a stream's length."""
    parts = text.strip("\0 ").split(":")
    with suppress(ValueError, ZeroDivisionError):
        if len(parts) == 3 and len(text) < 40:
            hours, minutes, seconds = parts
            total = int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)
            return total if total > 0 else None
    return None


def length_is_exact(path: str | Path, container: InputContainer) -> bool:
    """Whether the header knows how long a stream is, rather than guessing it."""
    names = container.format.name.split(",")
    if "mp3" in names:
        return _counts_frames(path)
    return any(name in EXACT_CONTAINERS for name in names)


def _counts_frames(path: str | Path) -> bool:
    """Whether an MP3 file starts with a table that counts its frames (Xing, Info or VBRI)."""
    with open(path, "rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # the tag's length: four groups of seven bits (ID3v2, 3.1)
            groups = [byte & 127 for byte in head[6:10]]
            length = (groups[0] << 21) + (groups[1] << 14) + (groups[2] << 7) + groups[3]
            file.seek(10 + length)
            head = b""
        head += file.read(XING_BYTES)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def measured_seconds(path: str | Path, audio_track: int | None = None) -> dict[str, Fraction]:
    """Length of each stream ("video", "audio") by the times of its packets, nothing decoded.

    Raises:
        MediaError: not a readable media file.
    """
    first: dict[str, Fraction] = {}
    last: dict[str, Fraction] = {}
    with open_media(path, audio_track) as (container, streams):
        wanted = [stream for stream in (streams.video, streams.audio) if stream is not None]
        for packet in container.demux(wanted):
            if packet.pts is None:
                continue
            stream = packet.stream
            step = Fraction(stream.time_base or 0)
            time = packet.pts * step
            length = (packet.duration or 0) * step
            if stream.type == "video" and not length:
                length = 1 / frame_rate(stream)
            first[stream.type] = min(first.get(stream.type, time), time)
            last[stream.type] = max(last.get(stream.type, time + length), time + length)
    return {kind: last[kind] - first[kind] for kind in first}


def read_tags(container: InputContainer) -> dict[str, Any]:
    """The file's tags; our own comment is unfolded into the facts it lists."""
    tags: dict[str, Any] = dict(container.metadata)
    if "COMMENT" in tags:  # Matroska writes names in capitals
        tags["comment"] = tags.pop("COMMENT")
    notice, _, facts = tags.get("comment", "").partition(" ")
    if notice == NOTICE:
        # somebody edited it, or nested it deep: the text itself stays under "comment"
        with suppress(ValueError, RecursionError):
            found = json.loads(facts)
            tags |= found if isinstance(found, dict) else {}
    return tags


def header_notes(container: InputContainer, streams: Streams) -> tuple[str, ...]:
    """What a user should know of a file though it can be read: other tracks, HDR, interlacing."""
    notes = []
    tracks = container.streams.audio
    if streams.audio is not None and len(tracks) > 1:
        number = tracks.index(streams.audio) + 1
        notes.append(
            f"has {len(tracks)} sound tracks; number {number} is taken, others with audio_track"
        )
    if streams.video is not None:
        context = streams.video.codec_context
        told = conversion_note(int(context.color_trc), int(context.color_primaries))
        notes += [told] if told else []
        if int(getattr(context, "field_order", 0) or 0) > 1:  # AVFieldOrder: 0 unknown, 1 frames
            notes.append(INTERLACED_NOTE)
    return tuple(notes)


INTERLACED_NOTE = (
    "is interlaced: two moments are mixed in each picture; deinterlace it first "
    "(ffmpeg -i IN -vf bwdif OUT)"
)
