"""Write clips with sound in sync.

Time is a `Fraction` here, never a float: a whole frame rate for 23.976 drifts by a frame every 42
seconds. Each stream of a written file has its exact length: the last frame carries its own
duration, and the 1,024 samples of AAC priming are hidden by an edit list in units of one sample
(`movie_timescale`), so a player starts both streams at zero. Video has no B-frames, hence needs no
edit list of its own: readers that ignore edit lists still see frame i at i / fps. `read_clip` gives
the sound back at its exact length; a reader that ignores the edit list gets the sound 1,024 samples
late and longer by less than two AAC frames.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from avdiff.clip import as_fps
from avdiff.media.animation import ANIMATIONS, SEQUENCES, write_animation, write_sequence
from avdiff.media.container import NOTICE, MediaError, media_url, reason
from avdiff.media.pictures import contact_sheet, spectrogram_picture
from avdiff.media.read import Clip, MediaInfo, probe, read_clip
from avdiff.media.sound import AAC_FRAME, resample_audio

__all__ = [
    "Clip",
    "MediaError",
    "MediaInfo",
    "contact_sheet",
    "has_codec",
    "probe",
    "read_clip",
    "resample_audio",
    "spectrogram_picture",
    "write_clip",
    "write_wav",
]

CONTAINERS = {
    ".mp4": "mp4",
    ".mov": "mov",
    ".mkv": "matroska",
    ".webm": "webm",
    ".m4a": "ipod",
    ".wav": "wav",
}
FILMS = (".mp4", ".mov", ".mkv", ".webm")  # pictures and sound
SOUNDS = (".m4a", ".wav")
SUFFIXES = (*FILMS, *SOUNDS, *ANIMATIONS, *SEQUENCES)  # all that can be written
VIDEO_CODECS = {".webm": "libvpx-vp9"}  # others: libx264
VIDEO_OPTIONS = {
    "libx264": {"crf": "17", "preset": "medium", "bf": "0"},
    "libvpx-vp9": {"crf": "18", "b": "0", "deadline": "good", "cpu-used": "4"},
}
SOUND_CODECS = {".webm": "libopus", ".mkv": "flac", ".wav": "pcm_s16le"}  # others: aac
LAYOUTS = {1: "mono", 2: "stereo"}
AAC_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)
OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def write_clip(
    path: str | Path,
    frames: Iterable[Any] | None,
    fps: Fraction | float | str | None,
    audio: Any | None = None,
    sample_rate: int | None = None,
    metadata: dict[str, Any] | None = None,
) -> None:
    """Write a clip; the suffix says how.

    Pictures and sound: .mp4 and .mov (H.264 + AAC), .mkv (H.264 + FLAC), .webm (VP9 + Opus). Sound
    alone: .m4a (AAC), .wav (16-bit PCM) and the four others. Pictures alone, whose sound is left
    out: animations .gif, .webp and .apng, and sequences .png (see `write_sequence`).

    The file appears under its name only when complete. Odd heights and widths are padded by one
    repeated row or column, as yuv420p needs even ones.

    Args:
        frames: (F, H, W, 3) array or tensor, or any iterable of (H, W, 3) pictures or PIL images (a
            generator keeps memory constant); uint8, or float in [0, 1]. Tensors may be (F, 3, H, W)
            and have a batch of one in front, as pipelines return them. None writes sound alone.
        fps: frame rate; 29.97 means 30000/1001.
        audio: (C, S), (1, C, S) or (S,) float, 1 or 2 channels; values beyond [-1, 1] are clipped.
            Or an iterator of such pieces.
        metadata: JSON-able facts (model, seed, prompt...); given, the comment tag says
            "AI-generated" and lists them.

    Raises:
        MediaError: wrong shapes, types or suffix, an unwritable place, a full disk. No partial file
            stays behind.
    """
    path = Path(path)
    try:
        facts = json.dumps(metadata, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise MediaError(f"metadata: needs what JSON can hold ({error})") from error
    channels, sound = (0, iter(())) if audio is None else _sound_pieces(audio, sample_rate)
    _check_target(path, frames is not None, channels > 0, sample_rate)
    rate = None
    if frames is not None:
        if fps is None:
            raise MediaError("fps=None: frames need a frame rate")
        rate = as_fps(fps)
        if max(rate.numerator, rate.denominator) >= 2**31:  # AVRational holds two 32-bit integers
            raise MediaError(
                f"fps={fps}: needs a ratio of smaller whole numbers such as 30000/1001"
            )
    suffix = path.suffix.lower()
    comment = None if metadata is None else f"{NOTICE} {facts}"
    if suffix in (*ANIMATIONS, *SEQUENCES):
        assert rate is not None, "_check_target refuses pictures' suffixes without pictures"
        _write_pictures(path, frames, rate, comment)
        return
    with _atomic(path) as temporary:
        options = {"movflags": "+faststart"} if suffix in (".mp4", ".mov", ".m4a") else {}
        if sample_rate is not None and options:  # of edit lists
            options["movie_timescale"] = str(sample_rate)
        with av.open(
            media_url(temporary), "w", format=CONTAINERS[suffix], options=options
        ) as container:
            if comment is not None:
                container.metadata["comment"] = comment
            codecs = (VIDEO_CODECS.get(suffix, "libx264"), SOUND_CODECS.get(suffix, "aac"))
            _encode(container, codecs, frames, rate, channels, sound, sample_rate)


def _write_pictures(
    path: Path, frames: Iterable[Any] | None, fps: Fraction, comment: str | None
) -> None:
    """An animation or a sequence of pictures."""
    pictures = _pictures(frames if frames is not None else (), even=False)
    first = next(pictures, None)
    if first is None:
        raise MediaError("frames: needs at least one picture")
    same = _same_sizes(chain([first], pictures))
    if path.suffix.lower() in SEQUENCES:
        try:
            write_sequence(path, same, comment)
        except OSError as error:
            raise MediaError(f"path={path}: cannot be written ({reason(error)})") from error
        return
    with _atomic(path) as temporary:
        write_animation(temporary, same, fps, comment)


def _same_sizes(pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    shape = None
    for index, picture in enumerate(pictures):
        shape = shape or picture.shape
        if picture.shape != shape:
            raise MediaError(f"frames: picture {index} differs in size from picture 0")
        yield picture


def write_wav(
    path: str | Path, audio: Any, sample_rate: int, metadata: dict[str, Any] | None = None
) -> None:
    """Write (C, S) or (S,) float sound as 16-bit PCM; errors as in `write_clip`."""
    if Path(path).suffix.lower() != ".wav":
        raise MediaError(f"path={path}: needs a name that ends in .wav")
    write_clip(path, None, None, audio, sample_rate, metadata)


def has_codec(name: str, mode: str = "w") -> bool:
    """Whether this PyAV can write ("w") or read ("r") a codec, by FFmpeg's name for it."""
    try:
        av.Codec(name, mode)  # type: ignore[arg-type]
    except (ValueError, av.FFmpegError):
        return False
    return True


