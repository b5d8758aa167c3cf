"""Words, voices and levels measured in sounds."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.corpus.speech.subset import is_digit_string
from avdiff.evaluation.metrics import attributes as attribute_accuracy
from avdiff.evaluation.metrics import speech
from avdiff.evaluators.load import spoken_symbols
from avdiff.media.write import Clip
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import inventory

RATE = 24000


@cache
def bank() -> SpeechCorpus:
    return SpeechCorpus(REPO_BANK, languages=["en"])


def clip_of(sound: np.ndarray, rate: int = RATE) -> Clip:
    return Clip(None, np.asarray(sound, np.float32)[None], Fraction(25), rate)


def tiny_recogniser() -> PhoneRecognizer:
    return PhoneRecognizer(
        inventory()[0], width=32, expansion=2, kernel=5, layers=1, dropout=0.0
    ).eval()


def voiced(hertz: float, seconds: float = 1.0) -> np.ndarray:
    """A buzz with falling harmonics."""
    time = np.arange(round(seconds * RATE)) / RATE
    return 0.1 * sum(
        np.sin(2 * np.pi * hertz * k * time) / k for k in range(1, 20) if hertz * k < 5000
    )


def test_words_are_sorted_by_what_can_be_asked() -> None:
    assert speech.plain_words("One, two; don't STOP!") == ["one", "two", "dont", "stop"]
    assert (
        speech.is_digits(["one", "oh", "nine"])
        and not speech.is_digits(["one", "and"])
        and not speech.is_digits([])
    )
    assert speech.is_grid(speech.plain_words("bin blue at F two now"))
    assert not speech.is_grid(speech.plain_words("bin blue at W two now"))  # GRID has no W
    assert not speech.is_grid(["bin", "blue"])


def test_phone_errors_are_counted_against_the_words() -> None:
    one = next(u for u in bank() if not is_digit_string(u) and u.duration > 1)
    sound = clip_of(bank().audio(one))
    found = speech.speech(sound, one.text, "en", spoken_symbols(one.phones), one.phones)
    assert found["phone_errors"] == 0 and found["phones"] > 4
    assert found["phones_per_s"] == pytest.approx(found["phones"] / found["spoken_s"])
    assert 5 < found["phones_per_s"] < 30
    silent = speech.speech(sound, one.text, "en", spoken_symbols(one.phones), ())
    assert silent["phone_errors"] == silent["phones"] and math.isnan(silent["phones_per_s"])
    by_reader = speech.speech(
        sound, one.text, "en", phones=one.phones
    )  # the pronunciation reader's view of the words
    assert by_reader["phone_errors"] / by_reader["phones"] < 0.4


def test_an_untrained_recogniser_earns_little() -> None:
    one = bank()[0]
    value = speech.score(clip_of(bank().audio(one)), one.text, "en", recognizer=tiny_recogniser())
    assert 0 <= value < 0.5
    assert speech.score(Clip(None, None, None, None), "one") == 0.0


def test_digit_strings_are_understood_by_pocketsphinx() -> None:
    pytest.importorskip("pocketsphinx")
    strings = [u for u in bank() if is_digit_string(u)][:3]
    assert strings
    rows = [speech.speech(clip_of(bank().audio(u)), u.text, "en", phones=u.phones) for u in strings]
    assert sum(row["digit_errors"] for row in rows) / sum(row["digits"] for row in rows) < 0.2
    swapped = speech.speech(
        clip_of(bank().audio(strings[0])), "nine nine nine nine nine", "en", phones=()
    )
    assert swapped["digit_errors"] >= 3


def test_grid_grammar_hears_a_sentence_of_its_own() -> None:
    pytest.importorskip("pocketsphinx")
    row = speech.speech(
        clip_of(0.01 * np.random.default_rng(0).normal(size=RATE)),
        "bin blue at F two now",
        "en",
        phones=(),
    )
    assert row["grid_words"] == 6 and 0 < row["grid_errors"] <= 6


@pytest.mark.parametrize("hertz", [70.0, 110.0, 165.0, 233.0, 330.0])
def test_pitch_of_a_buzz(hertz: float) -> None:
    noisy = voiced(hertz) + 0.005 * np.random.default_rng(1).normal(size=RATE)
    found = speech.median_pitch(torch.from_numpy(noisy.astype(np.float32)))
    assert found == pytest.approx(hertz, rel=0.015)


def test_noise_and_silence_have_no_pitch() -> None:
    noise = np.random.default_rng(2).normal(size=RATE).astype(np.float32) * 0.1
    assert math.isnan(speech.median_pitch(torch.from_numpy(noise)))
    assert math.isnan(speech.median_pitch(torch.zeros(RATE)))
    assert math.isnan(speech.median_pitch(torch.zeros(10)))


def test_gender_by_pitch_agrees_with_the_bank() -> None:
    members = list(bank())[:40]
    right = [
        attribute_accuracy.gender_of_voice(clip_of(bank().audio(u)), u.gender).get(
            "voice_as_stated"
        )
        for u in members
    ]
    known = [value for value in right if value is not None]
    assert len(known) >= 35 and np.mean(known) > 0.85


def test_levels() -> None:
    sine = np.sin(2 * np.pi * 997 * np.arange(2 * RATE) / RATE)
    found = speech.voice(clip_of(sine * 10 ** (-20 / 20)))
    # BS.1770: a full-scale sine of 997 Hz in one channel reads -3.01 LUFS
    assert found["loudness_lufs"] == pytest.approx(-23.01, abs=0.15)
    assert found["peak"] == pytest.approx(0.1, abs=1e-3)
    assert found["clipped_share"] == 0 and found["silence_share"] == 0
    loud = speech.voice(clip_of(np.clip(3 * sine, -1, 1)))
    assert loud["clipped_share"] > 0.5 and loud["peak"] == 1.0
    half = speech.voice(clip_of(np.concatenate([sine, np.zeros(2 * RATE)]) * 0.3))
    assert half["silence_share"] == pytest.approx(0.5, abs=0.02)
    silence = speech.voice(clip_of(np.zeros(RATE)))
    assert math.isnan(silence["loudness_lufs"]) and silence["voice_gender"] == ""
    single = np.zeros(RATE)
    single[100] = 1.0  # one sample at full scale is a peak, not a clipped run
    assert speech.voice(clip_of(single))["clipped_share"] == 0


def test_missing_sound_and_missing_package_are_named() -> None:
    with pytest.raises(ValueError, match="no sound"):
        speech.voice(Clip(None, None, None, None))
    try:
        import speechmos.dnsmos  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install speechmos"):
            speech.predicted_mos(clip_of(np.zeros(RATE)))
