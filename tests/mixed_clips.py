"""A folder of clips as an evaluation meets them: presenters at many rates, and all that has nothing
to measure.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from bad_clips import make_folder, mux, pictures, steady, tone

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.media.write import write_clip

RATE = 24000
NTSC = Fraction(30000, 1001)


@cache
def presenter(
    fps: Fraction | int = 25, seconds: float = 2.0, index: int = 0, size: int = 128
) -> dict[str, Any]:
    """A presenter of the mini-bank who speaks all the time: frames (F, S, S, 3), audio (S,),
    fps.
    """
    corpus = PresenterCorpus(
        None,
        "train",
        languages=["en"],
        length=99,
        seed=5,
        seconds=seconds,
        fps=fps,
        size=size,
        event_share=0.0,
        augment_share=0.0,
    )
    clip = corpus[index]
    return {"frames": clip["video"].numpy(), "audio": clip["audio"].numpy(), "fps": clip["fps"]}


def music(seconds: float) -> np.ndarray:
    """Chords of pure tones, four a second: (1, S)."""
    t = np.arange(round(seconds * RATE)) / RATE
    roots = 220 * 2 ** (np.array([0, 5, 7, 3, 0, 8, 5, 7])[(t * 4).astype(int) % 8] / 12)
    phase = 2 * np.pi * np.cumsum(roots) / RATE
    wave = sum(np.sin(phase * ratio) for ratio in (1.0, 1.25, 1.5)) * np.exp(-6 * (t * 4 % 1) / 4)
    return (0.12 * wave[None]).astype(np.float32)


def make_mixed(root: Path) -> dict[str, str]:
    """Write the folder -> name of each clip and the status that it must have, "" where several are
    right.
    """
    make_folder(root)  # forty files of 1.2 s and broken ones
    expected = {
        path.name: ""
        for path in root.iterdir()
        if path.suffix in (".mp4", ".mov", ".mkv") and path.is_file()
    }
    expected |= {
        "cut_short.mkv.mp4": "error",
        "half_a_file.mp4": "error",
        "zero_length.mp4": "error",
        "text_as_video.mp4": "error",
        "noise.mp4": "error",
        "cover_only.mp4": "no_face",
        "no_sound.mp4": "no_speech",
        "plain.mp4": "too_short",
    }
    for name, fps in (
        ("film", Fraction(24000, 1001)),
        ("cinema", 24),
        ("pal", 25),
        ("ntsc", NTSC),
        ("web", 30),
        ("high", 50),
        ("higher", 60),
    ):
        clip = presenter(fps)
        write_clip(root / f"rate_{name}.mp4", clip["frames"], fps, clip["audio"], RATE)
        expected[f"rate_{name}.mp4"] = "ok"
    clip = presenter()
    frames, audio = clip["frames"], clip["audio"]
    rng = np.random.default_rng(0)
    kept = np.sort(rng.choice(np.arange(1, len(frames)), len(frames) * 4 // 5, replace=False))
    mux(root / "uneven.mkv", frames[[0, *kept]], [Fraction(int(i), 25) for i in (0, *kept)], audio)
    mux(
        root / "sound_later.mkv",
        frames,
        steady(len(frames)),
        audio[:, round(0.3 * RATE) :],
        late=0.3,
    )
    late_start = [time + Fraction(8, 15) for time in steady(len(frames))]
    mux(root / "both_later.mkv", frames, late_start, audio, late=8 / 15)
    write_clip(root / "silence.mp4", frames, 25, np.zeros_like(audio), RATE)
    write_clip(root / "music.mp4", frames, 25, music(len(frames) / 25), RATE)
    write_clip(root / "no_face.mp4", pictures(2.0, size=(128, 128)), 25, audio, RATE)
    small = np.full((len(frames), 360, 480, 3), 60, np.uint8)
    small[:, 40:56, 300:316] = frames[:, ::8, ::8]
    write_clip(root / "tiny_face.mp4", small, 25, audio, RATE)
    other = presenter(index=1)["frames"]
    count = min(len(frames), len(other))
    write_clip(
        root / "two_faces.mp4",
        np.concatenate([frames[:count], other[:count]], axis=2),
        25,
        audio,
        RATE,
    )
    write_clip(root / "hardly.mp4", frames[:20], 25, audio[:, : RATE * 20 // 25], RATE)
    write_clip(root / "a_tone.mp4", frames, 25, tone(2.0), RATE)
    return expected | {
        "uneven.mkv": "ok",
        "sound_later.mkv": "ok",
        "both_later.mkv": "ok",
        "silence.mp4": "no_speech",
        "music.mp4": "no_speech",
        "no_face.mp4": "",
        "tiny_face.mp4": "",
        "two_faces.mp4": "",
        "hardly.mp4": "too_short",
        "a_tone.mp4": "no_speech",
    }
