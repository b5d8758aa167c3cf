"""Do things sound when they are hit? Onsets in the sound against contacts seen in the pixels.

    found = events(clip, asked=3)
    found["event_hits"] / found["event_onsets"]     # onsets with a contact within a frame

Contacts are read by a small frozen network that was taught on drawn scenes
(`avdiff.models.evaluators.contact_detector`); onsets are rises of the spectrum. Neither knows the
prompt.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from avdiff.evaluation.metrics.audio import onset_seconds
from avdiff.evaluators.load import BUNDLED, as_waveform
from avdiff.media.write import Clip
from avdiff.models.evaluators.contact_detector import FPS, SIDE, ContactDetector, peaks
from avdiff.models.evaluators.face_reader import to_pictures

RATE = 24000  # Hz
APART = 0.096  # s: no two onsets are closer


# ----------------------------------------------------------------------------------------- pictures
@cache
def load_reader(folder: str | Path | None = None) -> ContactDetector:
    """The frozen contact reader, or another one.

    Raises:
        ValueError: no weights there.
    """
    place = Path(folder) if folder else BUNDLED / "contact_detector"
    if not (place / "config.json").is_file():
        raise ValueError(
            f"contact_detector: no weights in {place}; train them with python -m "
            "avdiff.train.evaluators.contacts"
        )
    return (
        ContactDetector.from_pretrained(place, torch_dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


@torch.no_grad()
def visual_contacts(
    frames: np.ndarray, fps: float, reader: ContactDetector | None = None
) -> np.ndarray:
    """Times of contacts in seconds, read from uint8 (F, H, W, 3): (N,). Frame i is shown from i /
    fps on; another rate than 25 is read at the picture on screen in the middle of each 25th of a
    second.
    """
    evaluator = reader or load_reader()
    count = max(2, round(len(frames) / fps * FPS))
    chosen = np.minimum(((np.arange(count) + 0.5) / FPS * fps).astype(int), len(frames) - 1)
    pictures = to_pictures(torch.from_numpy(np.ascontiguousarray(frames[chosen])))
    if pictures.shape[-2:] != (SIDE, SIDE):
        pictures = F.interpolate(pictures, size=(SIDE, SIDE), mode="area")
    return np.array(peaks(evaluator(pictures[None])[0].sigmoid()))


# -------------------------------------------------------------------------------------------- sound
def audio_onsets(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Times of strokes in a sound (S,) or (C, S), seconds: (N,).

    Peaks of the spectral flux (10 ms steps) that stand out by half of the strongest and begin a
    loud part; each is then placed to the millisecond by `onset_seconds`.
    """
    wave = as_waveform(audio, sample_rate, RATE).numpy()
    hop = RATE // 100
    size = RATE // 50
    if len(wave) < 4 * size or np.abs(wave).max() < 1e-3:
        return np.zeros(0)
    padded = np.pad(wave, (size, size))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop] * np.hanning(size)
    level = np.abs(np.fft.rfft(windows))
    floor = 10 ** (-45 / 20) * level.max()
    rise = np.maximum(np.diff(np.log(level + floor), axis=0), 0).mean(
        axis=1
    )  # rise i: from window i to i + 1
    rise = rise[:-1] + rise[1:]
    loud = level.max(axis=1)
    found: list[float] = []
    order = np.argsort(-rise)
    for i in order:
        if rise[i] < 0.3 * rise[order[0]] or rise[i] < 0.15:
            break
        if loud[i : i + 6].max() < 0.05 * loud.max() or any(
            abs(i - j) < APART * 100 for j in found
        ):
            continue
        found.append(float(i))
    times = []
    for i in sorted(found):
        near = (i + 1) * hop / RATE - size / RATE / 2
        near = min(max(near, 0.0), len(wave) / RATE - 0.03)
        times.append(onset_seconds(wave, near, RATE, reach=0.03))
    return np.array(times)


# --------------------------------------------------------------------------------------------- both
def match(one: np.ndarray, two: np.ndarray, within: float) -> list[tuple[int, int]]:
    """Pairs (i, j) with |one[i] - two[j]| <= within, nearest first, each used once."""
    if not len(one) or not len(two):
        return []
    away = np.abs(one[:, None] - two[None])
    pairs: list[tuple[int, int]] = []
    for place in np.argsort(away, axis=None):
        i, j = divmod(int(place), len(two))
        if away[i, j] > within + 1e-9:
            break
        if all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    return pairs


def events(
    clip: Clip, asked: int | None = None, reader: ContactDetector | None = None
) -> dict[str, Any]:
    """Sound against picture in a clip of an event.

    Args:
        asked: contacts that the prompt names. reader: another than the bundled one.

    Returns:
        event_onsets, event_contacts: strokes heard and seen; event_hits: onsets with a contact
            within a frame;
        contact_lag_ms: median of sound minus picture over pairs within 0.2 s, positive: audio
            late, NaN without pairs;
        count_sound_right, count_picture_right: whether as many as asked are heard and seen (with
            `asked`).

    Raises:
        ValueError: a clip without pictures or without sound.
    """
    if clip.frames is None or clip.fps is None or clip.audio is None or clip.sample_rate is None:
        raise ValueError("clip has no pictures or no sound: this measure needs both")
    fps = float(clip.fps)
    onsets = audio_onsets(clip.audio, clip.sample_rate)
    contacts = visual_contacts(clip.frames, fps, reader)
    near = match(onsets, contacts, 0.2)
    found: dict[str, Any] = {
        "event_onsets": len(onsets),
        "event_contacts": len(contacts),
        "event_hits": len(match(onsets, contacts, 1 / fps)),
        "contact_lag_ms": 1000 * float(np.median([onsets[i] - contacts[j] for i, j in near]))
        if near
        else math.nan,
    }
    if asked is not None:
        found |= {
            "count_sound_right": len(onsets) == asked,
            "count_picture_right": len(contacts) == asked,
        }
    return found


def score(clip: Clip, asked: int | None = None, reader: ContactDetector | None = None) -> float:
    """Reward: F1 of onsets and contacts within a frame, 0 to 1, times 1 / (1 + strokes too many or
    too few heard).
    """
    try:
        found = events(clip, asked, reader)
    except ValueError:
        return 0.0
    total = found["event_onsets"] + found["event_contacts"]
    agreement = 2 * found["event_hits"] / total if total else 0.0
    return agreement / (1 + abs(found["event_onsets"] - asked)) if asked is not None else agreement
