"""`avdiff data check`: decode every clip of a folder and say what is wrong with it, before anything
learns from it.

A clip with a *problem* is refused; a *warning* is only told. Sound is never taken on trust: a clip
whose sound is missing, silent or broken is refused unless silence is allowed on purpose.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from avdiff.data.check_measures import (
    clipped_share,
    find_copies,
    likeness_code,
    loudness,
    mentions_sound,
    offset_estimate,
    silence_share,
)
from avdiff.data.clip_table import ClipEntry, find_clips
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.files import write_text
from avdiff.media.container import MediaError
from avdiff.media.probe import probe
from avdiff.media.read import Clip, read_clip
from avdiff.media.sound import CANCEL_NOTE, channels_cancel
from avdiff.media.stills import read_still
from avdiff.media.timestamps import has_variable_rate, picture_times
from avdiff.pixels import to_model

MOST_SILENCE = 0.9  # share of a clip; above it there is nothing to learn from its sound
SOME_SILENCE = 0.5
LOUDNESS_RANGE = (-40.0, -8.0)  # LUFS
MOST_CLIPPED = 1e-3  # share of samples
MOST_GAP = 0.1  # seconds between the ends, or the starts, of the two streams
SURE_OFFSET = (0.12, 4.0)  # seconds, deviations
LEAST_PSNR = 25.0  # dB
LONGEST = 60.0  # seconds decoded of a clip


@dataclass
class ClipReport:
    """What the check found in one clip. Seconds, dB, LUFS; None is "not measured"."""

    name: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    fps: float | None = None
    variable_rate: bool | None = None
    height: int | None = None
    width: int | None = None
    video_seconds: float | None = None
    audio_seconds: float | None = None
    sample_rate: int | None = None
    channels: int | None = None
    start_gap: float | None = None
    end_gap: float | None = None
    silence: float | None = None
    clipped: float | None = None
    loudness: float | None = None
    offset: float | None = None
    offset_sure: float | None = None
    round_trip_psnr: float | None = None

    @property
    def good(self) -> bool:
        """Whether the clip may be used."""
        return not self.problems


@dataclass
class FolderReport:
    """All clips of a folder, and the files that are none (`left_out`: name -> reason).

    `exit_code` is 1 when any clip was refused, 2 when none is good.
    """

    folder: str
    clips: list[ClipReport]
    allow_silent: bool = False
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def good(self) -> list[str]:
        """Names that may be used."""
        return [clip.name for clip in self.clips if clip.good]

    @property
    def refused(self) -> dict[str, str]:
        """Name -> reasons of every file that may not."""
        return {clip.name: "; ".join(clip.problems) for clip in self.clips if not clip.good}

    @property
    def exit_code(self) -> int:
        """For the command line."""
        return 2 if not self.good else 1 if self.refused else 0

    def as_json(self) -> str:
        """Everything, as JSON text; values that JSON does not know (-inf LUFS of silence) are
        null.
        """
        facts = {
            "folder": self.folder,
            "allow_silent": self.allow_silent,
            "exit_code": self.exit_code,
        }
        counts = {"good": len(self.good), "refused": len(self.refused)}
        clips = [asdict(clip) for clip in self.clips]
        record = {**facts, **counts, "left_out": self.left_out, "clips": clips}
        return json.dumps(_finite(record), ensure_ascii=False, indent=1)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def check_folder(
    folder: str | os.PathLike[str],
    allow_silent: bool = False,
    vae: Any = None,
    progress: Callable[[Iterable[ClipEntry]], Iterable[ClipEntry]] = iter,
    audio_track: int | None = None,
    audio_channel: int | None = None,
) -> FolderReport:
    """Decode every clip and report.

    Args:
        allow_silent: clips without sound, or with silence, get a warning instead of being refused.
        vae: video codec (`AVVideoVAE`); given, each clip goes through it and back.
        progress: wraps the list of clips, for a progress bar.
        audio_track, audio_channel: as in `ClipOptions`.

    Raises:
        ValueError: as `find_clips`.
    """
    table = find_clips(folder)
    clips: list[ClipReport] = []
    codes: dict[str, np.ndarray] = {}
    for entry in progress(table.entries):
        report, code = check_clip(entry, allow_silent, vae, audio_track, audio_channel)
        clips.append(report)
        if code is not None:
            codes[entry.name] = code
    copies = find_copies(codes)
    for clip in clips:
        if clip.name in copies:
            clip.warnings.append(f"is a copy, or nearly, of {copies[clip.name]}")
    clips += [ClipReport(name, [reason]) for name, reason in table.refused.items()]
    return FolderReport(str(folder), clips, allow_silent, table.left_out)


def check_clip(
    entry: ClipEntry,
    allow_silent: bool = False,
    vae: Any = None,
    audio_track: int | None = None,
    audio_channel: int | None = None,
) -> tuple[ClipReport, np.ndarray | None]:
    """Check one clip -> report, and its likeness code (None if it cannot be decoded)."""
    report = ClipReport(entry.name)
    try:
        report.warnings += entry.warnings
        if entry.is_still:
            return _check_still(entry, report, vae)
        clip = _decode(entry, report, audio_track, audio_channel)
    except (MediaError, ValueError, MemoryError) as error:
        report.problems.append(str(error))
        return report, None
    if clip.frames is not None:
        _check_pictures(clip, report, vae)
    _check_sound(clip, report, allow_silent)
    if clip.frames is not None and clip.audio is not None and clip.fps and clip.sample_rate:
        _check_together(clip, report)
    if clip.audio is not None and not any(mentions_sound(caption) for caption in entry.captions):
        report.warnings.append("no caption says a word about the sound")
    return report, likeness_code(clip.frames, clip.audio)


def _check_still(entry: ClipEntry, report: ClipReport, vae: Any) -> tuple[ClipReport, np.ndarray]:
    """A picture that trains looks: a clip of one frame, without sound."""
    assert entry.video is not None, "a still is a picture"
    picture = read_still(entry.video)
    report.height, report.width = picture.shape[:2]
    frames = picture[None]
    if picture.max() - picture.min() < 4:
        report.problems.append("the picture is one flat color")
    if vae is not None:
        _check_round_trip(frames, report, vae)
    return report, likeness_code(frames, None)


def _decode(
    entry: ClipEntry, report: ClipReport, audio_track: int | None, audio_channel: int | None
) -> Clip:
    """Headers into the report, then the pictures (small) and the sound."""
    main = entry.video or entry.audio
    assert main is not None, "find_clips refuses entries without media"
    apart = entry.audio is not None and entry.video is not None
    own_track = None if apart else audio_track
    info = probe(main, own_track)
    heard = probe(entry.audio, audio_track) if entry.audio else info
    report.fps = float(info.fps) if entry.video and info.fps else None
    report.height, report.width = (info.height, info.width) if entry.video else (None, None)
    report.video_seconds = _number(info.video_seconds) if entry.video else None
    report.audio_seconds = _number(heard.audio_seconds)
    report.sample_rate = heard.sample_rate
    report.channels = heard.channels
    report.start_gap = 0.0 if entry.audio else float(info.start_gap)
    if entry.video:
        report.variable_rate = has_variable_rate(picture_times(entry.video))
    side = min(max(info.height or 64, 16), 128)
    size = (
        (side, max(16, round(side * (info.width or side) / (info.height or side))))
        if entry.video
        else None
    )
    # a limit switches off the test whether a file is cut short, so only long files get one
    long = max(report.video_seconds or 0.0, report.audio_seconds or 0.0) > LONGEST
    limit = LONGEST if long else None
    channel = None if apart else audio_channel
    clip = read_clip(
        main, size=size, max_seconds=limit, audio_track=own_track, audio_channel=channel
    )
    report.warnings += clip.notes
    if entry.video and clip.frames is None:
        raise MediaError(f"{entry.name}: holds no pictures")
    if entry.audio and entry.video:
        sound = read_clip(
            entry.audio, max_seconds=limit, audio_track=audio_track, audio_channel=audio_channel
        )
        report.warnings += sound.notes
        clip = Clip(clip.frames, sound.audio, clip.fps, sound.sample_rate)
    return clip


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _check_pictures(clip: Clip, report: ClipReport, vae: Any) -> None:
    frames = clip.frames
    assert frames is not None, "called for clips with pictures"
    if report.variable_rate:
        report.warnings.append("variable frame rate: frames are taken by timestamp")
    if len(frames) < 2:
        report.problems.append("holds a single picture, not a video")
    elif frames.max() - frames.min() < 4:
        report.problems.append("all pictures are one flat colour")
    elif not np.any(np.diff(frames[:: max(1, len(frames) // 16)], axis=0)):
        report.warnings.append("the picture never changes")
    if vae is not None:
        _check_round_trip(frames, report, vae)


def _check_round_trip(frames: np.ndarray, report: ClipReport, vae: Any) -> None:
    """What the video codec keeps of the pictures."""
    report.round_trip_psnr = round_trip_psnr(frames, vae)
    if report.round_trip_psnr < LEAST_PSNR:
        report.warnings.append(
            f"the video codec keeps only {report.round_trip_psnr:.1f} dB of it (it knows drawings, "
            "not this): use a pipeline whose video VAE knows such pictures (cache it with its "
            "folder as --codecs)"
        )


def _check_sound(clip: Clip, report: ClipReport, allow_silent: bool) -> None:
    sound = clip.audio
    verdicts = report.warnings if allow_silent else report.problems
    if sound is None or not clip.sample_rate:
        verdicts.append("has no sound track")
        return
    if not np.isfinite(sound).all():
        report.problems.append("its sound holds values that are no numbers")
        return
    if channels_cancel(sound):
        report.problems.append(CANCEL_NOTE)
        return
    seconds = len(clip.frames) / float(clip.fps) if clip.frames is not None and clip.fps else None
    wanted = sound.shape[1] if seconds is None else round(seconds * clip.sample_rate)
    filled = np.pad(sound[:, :wanted], ((0, 0), (0, max(0, wanted - sound.shape[1]))))
    report.silence = silence_share(filled, clip.sample_rate)
    report.clipped = clipped_share(sound)
    report.loudness = loudness(sound, clip.sample_rate)
    if report.silence > MOST_SILENCE:
        verdicts.append(f"its sound is silent for {100 * report.silence:.0f} % of the clip")
    elif report.silence > SOME_SILENCE:
        report.warnings.append(f"its sound is silent for {100 * report.silence:.0f} % of the clip")
    if report.clipped > MOST_CLIPPED:
        report.warnings.append(f"{100 * report.clipped:.2f} % of its samples are clipped")
    if (
        report.silence <= MOST_SILENCE
        and not LOUDNESS_RANGE[0] <= report.loudness <= LOUDNESS_RANGE[1]
    ):
        report.warnings.append(f"its loudness is {report.loudness:.1f} LUFS")


def _check_together(clip: Clip, report: ClipReport) -> None:
    assert clip.frames is not None and clip.audio is not None and clip.fps and clip.sample_rate, (
        "called for whole clips"
    )
    report.end_gap = clip.audio.shape[1] / clip.sample_rate - len(clip.frames) / float(clip.fps)
    if abs(report.end_gap) > MOST_GAP:
        word = "longer" if report.end_gap > 0 else "shorter"
        report.warnings.append(f"its sound is {abs(report.end_gap):.2f} s {word} than its pictures")
    if report.start_gap is not None and abs(report.start_gap) > MOST_GAP:
        report.warnings.append(f"its sound starts {report.start_gap:+.2f} s after its pictures")
    offset, sure = offset_estimate(clip.frames, clip.audio, float(clip.fps), clip.sample_rate)
    report.offset = offset
    report.offset_sure = sure
    if abs(offset) >= SURE_OFFSET[0] and sure >= SURE_OFFSET[1]:
        report.warnings.append(f"its sound seems to be {offset:+.2f} s late against its pictures")


@torch.no_grad()
def round_trip_psnr(frames: np.ndarray, vae: Any, size: int = 128, count: int = 17) -> float:
    """PSNR in dB of the clip's first frames, at the codec's size, after encoding and decoding."""
    from PIL import Image, ImageOps

    stride = vae.config.temporal_compression_ratio
    count = 1 + (min(count, len(frames)) - 1) // stride * stride
    fitted = [
        np.asarray(ImageOps.fit(Image.fromarray(frame), (size, size))) for frame in frames[:count]
    ]
    x = to_model(np.stack(fitted)).permute(3, 0, 1, 2)[None]
    decoded = vae.decode(vae.encode(x.to(vae.dtype)).latent_dist.mode()).sample.float().clamp(-1, 1)
    return float(10 * torch.log10(4.0 / (decoded - x).square().mean().clamp_min(1e-10)))


def checked_clips(
    folder: str | os.PathLike[str],
    options: ClipOptions | None = None,
    report: FolderReport | None = None,
) -> RealClips:
    """The good clips of a folder as a dataset; what was refused, and why, is in its `refused`.

    Args:
        report: of an earlier check; None checks now.
    """
    options = options or ClipOptions()
    report = report or check_folder(
        folder,
        options.allow_silent,
        audio_track=options.audio_track,
        audio_channel=options.audio_channel,
    )
    clips = RealClips(folder, options, only=report.good)
    clips.refused |= report.refused
    return clips


def save_report(report: FolderReport, path: str | os.PathLike[str]) -> None:
    """Write the JSON as a whole or not at all."""
    write_text(path, report.as_json() + "\n")
