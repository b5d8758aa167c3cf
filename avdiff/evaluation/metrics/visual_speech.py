"""Measures that only a drawn world allows: what mouth should this sound have, and is it the one in
the picture?

The sound is heard by the phone recognizer, `viseme_track` turns the phones into the mouth that the
corpus would draw, and the face reader tells the mouth that the pixels show. Neither knows the
prompt, so a generator that says other words than asked can still fit its lips to them.

    found = visual_speech(read_clip("a.mp4"))
    found["mouth_r"], found["mouth_lag_ms"]        # a positive lag: the audio is late
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from avdiff.evaluation.metrics.video import correlation
from avdiff.evaluators.load import FaceReading, phone_times, read_faces
from avdiff.media.write import Clip
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import SILENCE, Phone
from avdiff.phonetics.visemes import TARGETS, VISEMES, viseme_of, viseme_track

# seconds of lag that are searched, and between two of them
REACH = 0.4
STEP = 0.01
CLOSED, OPEN = (
    0.15,
    0.30,
)  # jaw of the face reader, 0 to 1: lips count as closed below, as open above
OPEN_VISEMES = frozenset(("aa", "E", "oh"))  # vowels whose mouth is wide open in the corpus
SHORTEST_VOWEL = 0.06  # s; shorter ones need not open the mouth
#: How much each mouth parameter counts when a shape is named after the nearest viseme: as the face
#: reader was taught.
NEARNESS = np.array((1.0, 0.7, 0.7, 0.4, 0.3, 0.7))
EDGE_FRAMES = 6  # pictures at either end whose faces are compared
MARGIN = (0.45, 0.35)  # of the face's width and height, for hair and hat, that is no background
LEAST_BACKGROUND = 0.01  # of the picture


def frame_times(clip: Clip) -> np.ndarray:
    """Middle of each picture's interval in seconds: (F,).

    Raises:
        ValueError: a clip without pictures.
    """
    if clip.frames is None or clip.fps is None or not len(clip.frames):
        raise ValueError("clip has no pictures: this measure needs some")
    return (np.arange(len(clip.frames)) + 0.5) / float(clip.fps)


def hear(clip: Clip, recognizer: PhoneRecognizer | None = None) -> tuple[Phone, ...]:
    """Phones heard in a clip, silence included.

    Raises:
        ValueError: a clip without sound.
    """
    if clip.audio is None or clip.sample_rate is None or not clip.audio.size:
        raise ValueError("clip has no sound: this measure needs some")
    return phone_times(clip.audio, clip.sample_rate, recognizer=recognizer)


def nearest_visemes(mouths: np.ndarray) -> list[str]:
    """Mouth parameters (F, 6) -> the class whose target is nearest to each."""
    targets = np.array([TARGETS[name] for name in VISEMES])
    away = (((targets - mouths[:, None]) * NEARNESS) ** 2).sum(-1)  # (F, V)
    return [VISEMES[i] for i in away.argmin(1)]


def lagged_correlation(
    seen: np.ndarray, times: np.ndarray, phones: Sequence[Phone], reach: float = REACH
) -> tuple[np.ndarray, np.ndarray]:
    """Correlation of the seen opening with the one expected `lag` later, over lags.

    The expected mouth is a function of time, so lags are finer than a frame. A positive lag means
    that the audio is
    late: what the lips show at t is heard at t + lag.

    Args:
        seen: opening (F,), NaN where no face is seen. times: (F,) seconds. phones: heard.

    Returns:
        lags (L,) in seconds and correlations (L,), NaN where one of both does not move.
    """
    known = np.isfinite(seen)
    steps = round(reach / STEP)
    lags = np.arange(-steps, steps + 1) * STEP
    end = max(phones[-1].end if phones else 0.0, float(times[-1])) + reach
    grid = np.arange(-steps, math.ceil(end / STEP) + 1) * STEP
    opening = viseme_track(phones, grid)[:, 0]
    found = [correlation(seen[known], np.interp(times[known] + lag, grid, opening)) for lag in lags]
    return lags, np.array(found)


def visual_speech(
    clip: Clip,
    reading: FaceReading | None = None,
    phones: Sequence[Phone] | None = None,
    reader: FaceReader | None = None,
    recognizer: PhoneRecognizer | None = None,
) -> dict[str, Any]:
    """All lip measures of one clip.

    Args:
        reading: of `read_faces`, phones: of `phone_times`, where they are known already.
        reader, recognizer: other evaluators than the bundled ones.

    Returns:
        mouth_r: correlation of the opening seen and the one that the sound asks for; NaN if either
            does not move.
        mouth_lag_ms: lag of the best correlation, positive: audio late; mouth_r_best: that
            correlation.
        bilabials, bilabials_closed: p b m heard, and seen with closed lips within a frame of the
            sound.
        open_vowels, open_vowels_open: long open vowels heard, and seen open: a mouth that stays
            shut fails here.
        viseme_frames, visemes_right: pictures with speech, and those whose shape is the expected
            class.
        face_share: share of pictures with a face. mouth_curve, expected_curve: openings (F,) for a
            plot.

    Raises:
        ValueError: a clip without pictures or without sound.
    """
    times = frame_times(clip)
    assert clip.frames is not None and clip.fps is not None
    reading = reading or read_faces(clip.frames, reader)
    phones = hear(clip, recognizer) if phones is None else phones
    seen = reading.mouth[:, 0].astype(np.float64)
    expected = viseme_track(phones, times)
    lags, found = lagged_correlation(seen, times, phones)
    best = int(np.nanargmax(found)) if np.isfinite(found).any() else None
    known = np.isfinite(seen)
    return {
        "mouth_r": correlation(seen[known], expected[known, 0]),
        "mouth_r_best": math.nan if best is None else float(found[best]),
        "mouth_lag_ms": math.nan if best is None else round(1000 * float(lags[best])),
        **_contacts(seen, times, phones, 1 / float(clip.fps)),
        **_visemes(reading, expected, times, phones),
        "face_share": float(known.mean()),
        "mouth_curve": [None if math.isnan(v) else round(v, 3) for v in seen.tolist()],
        "expected_curve": [round(v, 3) for v in expected[:, 0].tolist()],
    }


def _contacts(
    seen: np.ndarray, times: np.ndarray, phones: Sequence[Phone], frame: float
) -> dict[str, int]:
    """Closed lips on p b m, open ones on open vowels."""
    counts = dict(bilabials=0, bilabials_closed=0, open_vowels=0, open_vowels_open=0)
    for phone in phones:
        names = viseme_of(phone.symbol)
        near = seen[(times >= phone.start - frame) & (times <= phone.end + frame)]
        near = near[np.isfinite(near)]
        if not len(near):
            continue
        if names == ("PP",):
            counts["bilabials"] += 1
            counts["bilabials_closed"] += bool(near.min() < CLOSED)
        elif names[0] in OPEN_VISEMES and phone.end - phone.start >= SHORTEST_VOWEL:
            counts["open_vowels"] += 1
            counts["open_vowels_open"] += bool(near.max() > OPEN)
    return counts


def _visemes(
    reading: FaceReading, expected: np.ndarray, times: np.ndarray, phones: Sequence[Phone]
) -> dict[str, int]:
    """Pictures with speech whose mouth has the expected class."""
    at = np.searchsorted([phone.start for phone in phones], times, side="right") - 1
    wanted = nearest_visemes(expected)
    counted = [
        i
        for i, place in enumerate(at)
        if place >= 0 and phones[place].symbol != SILENCE and reading.viseme[i]
    ]
    return {
        "viseme_frames": len(counted),
        "visemes_right": sum(reading.viseme[i] == wanted[i] for i in counted),
    }


# ----------------------------------------------------------------------------- what should not move
def deflicker_strength(
    clip: Clip, reading: FaceReading | None = None, reader: FaceReader | None = None
) -> dict[str, Any]:
    """Is it the same presenter from the first picture to the last, before a background that stands
    still?

    Returns:
        identity_kept: share of the attributes that read the same in the first and the last
            pictures; NaN without faces.
        identity_changed: their names, "" if none.
        background_difference: mean step of a background pixel to the next picture, of 255; NaN
            where the face leaves no background.
    """
    times = frame_times(clip)
    frames = clip.frames
    assert frames is not None
    reading = reading or read_faces(frames, reader)
    ends = min(EDGE_FRAMES, max(1, len(times) // 2))
    first, last = (read_faces(part, reader).attributes for part in (frames[:ends], frames[-ends:]))
    shared = [name for name in first if name in last]
    changed = [name for name in shared if first[name] != last[name]]
    return {
        "identity_kept": 1 - len(changed) / len(shared) if shared else math.nan,
        "identity_changed": " ".join(changed),
        "background_difference": background_difference(frames, reading.box),
    }


def background_mask(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels (H, W) beside and above the head in every picture, from face boxes (F, 4) in shares of
    the longer side.
    """
    known = boxes[np.isfinite(boxes).all(axis=1)]
    mask = np.zeros((height, width), bool)
    if not len(known):
        return mask
    left, top = known[:, :2].min(0)
    right, bottom = known[:, 2:].max(0)
    wide = (right - left) * MARGIN[0]
    high = (bottom - top) * MARGIN[1]
    side = max(height, width)
    x = (np.arange(width) + 0.5) / side
    y = (np.arange(height) + 0.5) / side
    same_device = (x < left - wide) | (x > right + wide)
    mask[:] = same_device[None, :] | (y < top - high)[:, None]
    mask[y > bottom - 0.15 * (bottom - top)] = (
        False  # shoulders begin near the chin, and long hair falls on them
    )
    return mask


def background_difference(frames: np.ndarray, boxes: np.ndarray) -> float:
    """Mean absolute step to the next picture over background pixels, of 255: frames (F, H, W, 3)
    uint8 -> number.
    """
    mask = background_mask(boxes, *frames.shape[1:3])
    if mask.mean() < LEAST_BACKGROUND or len(frames) < 2:
        return math.nan
    shown = frames[:, mask].astype(np.int16)  # (F, P, 3)
    return float(np.abs(np.diff(shown, axis=0)).mean())


def score(
    clip: Clip, reader: FaceReader | None = None, recognizer: PhoneRecognizer | None = None
) -> float:
    """Reward: correlation of lips and sound, -1 to 1; 0 for a clip without a face, without speech
    or movement.
    """
    try:
        value = visual_speech(clip, reader=reader, recognizer=recognizer)["mouth_r"]
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