def _encode(
    container: Any,
    codecs: tuple[str, str],
    frames: Iterable[Any] | None,
    fps: Fraction | None,
    channels: int,
    pieces: Iterator[np.ndarray],
    sample_rate: int | None,
) -> None:
    """Interleave both streams in time, so that a player can start before the end of the file."""
    pictures = iter(()) if frames is None else _pictures(frames)
    picture = next(pictures, None)
    if frames is not None and picture is None:
        raise MediaError("frames: needs at least one picture")
    video = (
        None
        if picture is None or fps is None
        else _add_video(container, codecs[0], picture.shape, fps)
    )
    sound: Any = (
        None
        if not channels or sample_rate is None
        else _add_sound(container, codecs[1], channels, sample_rate)
    )
    chunks: Iterator[Any] = iter(())
    if channels and sample_rate is not None:
        chunks = _sound_frames(pieces, sample_rate, sound)
    shape = None if picture is None else picture.shape
    count = 0
    heard = Fraction(0)
    while picture is not None and fps is not None and video is not None:
        if picture.shape != shape:
            raise MediaError(f"frames: picture {count} differs in size from picture 0")
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts = count
        frame.time_base = 1 / fps
        container.mux(video.encode(frame))
        count += 1
        while heard < count / fps and (chunk := next(chunks, None)) is not None:
            container.mux(sound.encode(chunk))
            heard = Fraction(chunk.pts + chunk.samples, chunk.sample_rate)
        picture = next(pictures, None)
    for chunk in chunks:
        container.mux(sound.encode(chunk))
    for stream in (video, sound):
        if stream is not None:
            container.mux(stream.encode(None))


def _add_video(container: Any, codec: str, shape: tuple[int, ...], fps: Fraction) -> Any:
    stream = container.add_stream(codec, rate=fps, options=VIDEO_OPTIONS[codec])
    stream.height = shape[0]
    stream.width = shape[1]
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = 1 / fps
    return stream


def _add_sound(container: Any, codec: str, channels: int, sample_rate: int) -> Any:
    stream: Any = container.add_stream(codec, rate=sample_rate, layout=LAYOUTS[channels])
    if codec == "aac":  # twice what speech needs; the encoder's own ceiling is 6 bits a sample
        stream.bit_rate = min(128_000, 4 * sample_rate) * channels
    elif codec == "libopus":
        stream.bit_rate = 96_000 * channels
    return stream


