"""Mouth shapes from timed phones."""

import json
from importlib.resources import files

import numpy as np
import pytest

from avdiff.phonetics import visemes
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.visemes import PARAMS, TARGETS, VISEMES, viseme_of, viseme_track

JAW, WIDTH, ROUND, TEETH, TONGUE, TUCK = range(6)
PHONES = [p for p in visemes.PHONE_TO_VISEME if len(p) == 1] + list(visemes.DIPHTHONGS)


def random_phones(seed: int, count: int = 40) -> list[Phone]:
    """A stream of random phones of 25-120 ms with pauses at both ends."""
    rng = np.random.default_rng(seed)
    now, phones = 0.3, [Phone("sil", 0.0, 0.3)]
    for _ in range(count):
        length = float(rng.uniform(0.025, 0.12))
        phones.append(Phone(str(rng.choice(PHONES)), now, now + length, int(rng.integers(0, 3))))
        now += length
    return [*phones, Phone("sil", now, now + 0.4)]


def test_every_phone_of_the_inventory_has_a_shape():
    table = json.loads((files("avdiff") / "bundled" / "phones.json").read_text(encoding="utf8"))
    shapes = {phone: viseme_of(phone) for phone in table["phones"]}
    assert len(shapes) > 80
    assert {name for names in shapes.values() for name in names} == set(VISEMES)
    assert len(VISEMES) == len(TARGETS) == 15
    assert shapes["I"] == ("aa", "ih")  # a diphthong is two shapes


def test_unknown_phone_is_named():
    with pytest.raises(ValueError, match="symbol='ᚠ'"):
        viseme_track([Phone("ᚠ", 0.0, 0.1)], np.zeros(1))


@pytest.mark.parametrize("seed", range(5))
def test_lips_close_on_bilabials_and_tuck_on_labiodentals(seed):
    phones = random_phones(seed, 80)
    centres = {
        name: np.array([(p.start + p.end) / 2 for p in phones if viseme_of(p.symbol)[0] == name])
        for name in ("PP", "FF")
    }
    # the nearest frame at 25 fps is at most 20 ms away, before or after
    for away in (-0.02, 0.0, 0.02):
        assert (viseme_track(phones, centres["PP"] + away)[:, JAW] == 0).mean() >= 0.98
    clear = [t for t in centres["FF"] if np.abs(centres["PP"] - t).min(initial=1.0) > 0.15]
    assert (viseme_track(phones, np.array(clear))[:, TUCK] > 0.85).all()


@pytest.mark.parametrize(
    ("symbol", "column", "least"),
    [
        ("u", ROUND, 0.75),
        ("w", ROUND, 0.75),
        ("y", ROUND, 0.75),
        ("o", ROUND, 0.45),
        ("a", JAW, 0.75),
        ("i", WIDTH, 0.85),
        ("s", TEETH, 0.85),
        ("θ", TONGUE, 0.75),
    ],
)
def test_targets_are_reached_between_neutral_neighbours(symbol, column, least):
    phones = [Phone("k", 0.0, 0.08), Phone(symbol, 0.08, 0.20, 1), Phone("k", 0.20, 0.28)]
    assert viseme_track(phones, np.array([0.14]))[0, column] > least


def test_rounding_starts_before_its_vowel():
    times = np.array([0.05])
    rounded, spread = (
        viseme_track([Phone("s", 0.0, 0.1), Phone(vowel, 0.1, 0.25)], times)[0] for vowel in "ui"
    )
    assert rounded[ROUND] > spread[ROUND] + 0.1
    assert rounded[WIDTH] < spread[WIDTH] - 0.1


def test_stress_opens_the_vowel():
    loud, soft = (
        viseme_track([Phone("t", 0.0, 0.1), Phone("ɛ", 0.1, 0.2, mark)], np.array([0.15]))[0, JAW]
        for mark in (1, 0)
    )
    assert loud > soft + 0.05


def test_track_is_a_function_of_time_bounded_and_smooth():
    phones = random_phones(7)
    end = phones[-1].end
    fine = np.arange(0.0, end, 0.005)
    track = viseme_track(phones, fine)
    assert track.shape == (len(fine), len(PARAMS))
    assert track.dtype == np.float32
    assert track.min() >= 0
    assert track.max() <= 1
    assert np.array_equal(
        viseme_track(phones, fine[::8]), track[::8]
    )  # 25 fps sees what 200 fps sees
    assert np.abs(np.diff(track, axis=0)).max() < 0.30  # no jumps within 5 ms
    assert track[-1, JAW] == 0
    assert np.array_equal(viseme_track([], fine[:3])[:, JAW], np.zeros(3, np.float32))


def test_blend_equals_its_slow_twin():
    phones = random_phones(3, 12)
    times = np.linspace(0.0, phones[-1].end, 23)
    pulls = visemes._pulls(phones)
    fast = visemes._blend(pulls, times)
    for row, t in zip(fast, times, strict=True):
        for column in range(6):
            above = below = 0.0
            for pull in pulls:
                target = TARGETS[pull.name][column] * (pull.jaw if column == JAW else 1.0)
                middle = (pull.start + pull.end) / 2
                away = max(
                    abs(t - middle) - max((pull.end - pull.start) / 2 - visemes._EDGE, 0.0), 0.0
                )
                dominance = pull.strength * np.exp(-away / visemes._DECAY[column])
                above, below = above + dominance * min(target, 1.0), below + dominance
            assert row[column] == pytest.approx(above / below, abs=1e-6)
