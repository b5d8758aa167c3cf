"""Numbers about one decoded clip that the data check reports: loudness, silence, clipping, offset,
likeness.
"""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
from scipy.signal import lfilter

SILENCE_DB = -60.0  # dBFS; a 50 ms block under it is silent
BLOCK = 0.4  # seconds, ITU-R BS.1770
# of a likeness code
PICTURE_BITS = 8 * 64
SOUND_BITS = 64
NEAR = (0.02, 0.10)  # shares of differing bits, picture and sound, up to which two clips are copies
# A word on sound, in the eight languages of the corpus; quotation marks mean that somebody speaks.
SOUND_WORDS = re.compile(
    r"[\"“”«»「」『』]|\b(?:says?|said|saying|speak\w*|talk\w*|tell\w*|voice|sing\w*|song|music\w*|sound\w*|nois\w*|loud\w*|"
    r"quiet\w*|silen\w*|bark\w*|meow\w*|laugh\w*|cr(?:y|ies|ying)|whisper\w*|shout\w*|scream\w*|clap\w*|knock\w*|ring\w*|"
    r"bell|beep\w*|hum\w*|engine|roar\w*|splash\w*|crash\w*|bounc\w*|drum\w*|hit\w*|tap\w*|footsteps?|wind|rain|thunder|"
    r"audio|whistl\w*|buzz\w*|click\w*|applau\w*|dice\w*|voz|música|ruido|sonido|suena|habla\w*|dit|parle\w*|voix|musique|"
    r"bruit|son|parla\w*|voce|musica|rumore|suono|diz|fala\w*|som|barulho)\b|[说說话話声聲音响響唱歌言話鳴]|कह|बोल|आवाज़|संगीत",
    re.IGNORECASE,
)


def mentions_sound(caption: str) -> bool:
    """Whether a caption says anything about what is heard."""
    return SOUND_WORDS.search(caption) is not None


