"""What is said, how, and in what voice: error rates against known words, rate, pitch, loudness,
clipping, silence.

    found = speech(clip, "two one seven", "en")     # phones against the pronunciation, digits by
    pocketsphinx found["phone_errors"] / found["phones"]         # PER; over many clips divide the
    sums (report.RATIOS does) voice(clip)["pitch_hz"]                         # needs no words

The recognizer is our own and was trained on the same kind of voices as the generator, so it may be
kind to them; pocketsphinx never saw either. Both stand in every report. pocketsphinx and speechmos
are optional packages.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torchaudio.functional import loudness

from avdiff.evaluation.metrics.audio import (
    DIGITS,
    DigitReader,
    GrammarReader,
    optional,
    word_errors,
)
from avdiff.evaluators.load import as_waveform, edit_distance, phone_times, spoken_symbols
from avdiff.g2p.pronounce import read
from avdiff.media.write import Clip
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import SILENCE, Phone

RATE = 24000  # Hz at which everything here listens
#: GRID sentences: command colour preposition letter digit adverb (Cooke et al. 2006); letters
#: without W.
GRID = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("abcdefghijklmnopqrstuvxyz"),
    tuple(w for w in DIGITS if w != "oh"),
    ("again", "now", "please", "soon"),
)
GRID_GRAMMAR = (
    "#JSGF V1.0; grammar grid; public <sentence> = "
    + " ".join("(" + " | ".join(slot) + ")" for slot in GRID)
    + " ;"
)
FULL_SCALE = 0.999  # samples at or above it, two in a row, are clipped
QUIET_DB = -50.0  # re full scale, RMS over 20 ms: silence
# Hz, Hz, normalized autocorrelation
LOWEST_PITCH = 60.0
HIGHEST_PITCH = 400.0
VOICED = 0.55
GENDER_HZ = 160.0  # between the medians of men's and women's voices of the speech banks


def waveform(clip: Clip) -> torch.Tensor:
    """Mono sound of a clip at 24 kHz: (S,).

    Raises:
        ValueError: a clip without sound.
    """
    if clip.audio is None or clip.sample_rate is None or not clip.audio.size:
        raise ValueError("clip has no sound: this measure needs some")
    return as_waveform(clip.audio, clip.sample_rate, RATE)


# -------------------------------------------------------------------------------------------- words
def plain_words(text: str) -> list[str]:
    """Lower-case words without marks; digits stay as they are."""
    spoken = unicodedata.normalize("NFKC", text).lower().replace("'", "")
    return re.findall(r"\w+", spoken)


def is_digits(words: Sequence[str]) -> bool:
    """English digits only."""
    return bool(words) and all(word in DIGITS for word in words)


def is_grid(words: Sequence[str]) -> bool:
    """A sentence of the GRID grammar."""
    return len(words) == len(GRID) and all(
        word in slot for word, slot in zip(words, GRID, strict=True)
    )


@cache
def _digit_reader() -> GrammarReader:
    return DigitReader()


@cache
def _grid_reader() -> GrammarReader:
    return GrammarReader(GRID_GRAMMAR)


def speech(
    clip: Clip,
    text: str,
    language: str | None = None,
    expected: Sequence[str] | None = None,
    phones: Sequence[Phone] | None = None,
    recognizer: PhoneRecognizer | None = None,
) -> dict[str, Any]:
    """Errors against known words.

    Args:
        text: the words that should be said. language: its code; None finds it out.
        expected: phones of the words, symbols of the inventory; None asks the pronunciation reader.
        phones: of `phone_times`, where they are known already. recognizer: another than the bundled
            one.

    Returns:
        phones, phone_errors; for English digit strings digits, digit_errors, for GRID sentences
        grid_words, grid_errors (left out where pocketsphinx is not installed); recognized: phones
        as text; spoken_s: seconds with speech;
        phones_per_s: speaking rate over them.

    Raises:
        ValueError: a clip without sound, or a text that cannot be read.
    """
    sound = waveform(clip)
    wanted = list(expected) if expected else spoken_symbols(read(text, language).phones)
    found = phone_times(sound.numpy(), RATE, recognizer=recognizer) if phones is None else phones
    recognized = spoken_symbols(found)
    seconds = sum(phone.end - phone.start for phone in found if phone.symbol != SILENCE)
    result = {
        "phones": len(wanted),
        "phone_errors": edit_distance(wanted, recognized),
        "recognized": " ".join(recognized),
        "spoken_s": seconds,
        "phones_per_s": len(recognized) / seconds if seconds else math.nan,
    }
    words = plain_words(text)
    try:
        if is_digits(words):
            result |= {
                "digits": len(words),
                "digit_errors": word_errors(words, _digit_reader().words(sound.numpy())),
            }
        elif is_grid(words):
            result |= {
                "grid_words": len(words),
                "grid_errors": word_errors(words, _grid_reader().words(sound.numpy())),
            }
    except ValueError:  # no pocketsphinx: the row goes without words
        pass
    return result


# -------------------------------------------------------------------------------------------- sound
def median_pitch(sound: torch.Tensor, rate: int = RATE) -> float:
    """Median pitch of a voice (S,) in Hz; NaN where nothing is voiced.

    Autocorrelation of 50 ms windows with the window's own divided out (Boersma 1993), below 1.6
    kHz; of the peaks within a tenth of the best, the shortest lag, against octave errors.
    """
    size = round(0.05 * rate)
    hop = round(0.01 * rate)
    if len(sound) < size:
        return math.nan
    window = torch.hann_window(size)
    frames = sound.unfold(0, size, hop) * window  # (T, size)
    length = 2 * size
    band = (torch.fft.rfftfreq(length, 1 / rate) < 1600.0).float()
    own = torch.fft.irfft(torch.fft.rfft(window, length).abs().square())
    auto = torch.fft.irfft(torch.fft.rfft(frames, length).abs().square() * band)
    first = int(rate / HIGHEST_PITCH)
    last = int(rate / LOWEST_PITCH)
    near = auto[:, : last + 2] / (auto[:, :1] + 1e-6) * (own[0] / own[: last + 2])
    level = frames.square().mean(dim=1)
    peak = F.max_pool1d(near[:, None], 3, 1, 1)[:, 0] == near
    peak[:, :first] = peak[:, last:] = False
    strength = torch.where(peak, near, torch.zeros(()))
    best = strength.max(dim=1).values
    lag = (
        ((strength >= 0.9 * best[:, None]) & peak).float().argmax(dim=1)
    )  # the first that is good enough
    voiced = (best > VOICED) & (level > 0.01 * level.max()) & (level > 1e-6) & (lag > 0)
    return float((rate / lag[voiced].float()).median()) if voiced.sum() >= 5 else math.nan


def voice(clip: Clip) -> dict[str, Any]:
    """Measures of a sound that need no words.

    Returns:
        peak: largest sample, 1 is full scale. loudness_lufs: ITU-R BS.1770-4, NaN below 0.4 s and
            for silence.
        clipped_share: share of samples in runs at full scale. silence_share: share of 20 ms windows
            below -50 dB.
        pitch_hz: median, NaN without a voice. voice_gender: "female" or "male" by pitch, "" without
            a voice.

    Raises:
        ValueError: a clip without sound.
    """
    sound = waveform(clip)
    assert clip.audio is not None
    own = torch.as_tensor(np.atleast_2d(clip.audio)).abs()  # clipping shows at the clip's own rate
    full = own >= FULL_SCALE
    runs = torch.zeros_like(full)
    runs[:, 1:] |= full[:, 1:] & full[:, :-1]
    runs[:, :-1] |= full[:, 1:] & full[:, :-1]
    step = round(0.02 * RATE)
    windows = F.pad(sound, (0, -len(sound) % step)).view(-1, step)
    level = 10 * (windows.square().mean(dim=1) + 1e-12).log10()
    enough = len(sound) >= 0.4 * RATE and bool((level > -70).any())
    pitch = median_pitch(sound)
    return {
        "peak": float(own.max()),
        "loudness_lufs": float(loudness(sound[None], RATE)) if enough else math.nan,
        "clipped_share": float(runs.float().mean()),
        "silence_share": float((level < QUIET_DB).float().mean()),
        "pitch_hz": pitch,
        "voice_gender": "" if math.isnan(pitch) else "female" if pitch > GENDER_HZ else "male",
    }


def predicted_mos(clip: Clip) -> dict[str, float]:
    """DNSMOS P.835 and P.808 (Reddy et al. 2021, 2022): predicted opinion of listeners, 1 to 5, for
    speech at 16 kHz.

    Raises:
        ValueError: a clip without sound, or the package speechmos is not installed.
    """
    package = optional("speechmos.dnsmos", "speechmos librosa onnxruntime requests")
    if clip.audio is None or clip.sample_rate is None or not clip.audio.size:
        raise ValueError("clip has no sound: this measure needs some")
    sound = as_waveform(clip.audio, clip.sample_rate, 16000).clamp(-1, 1).numpy()
    found = package.run(sound, 16000, return_df=False)
    return {
        f"dnsmos_{name}": float(found[f"{name}_mos"]) for name in ("ovrl", "sig", "bak", "p808")
    }


def score(
    clip: Clip,
    text: str = "",
    language: str | None = None,
    expected: Sequence[str] | None = None,
    recognizer: PhoneRecognizer | None = None,
) -> float:
    """Reward: share of the expected phones that are recognized, 1 - PER, not below 0; 0 for a clip
    without sound.
    """
    if clip.audio is None or not clip.audio.size:
        return 0.0
    found = speech(clip, text, language, expected, recognizer=recognizer)
    return max(0.0, 1 - found["phone_errors"] / found["phones"]) if found["phones"] else 0.0