def _pictures(frames: Iterable[Any], even: bool = True) -> Iterator[np.ndarray]:
    """Yield each picture as (H, W, 3) uint8, with even sizes where the codec needs them."""
    if hasattr(frames, "detach"):
        frames = _as_array(frames)
        if frames.ndim == 5 and len(frames) == 1:
            frames = frames[0]
        if frames.ndim == 4 and frames.shape[1] == 3 and frames.shape[3] != 3:
            frames = frames.transpose(0, 2, 3, 1)
    for i, item in enumerate(frames):
        if isinstance(item, Image.Image):
            item = item.convert("RGB")
        picture = _as_array(item)
        if hasattr(item, "detach") and picture.ndim == 3 and picture.shape[2] != 3:
            picture = np.moveaxis(picture, 0, -1)  # tensors of pictures are (3, H, W) mostly
        if picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise MediaError(
                f"frames: picture {i} has shape {picture.shape}; needs (height, width, 3)"
            )
        if picture.dtype.kind == "f":
            if not np.isfinite(picture).all():
                raise MediaError(f"frames: picture {i} holds NaN or infinite values")
            picture = np.rint(np.clip(picture, 0, 1) * 255).astype(np.uint8)
        if picture.dtype != np.uint8:
            raise MediaError(
                f"frames: picture {i} is {picture.dtype}; needs uint8, or float in [0, 1]"
            )
        height, width, _ = picture.shape
        odd = (height % 2, width % 2) if even else (0, 0)
        yield np.pad(picture, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge")


def _as_array(values: Any) -> np.ndarray:
    """A tensor, also of bfloat16, a picture or numbers as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _as_audio(audio: Any, sample_rate: int | None) -> np.ndarray:
    """(C, S) float32 in [-1, 1], C of 1 or 2."""
    if not isinstance(sample_rate, int | np.integer) or not 1000 <= sample_rate <= 384_000:
        raise MediaError(f"sample_rate={sample_rate!r}: needs 1000 to 384000 Hz")
    samples = _as_array(audio)
    if samples.ndim == 3 and len(samples) == 1:
        samples = samples[0]
    samples = samples[None] if samples.ndim == 1 else samples
    if (
        samples.ndim != 2
        or samples.shape[0] not in (1, 2)
        or samples.shape[1] == 0
        or samples.dtype.kind != "f"
    ):
        found = f"{samples.dtype} of shape {samples.shape}"
        raise MediaError(f"audio: {found}; needs float (channels, samples) with 1 or 2 channels")
    if not np.isfinite(samples).all():
        raise MediaError("audio: holds NaN or infinite values")
    return np.ascontiguousarray(np.clip(samples, -1, 1), dtype=np.float32)


def _sound_pieces(audio: Any, sample_rate: int | None) -> tuple[int, Iterator[np.ndarray]]:
    """Channels, and the sound (C, S) in pieces of `AAC_FRAME` samples; the last may be shorter."""
    parts = (
        _as_audio(part, sample_rate) for part in (audio if isinstance(audio, Iterator) else [audio])
    )
    first = next(parts, None)
    if first is None:
        raise MediaError("audio: holds no piece of sound")

    def cut(rest: np.ndarray) -> Iterator[np.ndarray]:
        while rest.shape[1]:
            while rest.shape[1] < AAC_FRAME and (more := next(parts, None)) is not None:
                if len(more) != len(rest):
                    raise MediaError(
                        f"audio: a piece with {len(more)} channels follows one with {len(rest)}"
                    )
                rest = np.concatenate([rest, more], axis=1)
            yield rest[:, :AAC_FRAME]
            rest = rest[:, AAC_FRAME:]

    return len(first), cut(first)


def _sound_frames(pieces: Iterator[np.ndarray], sample_rate: int, stream: Any) -> Iterator[Any]:
    """The encoder's frames."""
    pcm = stream.codec_context.name in ("pcm_s16le", "flac")
    start = 0
    for piece in pieces:
        part = np.ascontiguousarray(piece)
        if pcm:  # packed 16-bit: (1, samples * channels)
            part = np.rint(part * 32767).astype(np.int16).T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(
            part, format="s16" if pcm else "fltp", layout=LAYOUTS[len(piece)]
        )
        frame.sample_rate = sample_rate
        frame.pts = start
        frame.time_base = Fraction(1, sample_rate)
        start += piece.shape[1]
        yield frame


def _check_target(path: Path, pictures: bool, sound: bool, sample_rate: int | None) -> None:
    suffix = path.suffix.lower()
    fits = (*FILMS, *ANIMATIONS, *SEQUENCES) if pictures else (*FILMS, *SOUNDS)
    if not pictures and not sound:
        raise MediaError("frames and audio are both None: there is nothing to write")
    if suffix not in fits:
        raise MediaError(f"path={path}: needs a name that ends in {', '.join(fits)}")
    codec = SOUND_CODECS.get(suffix, "aac") if suffix in CONTAINERS else ""
    rates = {"aac": ("AAC", AAC_RATES), "libopus": ("Opus", OPUS_RATES)}
    if sound and codec in rates and sample_rate not in rates[codec][1]:
        name, possible = rates[codec]
        raise MediaError(
            f"sample_rate={sample_rate}: {name} needs one of {', '.join(map(str, possible))}"
        )
    if "\0" in str(path):  # FFmpeg would write to the name up to there
        raise MediaError(f"path={str(path)!r}: holds a NUL character")
    if path.is_dir():
        raise MediaError(f"path={path}: is a folder, needs a file name")
    if not path.absolute().parent.is_dir():
        raise MediaError(f"path={path}: its folder does not exist")


@contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """Give a temporary name beside `path`; rename it on success, remove it on any failure."""
    temporary = path.with_name(f".{path.stem[:64]}.{os.getpid()}.partial{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except (OSError, av.FFmpegError) as error:
        raise MediaError(f"path={path}: cannot be written ({reason(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)
