"""Lips against the mouth that a sound asks for: corpus clips, with truth in place of the evaluators
where it is enough.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluation.metrics import attributes as looks
from avdiff.evaluation.metrics import visual_speech as kt
from avdiff.evaluators.load import FaceReading
from avdiff.media.write import Clip
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import inventory
from avdiff.phonetics.visemes import VISEMES, viseme_track
from avdiff.train.evaluators.faces import NEARNESS, nearest_viseme


@cache
def items() -> list[dict[str, Any]]:
    corpus = PresenterCorpus(
        SpeechCorpus(REPO_BANK), length=4, seed=3, event_share=0, augment_share=0, size=64
    )
    return list(corpus)


def true_reading(item: dict[str, Any], shift: int = 0) -> FaceReading:
    """What a perfect face reader says; `shift` delays the picture by frames."""
    mouth = np.roll(item["mouth"], shift, axis=0)
    count = len(mouth)
    box = np.tile(np.array([0.3, 0.2, 0.7, 0.7]), (count, 1))
    return FaceReading(
        np.ones(count),
        box,
        item["lip_points"],
        mouth[:, :3].copy(),
        tuple(kt.nearest_visemes(mouth)),
        {},
        {},
    )


def clip_of(item: dict[str, Any]) -> Clip:
    return Clip(item["video"].numpy(), item["audio"].numpy(), item["fps"], item["sample_rate"])


def test_corpus_lips_fit_their_phones() -> None:
    for item in items():
        found = kt.visual_speech(clip_of(item), true_reading(item), item["phones"])
        assert found["mouth_r"] > 0.999
        assert found["mouth_lag_ms"] == 0
        assert found["bilabials_closed"] == found["bilabials"]
        assert found["visemes_right"] == found["viseme_frames"] > 10
        assert found["face_share"] == 1
        assert len(found["mouth_curve"]) == len(found["expected_curve"]) == len(item["mouth"])
    assert (
        sum(
            kt.visual_speech(clip_of(i), true_reading(i), i["phones"])["bilabials"] for i in items()
        )
        > 2
    )


@pytest.mark.parametrize("shift", [-3, 2, 5])
def test_lag_has_the_sign_and_size_of_the_shift(shift: int) -> None:
    for item in items():
        found = kt.visual_speech(clip_of(item), true_reading(item, shift), item["phones"])
        # pictures that come later than the sound: the audio is early, so the lag is negative
        assert found["mouth_lag_ms"] == pytest.approx(-40 * shift, abs=20)
        assert found["mouth_r"] < found["mouth_r_best"]


def test_a_wrong_sound_and_a_shut_mouth_are_found_out() -> None:
    one, other = items()[0], max(items()[1:], key=lambda item: len(item["mouth"]))
    wrong = kt.visual_speech(clip_of(one), true_reading(one), other["phones"])
    assert wrong["mouth_r"] < 0.6
    shut = true_reading(one)
    shut.mouth[:, 0] = 0
    found = kt.visual_speech(clip_of(one), shut, one["phones"])
    assert math.isnan(found["mouth_r"]) and found["bilabials"] == found["bilabials_closed"]
    assert (
        found["open_vowels"] > 0 and found["open_vowels_open"] == 0
    )  # it closes every bilabial, but fails here
    open_mouth = true_reading(one)
    open_mouth.mouth[:, 0] = 0.8
    assert kt.visual_speech(clip_of(one), open_mouth, one["phones"])["bilabials_closed"] == 0


def test_pictures_without_a_face_do_not_count() -> None:
    item = items()[0]
    reading = true_reading(item)
    reading.mouth[5:9] = np.nan
    found = kt.visual_speech(clip_of(item), reading, item["phones"])
    assert found["mouth_r"] > 0.999
    assert found["mouth_curve"][6] is None
    assert found["face_share"] == pytest.approx(1 - 4 / len(item["mouth"]))


def test_shapes_are_named_as_the_face_reader_was_taught() -> None:
    mouths = np.random.default_rng(0).random((200, 6))
    assert np.array_equal(kt.NEARNESS, NEARNESS)
    assert kt.nearest_visemes(mouths) == [VISEMES[nearest_viseme(mouth)] for mouth in mouths]


def test_background_of_the_corpus_stands_still_and_a_flickering_one_does_not() -> None:
    item = items()[1]
    frames = item["video"].numpy()
    middle = item["lip_points"].mean(axis=1)  # a face reaches about so far around its mouth
    boxes = np.concatenate(
        [middle - np.array([0.22, 0.44]), middle + np.array([0.22, 0.15])], axis=1
    )
    still = kt.background_difference(frames, boxes)
    assert still < 0.5
    steps = 6 * (np.arange(len(frames)) % 2)[:, None, None, None]
    flicker = np.clip(frames.astype(int) + steps, 0, 255).astype(np.uint8)
    assert kt.background_difference(flicker, boxes) == pytest.approx(6, abs=1)
    assert math.isnan(
        kt.background_difference(frames, np.tile(np.array([0.0, 0.0, 1.0, 1.0]), (len(frames), 1)))
    )
    assert not kt.background_mask(np.full((3, 4), np.nan), 8, 8).any()


def test_real_judges_run_and_reward_is_a_number() -> None:
    reader = FaceReader().eval()
    recognizer = PhoneRecognizer(
        inventory()[0], width=32, expansion=2, kernel=5, layers=1, dropout=0.0
    ).eval()
    clip = clip_of(items()[0])
    found = kt.visual_speech(clip, reader=reader, recognizer=recognizer)
    assert {"mouth_r", "mouth_lag_ms", "bilabials", "viseme_frames"} <= set(found)
    assert -1 <= kt.score(clip, reader, recognizer) <= 1
    assert kt.score(Clip(clip.frames, None, clip.fps, None), reader, recognizer) == 0.0
    steady = kt.deflicker_strength(clip, reader=reader)
    assert math.isnan(steady["identity_kept"]) or 0 <= steady["identity_kept"] <= 1


def test_clips_that_lack_something_are_refused_by_name() -> None:
    item = items()[0]
    with pytest.raises(ValueError, match="no pictures"):
        kt.visual_speech(Clip(None, item["audio"].numpy(), None, 24000))
    with pytest.raises(ValueError, match="no sound"):
        kt.visual_speech(Clip(item["video"].numpy(), None, item["fps"], None), true_reading(item))


def test_lagged_correlation_is_the_shifted_track_s() -> None:
    item = items()[2]
    times = (np.arange(len(item["mouth"])) + 0.5) / 25
    seen = viseme_track(item["phones"], times + 0.13)[:, 0].astype(float)
    lags, found = kt.lagged_correlation(seen, times, item["phones"])
    assert lags[int(np.nanargmax(found))] == pytest.approx(0.13, abs=0.011)


def test_adherence_asks_only_what_was_told() -> None:
    reading = FaceReading(
        np.ones(1),
        np.zeros((1, 4)),
        np.zeros((1, 20, 2)),
        np.zeros((1, 3)),
        ("sil",),
        {"hair_color": "red", "glasses": "square glasses", "hat": "none"},
        {},
    )
    wanted = {"hair_color": "red", "glasses": "round glasses", "hat": "cap", "skin": "fair"}
    told = {"hair_color": "value", "glasses": "presence", "hat": "presence", "skin": "value"}
    found = looks.attribute_accuracy(reading, wanted, told)
    assert (found["attributes_stated"], found["attributes_right"]) == (
        3,
        2,
    )  # the reader here knows no skin
    assert found["looks_glasses"] and not found["looks_hat"]
    assert found["wrong"] == "hat: none for any"
    assert not looks.attribute_accuracy(reading, wanted, {"glasses": "value"})["looks_glasses"]
    faceless = FaceReading(
        np.zeros(1), np.zeros((1, 4)), np.zeros((1, 20, 2)), np.zeros((1, 3)), ("",), {}, {}
    )
    assert looks.attribute_accuracy(faceless, wanted, told)["attributes_right"] == 0
    assert looks.attribute_accuracy(reading, wanted)["attributes_stated"] == 3
