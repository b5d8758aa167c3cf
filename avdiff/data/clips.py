"""Real clips on the model's clock: a folder becomes a dataset with the items of the presenter
corpus.

Pictures are taken by timestamp at the model's frame rate; sound is resampled and fitted to exactly
the clip's length. Every clip goes into one bucket of size and length, so that batches hold more
than one clip.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avdiff.clip import ClipSpec, Clock, as_fps
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.sample import ClipSample
from avdiff.corpus.speech.concatenate import tile
from avdiff.data.clip_table import ClipEntry, find_clips
from avdiff.data.forced_alignment import phones_of_clip
from avdiff.media.container import MediaError
from avdiff.media.frames import read_sound
from avdiff.media.probe import MediaInfo, probe
from avdiff.media.read import read_clip
from avdiff.media.sound import CANCEL_NOTE, channels_cancel, mix_channels
from avdiff.media.stills import STILL_SUFFIXES, read_still, still_size
from avdiff.phonetics.phone import Phone

SILENT_RMS = 10 ** (-60 / 20)  # under this level a sound is no sound
LONGEST_SPEECH = 60.0  # seconds of sound that words are looked for in
LONGEST_BUCKET = Fraction(10**6)  # seconds: a still fits any bucket
STRETCH = (
    0.8,
    1.25,
)  # a sound may be slowed or sped up this much to fit; beyond it is another recording


@dataclass(frozen=True)
class ClipOptions:
    """How real clips are read.

    Args:
        buckets: "WxHxF" joined by ";", such as "128x128x51;192x128x101" (F frames of the model's
            clock).
        fps, sample_rate, channels: what the model expects.
        fit: "pad" cuts a sound that is too long and fills one that is too short; "stretch" first
            brings a separate sound to the length of its video, by at most a quarter, without
            changing its pitch.
        allow_silent: keep clips without sound; their items have no "audio", so nothing learns
            silence.
        words: find out when the words that a caption quotes are heard; a clip that does not say
            them is refused. Without it items have no phones, and training learns no speech from
            them.
        audio_track, audio_channel: which sound of each file, counted from 1; None takes the track
            that players play, and all its channels.
    """

    buckets: str = "128x128x51"
    fps: Fraction | float | str = 25
    sample_rate: int = 24000
    channels: int = 1
    fit: str = "pad"
    allow_silent: bool = False
    words: bool = True
    audio_track: int | None = None
    audio_channel: int | None = None
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        if self.fit not in ("pad", "stretch"):
            raise ValueError(f"fit={self.fit!r}: needs 'pad' or 'stretch'")
        if self.channels not in (1, 2):
            raise ValueError(f"channels={self.channels}: needs 1 or 2")
        for name in ("audio_track", "audio_channel"):
            number = getattr(self, name)
            if number is not None and (type(number) is not int or number < 1):
                raise ValueError(f"{name}={number!r}: needs a number from 1")
        parse_buckets(self.buckets, self)


def parse_buckets(text: str, options: ClipOptions) -> list[ClipSpec]:
    """ "WxHxF;WxHxF" -> clips.

    Raises:
        ValueError: another form, or sizes off the codec's grid (the nearest that fit are named).
    """
    clips = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        numbers = part.lower().split("x")
        if len(numbers) != 3 or not all(n.strip().isdigit() for n in numbers):
            raise ValueError(f"buckets={part!r}: needs width x height x frames, such as 128x128x51")
        width, height, frames = (int(n) for n in numbers)
        clips.append(
            ClipSpec(frames, as_fps(options.fps), height, width, options.sample_rate, options.clock)
        )
    if not clips:
        raise ValueError(
            "buckets='': needs at least one width x height x frames, such as 128x128x51"
        )
    return clips


def choose_bucket(
    buckets: Sequence[ClipSpec], height: int, width: int, seconds: Fraction
) -> ClipSpec | None:
    """The bucket nearest in shape among those that the clip fills in time; of these the longest,
    then the largest.
    """
    filled = [b for b in buckets if b.seconds <= seconds + Fraction(1, 2) / b.fps]
    if not filled:
        return None
    away = {b: abs(np.log(width / height) - np.log(b.width / b.height)) for b in filled}
    nearest = min(away.values())
    return max(
        (b for b in filled if away[b] <= nearest + 1e-6),
        key=lambda b: (b.num_frames, b.width * b.height),
    )


class RealClips(Dataset):
    """Clips of a folder. Items are `ClipSample`s:

    video (F, H, W, 3) uint8 and audio (C, samples) float32 tensors (where the clip has them), fps,
    sample_rate, caption, captions, language, text (the words that the caption quotes), phones (when
    they are heard, as in `phones_of_clip`; empty without words or sound), impacts (), attributes
    {}, kind "clip", name, and where given video_mask (F, H, W) bool, audio_mask (samples,) bool,
    reference_video (F, H, W, 3) uint8, reference_audio (C, samples).

    A still picture is a clip of one frame without sound. `refused` names every clip that is not
    used, `left_out` every file that is none, with the reason.

    Args:
        folder: see `find_clips`. options: buckets, clock, what to do without sound.
        only: names to use (those that a check found good); None uses all.

    Raises:
        ValueError: the folder holds no clip that can be used.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        options: ClipOptions | None = None,
        only: Collection[str] | None = None,
    ) -> None:
        self.options = options or ClipOptions()
        self.buckets = parse_buckets(self.options.buckets, self.options)
        table = find_clips(folder)
        self.folder = table.folder
        self.refused = table.refused
        self.left_out = table.left_out
        self.entries: list[ClipEntry] = []
        self.specs: list[ClipSpec] = []
        self._held: list[tuple[str, ...]] = []
        self._phones: dict[str, tuple[Phone, ...]] = {}  # heard once, not in every epoch
        for entry in table.entries:
            if only is not None and entry.name not in only:
                self.refused.setdefault(entry.name, "left out: the check found it bad")
                continue
            try:
                spec, held = self._choose_spec(entry)
            except (MediaError, ValueError) as error:
                self.refused[entry.name] = str(error)
                continue
            self.entries.append(entry)
            self.specs.append(spec)
            self._held.append(held)
        if not self.entries:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(self.refused.items())[:5])
            raise ValueError(f"folder={str(folder)!r}: no clip in it can be used ({reasons})")

    def _choose_spec(self, entry: ClipEntry) -> tuple[ClipSpec, tuple[str, ...]]:
        """Bucket and modalities of an entry, from headers alone; a still is a clip of one frame."""
        if entry.is_still:
            assert entry.video is not None, "a still is a picture"
            height, width = still_size(entry.video)
            shape = choose_bucket(self.buckets, height, width, LONGEST_BUCKET)
            assert shape is not None, "a bucket of any length"
            return replace(shape, num_frames=1), ("video",)
        track = self.options.audio_track
        seen = probe(entry.video, None if entry.audio else track) if entry.video else None
        heard = probe(entry.audio, track) if entry.audio else seen
        sounding = heard is not None and heard.sample_rate is not None
        if entry.video and (seen is None or seen.video_seconds is None):
            raise ValueError("holds no pictures")
        if not sounding and not self.options.allow_silent:
            raise ValueError("has no sound track; allow_silent keeps it as pictures only")
        held = (("video",) if entry.video else ()) + (("audio",) if sounding else ())
        spec = self._bucket(seen, heard)
        return spec, held

    def _bucket(self, seen: MediaInfo | None, heard: MediaInfo | None) -> ClipSpec:
        info = seen or heard
        seconds = (
            seen.video_seconds if seen else heard.audio_seconds if heard else None
        ) or Fraction(0)
        height, width = (info.height or 1, info.width or 1) if seen and info else (1, 1)
        spec = choose_bucket(self.buckets, height, width, seconds)
        if spec is None:
            shortest = min(self.buckets, key=lambda b: b.seconds)
            raise ValueError(
                f"lasts {float(seconds):.2f} s; the shortest bucket needs "
                f"{float(shortest.seconds):.2f} s"
            )
        return spec

    def __len__(self) -> int:
        return len(self.entries)

    def clip(self, index: int) -> ClipSpec:
        """Size and length of a clip on the clock."""
        return self.specs[index]

    def modalities(self, index: int) -> tuple[str, ...]:
        """Which of "video" and "audio" a clip has."""
        return self._held[index]

    def groups(self) -> list[tuple[Any, ...]]:
        """Bucket of each clip: clips with equal values may share a batch."""
        return [(spec, *held) for spec, held in zip(self.specs, self._held, strict=True)]

    def __getitem__(self, index: int) -> ClipSample:
        """Decode one clip.

        Raises:
            MediaError: the file cannot be decoded, or its sound is silence (unless allow_silent):
                the message names it.
        """
        entry = self.entries[index]
        spec = self.specs[index]
        held = self._held[index]
        item: ClipSample = {
            "name": entry.name,
            "index": index,
            "kind": "clip",
            "fps": spec.fps,
            "sample_rate": spec.sample_rate,
            "caption": entry.caption,
            "captions": list(entry.captions),
            "language": str(entry.extra.get("language", "en")),
            "split": str(entry.extra.get("split", "train")),
            "text": "",
            "phones": (),
            "contacts": (),
            "attributes": {},
        }
        film_sound = None
        if entry.is_still and entry.video:
            item["video"] = _still(entry.video, spec)
        elif entry.video:
            item["video"], film_sound = self._pictures(entry, entry.video, spec)
        if "audio" in held:
            sound = self._sound(entry, film_sound, spec)
            if np.sqrt(np.mean(sound**2)) >= SILENT_RMS:
                item["audio"] = torch.from_numpy(sound)
                item |= self._words(entry, spec, sound)
            elif not self.options.allow_silent:
                raise MediaError(
                    f"{entry.name}: its sound is silence where it is used; run `avdiff data check`"
                )
        return item | self._masks_and_references(entry, spec)

    def _words(self, entry: ClipEntry, spec: ClipSpec, sound: np.ndarray) -> dict[str, Any]:
        """Text and phones of the quoted words, which may go on after the clip's end, where `sound`
        (C, S) stops.
        """
        if entry.name not in self._phones:
            try:
                phones = self._spoken(entry, spec, sound)
            except (ValueError, TypeError, IndexError) as error:
                raise MediaError(f"{entry.name}: {error}") from error
            self._phones[entry.name] = tile(phones, float(spec.seconds)) if phones else ()
        return {"text": parse_prompt(entry.caption)[1] or "", "phones": self._phones[entry.name]}

    def _spoken(self, entry: ClipEntry, spec: ClipSpec, sound: np.ndarray) -> Sequence[Phone]:
        """Timed phones: those of the metadata (as `avdiff data corpus` writes them), else those
        aligned with the words in the whole sound; none without words.
        """
        known = entry.extra.get("phones")
        text = parse_prompt(entry.caption)[1]
        path = entry.audio or entry.video
        if isinstance(known, list):
            return [Phone(str(p[0]), float(p[1]), float(p[2]), *map(int, p[3:4])) for p in known]
        if not text or path is None or not self.options.words:
            return ()
        rate = spec.sample_rate
        language = entry.extra.get("language")
        if self.options.fit == "pad" and (whole := read_sound(path, *self._which_sound)):
            sound = whole[0][: round(LONGEST_SPEECH * whole[1])]
            rate = whole[1]
        return phones_of_clip(text, sound, rate, None if language is None else str(language))

    def _pictures(
        self, entry: ClipEntry, path: Path, spec: ClipSpec
    ) -> tuple[torch.Tensor, np.ndarray | None]:
        """(F, H, W, 3) uint8, and the file's own sound (C, S) at the model's rate."""
        size = (spec.height, spec.width)
        which = self._which_sound if path == entry.video and not entry.audio else (None, None)
        clip = read_clip(path, spec.fps, size, spec.sample_rate, spec.seconds, *which)
        if clip.frames is None:
            raise MediaError(f"{entry.name}: holds no pictures")
        frames = clip.frames[: spec.num_frames]
        if len(frames) < spec.num_frames - 1:
            raise MediaError(
                f"{entry.name}: {len(frames)} of {spec.num_frames} frames could be decoded"
            )
        frames = np.concatenate([frames, frames[-1:].repeat(spec.num_frames - len(frames), axis=0)])
        return torch.from_numpy(np.ascontiguousarray(frames)), clip.audio

    def _sound(self, entry: ClipEntry, film_sound: np.ndarray | None, spec: ClipSpec) -> np.ndarray:
        """(channels, samples) float32, exactly as long as the clip."""
        sound = film_sound
        if entry.audio:
            stretch = self.options.fit == "stretch" and entry.video is not None
            limit = None if stretch else spec.seconds
            track, channel = self._which_sound
            sound = read_clip(
                entry.audio,
                sample_rate=spec.sample_rate,
                max_seconds=limit,
                audio_track=track,
                audio_channel=channel,
            ).audio
            if sound is not None and stretch and entry.video:
                sound = self._stretched(sound, entry.video, spec.sample_rate)
        if sound is None:
            raise MediaError(f"{entry.name}: holds no sound")
        if len(sound) > self.options.channels and channels_cancel(sound):
            raise MediaError(f"{entry.name}: {CANCEL_NOTE}")
        return fit_length(mix_channels(sound, self.options.channels), spec.num_samples)

    @property
    def _which_sound(self) -> tuple[int | None, int | None]:
        """Track and channel that are asked for, counted from 1."""
        return self.options.audio_track, self.options.audio_channel

    def _stretched(self, sound: np.ndarray, video: Path, rate: int) -> np.ndarray:
        """Bring a separate sound to the length of its video where the gap is small enough."""
        wanted = float(probe(video).video_seconds or 0)
        factor = sound.shape[1] / rate / wanted if wanted else 1.0
        return (
            stretch_time(sound, factor)
            if STRETCH[0] <= factor <= STRETCH[1] and abs(factor - 1) > 1e-3
            else sound
        )

    def _masks_and_references(self, entry: ClipEntry, spec: ClipSpec) -> dict[str, torch.Tensor]:
        """Masks and references."""
        found: dict[str, torch.Tensor] = {}
        for name in ("video_mask", "reference_video"):
            path: Path | None = getattr(entry, name)
            if path is not None:
                frames, _ = (
                    self._pictures(entry, path, spec)
                    if not _is_still(path)
                    else (_still(path, spec), None)
                )
                found[name] = frames.float().mean(-1) > 127 if name == "video_mask" else frames
        for name in ("audio_mask", "reference_audio"):
            path = getattr(entry, name)
            if path is not None:
                sound = read_clip(
                    path, sample_rate=spec.sample_rate, max_seconds=spec.seconds
                ).audio
                if sound is None:
                    raise MediaError(f"{entry.name}: its {name} {path.name} holds no sound")
                line = fit_length(mix_channels(sound, self.options.channels), spec.num_samples)
                found[name] = torch.from_numpy(
                    np.abs(line).max(0) > 0.5 if name == "audio_mask" else line
                )
        return found