def silence_share(sound: np.ndarray, rate: int) -> float:
    """Share of 50 ms blocks of (C, S) whose level is under `SILENCE_DB`; 1 for no samples."""
    block = max(1, rate // 20)
    mono = sound.mean(axis=0)
    blocks = mono[: len(mono) // block * block].reshape(-1, block)
    if not len(blocks):
        return 1.0
    return float(np.mean(10 * np.log10(np.mean(blocks**2, axis=1) + 1e-12) < SILENCE_DB))


def clipped_share(sound: np.ndarray) -> float:
    """Share of samples of (C, S) in runs of three or more at the rail."""
    rail = np.abs(sound) >= 0.999
    flat = rail & (np.roll(rail, 1, -1) & np.roll(rail, -1, -1))
    return float(flat.mean()) if flat.size else 0.0


def loudness(sound: np.ndarray, rate: int) -> float:
    """Integrated loudness in LUFS of (C, S), K-weighted and gated (ITU-R BS.1770-4); -inf for
    silence.
    """
    weighted = lfilter(*_shelf(rate), lfilter(*_high_pass(rate), sound.astype(np.float64)))
    size = round(BLOCK * rate)
    step = round(BLOCK * rate / 4)
    starts = range(0, max(1, weighted.shape[1] - size + 1), step)
    power = np.array([np.mean(weighted[:, s : s + size] ** 2, axis=1).sum() for s in starts])
    with np.errstate(divide="ignore"):
        power = power[-0.691 + 10 * np.log10(power) > -70]
        if not len(power):
            return float("-inf")
        power = power[10 * np.log10(power) > 10 * np.log10(power.mean()) - 10]
    return float(-0.691 + 10 * np.log10(power.mean()))


def _high_pass(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Second-order high pass of the K weighting (constants: De Man 2014, re-derived from the tables
    of BS.1770).
    """
    k = np.tan(np.pi * 38.13547087602444 / rate)
    q = 0.5003270373238773
    a = np.array(
        [1.0, 2 * (k * k - 1) / (1 + k / q + k * k), (1 - k / q + k * k) / (1 + k / q + k * k)]
    )
    return np.array([1.0, -2.0, 1.0]), a


def _shelf(rate: int) -> tuple[np.ndarray, np.ndarray]:
    """High shelf of the K weighting: +4 dB above 1.7 kHz (same source)."""
    k = np.tan(np.pi * 1681.974450955533 / rate)
    q = 0.7071752369554196
    gain = 10 ** (3.999843853973347 / 20)
    band = gain**0.4996667741545416
    a0 = 1 + k / q + k * k
    b = (
        np.array([gain + band * k / q + k * k, 2 * (k * k - gain), gain - band * k / q + k * k])
        / a0
    )
    return b, np.array([1.0, 2 * (k * k - 1) / a0, (1 - k / q + k * k) / a0])


def offset_estimate(
    frames: np.ndarray, sound: np.ndarray, fps: float, rate: int, reach: float = 0.5
) -> tuple[float, float]:
    """Seconds by which the sound is late (+) against the picture, and how sure that is (standard
    deviations).

    Correlates the rise of the sound's level with the motion in the picture over shifts of up to
    `reach` seconds. It finds blows and starts of motion; for talking heads it is a hint only: under
    4 deviations do not believe it.

    Args:
        frames: (F, H, W, 3) uint8. sound: (C, S).
    """
    small = frames[:, ::4, ::4].astype(np.float32).mean(-1)
    motion = np.abs(np.diff(small, axis=0)).mean(
        (1, 2)
    )  # motion[i]: between the middles of frames i and i + 1
    hop = rate / fps
    count = min(len(motion), int(sound.shape[1] / hop) - 1)
    if count < 4 * round(reach * fps):  # too short to tell a shift from chance
        return 0.0, 0.0
    edges = np.round((np.arange(count + 1) + 0.5) * hop).astype(int)
    mono = sound.mean(0).astype(np.float64) ** 2
    level = np.log10(np.array([mono[a:b].mean() for a, b in pairwise(edges)]) + 1e-8)
    rise = np.maximum(np.diff(level, prepend=level[0]), 0)
    motion = motion[:count]
    motion, rise = (x - x.mean() for x in (motion, rise))
    lags = np.arange(-round(reach * fps), round(reach * fps) + 1)
    scores = np.array([_overlap(motion, rise, int(lag)) for lag in lags])
    best = int(scores.argmax())
    rest = scores[np.abs(lags - lags[best]) > 2]
    sure = float((scores[best] - rest.mean()) / (rest.std() + 1e-12))
    return float(lags[best] / fps), sure


def _overlap(motion: np.ndarray, rise: np.ndarray, lag: int) -> float:
    """Mean product of the motion and of the sound taken `lag` frames later."""
    a, b = (motion[: len(motion) - lag], rise[lag:]) if lag >= 0 else (motion[-lag:], rise[:lag])
    return float(np.dot(a, b) / max(len(a), 1))


def likeness_code(frames: np.ndarray | None, sound: np.ndarray | None) -> np.ndarray:
    """Bits that nearly equal clips share: horizontal brightness steps of 8 frames, and rises of the
    sound's level.

    Returns:
        (PICTURE_BITS + SOUND_BITS,) bool; the part of a stream that is missing is all False.
    """
    bits = np.zeros(PICTURE_BITS + SOUND_BITS, bool)
    if frames is not None and len(frames):
        picked = (
            frames[np.linspace(0, len(frames) - 1, 8).round().astype(int)]
            .astype(np.float32)
            .mean(-1)
        )
        rows, columns = (
            np.linspace(0, n, k + 1).astype(int)
            for n, k in zip(picked.shape[1:], (8, 9), strict=True)
        )
        cells = np.add.reduceat(np.add.reduceat(picked, rows[:-1], 1), columns[:-1], 2)
        bits[:PICTURE_BITS] = (np.diff(cells / np.diff(columns), axis=2) > 0).reshape(-1)
    if sound is not None and sound.shape[1] >= 65:
        parts = np.array_split(sound.mean(0).astype(np.float64) ** 2, 65)
        bits[PICTURE_BITS:] = np.diff([part.mean() for part in parts]) > 0
    return bits


def find_copies(codes: dict[str, np.ndarray]) -> dict[str, str]:
    """Name of each clip that nearly equals an earlier one -> its name. Clips without structure
    match nothing.
    """
    names = [name for name, code in codes.items() if code.any()]
    copies: dict[str, str] = {}
    if not names:
        return copies
    bits = np.stack([codes[name] for name in names])
    pictures = bits[:, :PICTURE_BITS]
    sounds = bits[:, PICTURE_BITS:]
    for i, name in enumerate(names):
        near = ((pictures[:i] != pictures[i]).mean(1) <= NEAR[0]) & (
            (sounds[:i] != sounds[i]).mean(1) <= NEAR[1]
        )
        # a missing stream is like another missing stream, not like one that is there
        near &= (pictures[:i].any(1) == pictures[i].any()) & (sounds[:i].any(1) == sounds[i].any())
        if near.any():
            copies[name] = names[int(near.argmax())]
    return copies
