"""Codec training on a user's own folder: any media files, no captions needed; files that cannot be
read are named.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from avdiff.data.clip_table import AUDIO_SUFFIXES, VIDEO_SUFFIXES
from avdiff.media.write import MediaError, read_clip

FPS = Fraction(25)
RATE = 24000
LONGEST = 60.0  # s that are read of a file
HELD_OUT = 10  # every tenth file is measured on


@dataclass(frozen=True)
class OwnSound:
    """A file's sound, with the two fields of an utterance that codec training reads."""

    id: str
    duration: float


class OwnClips:
    """Readable media files of a folder and all below it, split into "train" and "val" files.

    Args:
        folder: to look in. split: every tenth file (at least one) is "val". streams: "video" or
            "audio", which a file must have.

    Raises:
        ValueError: no such folder, or too few files of that kind.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str, streams: str) -> None:
        root = Path(folder)
        if not root.is_dir():
            raise ValueError(f"data={str(folder)!r}: no such folder")
        kinds = VIDEO_SUFFIXES if streams == "video" else VIDEO_SUFFIXES | AUDIO_SUFFIXES
        self.refused: dict[str, str] = {}
        files = sorted(p for p in root.rglob("*") if p.is_file() and p.suffix.lower() in kinds)
        self.files = [p for p in files if self._readable(p, streams)]
        if len(self.files) < 2:
            told = "".join(f"; {name}: {reason}" for name, reason in list(self.refused.items())[:3])
            raise ValueError(
                f"data={str(folder)!r}: needs at least 2 files with {streams}, has "
                f"{len(self.files)}"
                f"{told}"
            )
        self.files = [
            p for i, p in enumerate(self.files) if (i % HELD_OUT == 0) == (split == "val")
        ]

    def _readable(self, path: Path, streams: str) -> bool:
        try:
            clip = read_clip(path, fps=FPS, size=16, sample_rate=RATE, max_seconds=LONGEST)
        except MediaError as error:
            self.refused[path.name] = str(error)
            return False
        held = clip.frames if streams == "video" else clip.audio
        if held is None or not held.size:
            self.refused[path.name] = f"has no {streams}"
        return path.name not in self.refused


def windows(clips: OwnClips, num_frames: int) -> list[tuple[Path, int]]:
    """(file, first frame) of every piece of `num_frames` that does not overlap the next.

    Raises:
        ValueError: no file is that long.
    """
    found = []
    for path in clips.files:
        frames = read_clip(path, fps=FPS, size=16, max_seconds=LONGEST).frames
        assert frames is not None
        found += [(path, first) for first in range(0, len(frames) - num_frames + 1, num_frames)]
    if not found:
        raise ValueError(
            f"clip_frames={num_frames}: no file is {num_frames / float(FPS):.2f} s long; set fewer"
        )
    return found


def own_frames(
    places: list[tuple[Path, int]], num_frames: int, size: int, count: int
) -> Iterator[dict[str, np.ndarray]]:
    """`count` of those pieces (all, if there are fewer), file by file, so that each is decoded
    once.
    """
    chosen = np.random.default_rng(0).permutation(len(places))[:count]
    last = None
    frames = np.zeros(0)
    for index in sorted(chosen.tolist()):
        path, first = places[index]
        if path != last:
            whole = read_clip(path, fps=FPS, size=size, max_seconds=LONGEST).frames
            assert whole is not None
            last = path
            frames = whole
        yield {
            "video": frames[first : first + num_frames],
            "lip_points": np.zeros((num_frames, 20, 2), np.float32),
        }


class OwnBank:
    """Sounds of a folder with the face of a speech bank: a sequence of `OwnSound`, `audio(sound)`
    mono at 24 kHz.
    """

    def __init__(self, clips: OwnClips) -> None:
        self._sounds: dict[str, np.ndarray] = {}
        for path in clips.files:
            sound = read_clip(path, sample_rate=RATE, max_seconds=LONGEST).audio
            assert sound is not None
            self._sounds[str(path)] = sound.mean(axis=0).astype(np.float32)
        self.items = [OwnSound(name, len(sound) / RATE) for name, sound in self._sounds.items()]
        told = repr([(name, len(sound)) for name, sound in self._sounds.items()])
        self.fingerprint = "own-" + hashlib.sha256(told.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> OwnSound:
        return self.items[index]

    def __iter__(self) -> Iterator[OwnSound]:
        return iter(self.items)

    def audio(self, sound: OwnSound) -> np.ndarray:
        """Float32 (S,) in [-1, 1]."""
        return self._sounds[sound.id]