def _is_still(path: Path) -> bool:
    return path.suffix.lower() in STILL_SUFFIXES


def _still(path: Path, spec: ClipSpec) -> torch.Tensor:
    """A picture repeated for the whole clip: (F, H, W, 3) uint8."""
    picture = read_still(path, (spec.height, spec.width))
    frames = torch.from_numpy(np.array(picture))[None]
    return frames.expand(spec.num_frames, -1, -1, -1).contiguous()


def fit_length(sound: np.ndarray, samples: int) -> np.ndarray:
    """Cut or fill with silence at the end: (C, S) -> (C, samples) float32."""
    sound = sound[:, :samples].astype(np.float32)
    return np.ascontiguousarray(np.pad(sound, ((0, 0), (0, samples - sound.shape[1]))))


def stretch_time(sound: np.ndarray, factor: float) -> np.ndarray:
    """Play (C, S) faster by `factor` (slower below 1) at the same pitch: phase vocoder -> (C,
    round(S / factor)).
    """
    import torchaudio

    size = 1024
    hop = 256
    window = torch.hann_window(size)
    length = round(sound.shape[1] / factor)
    spectrum = torch.stft(torch.from_numpy(sound), size, hop, window=window, return_complex=True)
    advance = torch.linspace(0, torch.pi * hop, size // 2 + 1)[:, None]
    slower = torchaudio.functional.phase_vocoder(spectrum, factor, advance)
    return torch.istft(slower, size, hop, window=window, length=length).numpy()
