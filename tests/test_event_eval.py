"""Onsets heard, contacts seen, and how they meet, on drawn events with exact truth."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch

from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import KINDS, Event, sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.evaluation.metrics import events as ev
from avdiff.media.write import Clip
from avdiff.models.evaluators.contact_detector import ContactDetector, bumps, peaks
from avdiff.train.evaluators import contacts as training

RATE = 24000


@cache
def scenes() -> tuple[Event, ...]:
    """Two of each kind."""
    return tuple(
        sample_event(np.random.default_rng([3, i]), 2.5, KINDS[i % len(KINDS)]) for i in range(12)
    )


@cache
def pictures(index: int, fps: float = 25, size: int = 64) -> np.ndarray:
    count = round(2.5 * fps)
    return np.stack([render_event(scenes()[index], (i + 0.5) / fps, size) for i in range(count)])


def sound(index: int) -> np.ndarray:
    return event_audio(scenes()[index], round(2.5 * RATE), RATE)


def close(truth: tuple[float, ...], found: np.ndarray, within: float) -> int:
    return len(ev.match(np.array(truth), found, within))


def test_the_bundled_reader_sees_impacts_within_half_a_frame() -> None:
    total = near = extra = 0
    for index, scene in enumerate(scenes()):
        seen = ev.visual_contacts(pictures(index), 25)
        total += len(scene.contacts)
        near += close(scene.contacts, seen, 0.02)
        extra += max(0, len(seen) - len(scene.contacts))
    assert near / total >= 0.9
    assert extra / total <= 0.05


def test_other_rates_and_sizes_are_read_on_the_same_clock() -> None:
    total = near = 0
    for index in range(6):
        for fps, size in ((30.0, 128), (50.0, 96)):
            seen = ev.visual_contacts(pictures(index, fps, size), fps)
            total += len(scenes()[index].contacts)
            near += close(scenes()[index].contacts, seen, 0.04)
    assert near / total >= 0.85


def test_onsets_are_placed_to_the_millisecond() -> None:
    total = near = counted = 0
    for index, scene in enumerate(scenes()):
        heard = ev.audio_onsets(sound(index), RATE)
        total += len(scene.contacts)
        near += close(scene.contacts, heard, 0.005)
        counted += len(heard) == len(scene.contacts)
    assert near / total >= 0.95
    assert counted >= 11
    assert not len(ev.audio_onsets(np.zeros(RATE, np.float32), RATE))
    assert not len(ev.audio_onsets(np.zeros(100, np.float32), RATE))


@pytest.mark.parametrize("late", [-0.12, 0.12])
def test_a_late_sound_is_a_positive_lag_and_misses(late: float) -> None:
    for index in (4, 5):
        moved = np.roll(np.pad(sound(index), (RATE, RATE)), round(late * RATE))[RATE:-RATE].astype(
            np.float32
        )
        good = Clip(pictures(index), sound(index)[None], Fraction(25), RATE)
        bad = Clip(pictures(index), moved[None], Fraction(25), RATE)
        truth, found = (ev.events(clip, len(scenes()[index].contacts)) for clip in (good, bad))
        assert truth["event_hits"] == truth["event_onsets"] == len(scenes()[index].contacts)
        assert truth["count_sound_right"] and truth["count_picture_right"]
        assert found["event_hits"] == 0
        assert found["contact_lag_ms"] == pytest.approx(1000 * late, abs=25)
        assert ev.score(good, len(scenes()[index].contacts)) == 1.0
        assert ev.score(bad) == 0.0


def test_matching_uses_each_once_and_the_nearest_first() -> None:
    assert ev.match(np.array([1.0, 1.04]), np.array([1.03]), 0.05) == [(1, 0)]
    assert sorted(ev.match(np.array([1.0, 2.0]), np.array([2.01, 1.02, 9.0]), 0.05)) == [
        (0, 1),
        (1, 0),
    ]
    assert ev.match(np.zeros(0), np.array([1.0]), 1.0) == []


def test_still_pictures_have_no_impact_and_missing_parts_are_named() -> None:
    still = np.repeat(pictures(0)[:1], 40, axis=0)
    found = ev.events(Clip(still, sound(0)[None], Fraction(25), RATE), 3)
    assert (
        found["event_contacts"] == 0
        and found["event_hits"] == 0
        and math.isnan(found["contact_lag_ms"])
    )
    with pytest.raises(ValueError, match="needs both"):
        ev.events(Clip(None, sound(0)[None], None, RATE))
    assert ev.score(Clip(still, None, Fraction(25), None)) == 0.0
    with pytest.raises(ValueError, match="no weights in"):
        ev.load_reader("nowhere")


def test_bumps_and_peaks_undo_each_other() -> None:
    truth = [0.313, 0.55, 1.111]
    assert peaks(bumps(truth, 40)) == pytest.approx(truth, abs=2e-3)
    assert peaks(torch.zeros(10)) == [] and not bumps([], 5).any()


def test_reader_reads_each_clip_alone_and_refuses_other_sizes() -> None:
    reader = ContactDetector((8, 8, 8), 16, 1).eval()
    x = torch.rand(2, 6, 3, 64, 64) * 2 - 1
    assert torch.allclose(reader(x)[1], reader(x[1:])[0], atol=1e-5)
    with pytest.raises(ValueError, match="64"):
        reader(torch.zeros(1, 4, 3, 32, 32))


def test_training_writes_a_reader_that_loads(tmp_path: object) -> None:
    folder = f"{tmp_path}/reader"
    metrics = training.main(["--output", folder, "--steps", "2", "--batch", "1", "--scenes", "2"])
    assert {"within_half_picture", "spoilt_counted_right"} <= set(metrics)
    assert isinstance(ev.load_reader(folder), ContactDetector)
