"""Objects that sound: motion, sound and impact times agree."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from avdiff.corpus.captions import event_captions, phrases
from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import KINDS, Event, ball_height, sample_event, strike_distance
from avdiff.corpus.events.sound import BODIES, event_audio, ring
from avdiff.corpus.speech.read import LANGUAGES

RATE = 24000


def events(count: int, seconds: float = 2.5, kind: str | None = None) -> list[Event]:
    return [sample_event(np.random.default_rng([7, i]), seconds, kind) for i in range(count)]


def test_impacts_lie_in_the_clip_in_order():
    for event in events(200):
        times = np.array(event.contacts)
        assert 1 <= len(times) <= 6 and times[0] > 0.1 and times[-1] < 2.5 - 0.15
        assert len(times) == 1 or np.diff(times).min() > 0.1
        assert len(event.speeds) == len(times) and 0 < min(event.speeds) <= max(event.speeds) <= 1
        assert event.attributes()["count"] == str(len(times))


@pytest.mark.parametrize("kind", KINDS)
def test_sound_starts_at_the_impact(kind):
    """The first sample above 2 % of the peak, and the loudest 1 ms step up of energy, within 5 ms
    of the truth.
    """
    for event in events(12, kind=kind):
        single = replace(event, contacts=event.contacts[:1], speeds=(1.0,))
        sound = event_audio(single, round(2.5 * RATE), RATE)
        first = np.flatnonzero(np.abs(sound) > 0.02 * np.abs(sound).max())[0] / RATE
        assert abs(first - single.contacts[0]) < 0.002
        assert np.abs(sound[: round(single.contacts[0] * RATE) - 1]).max(initial=0.0) == 0
        assert 0.3 < np.abs(sound).max() < 0.9


@pytest.mark.parametrize("kind", KINDS)
def test_every_impact_is_heard(kind):
    """With several impacts: energy rises at each of them, though earlier ones still ring."""
    for event in events(10, kind=kind):
        sound = event_audio(event, round(2.5 * RATE), RATE).astype(np.float64)
        edge = np.diff(sound, prepend=0.0) ** 2  # high frequencies are where a contact shows
        for time in event.contacts:
            at = round(time * RATE)
            before, after = edge[at - 48 : at].max(), edge[at : at + 48].max()
            assert after > 1.5 * before


def onset(sound: np.ndarray, near: float) -> float:
    """Where the log spectrum rises most (4 ms windows, 1 ms steps) within 50 ms of `near`."""
    first = max(0, round((near - 0.05) * RATE))
    part = np.pad(sound, (0, 2000))[first : first + round(0.1 * RATE)]
    windows = np.lib.stride_tricks.sliding_window_view(part, 96)[::24] * np.hanning(96)
    level = np.abs(np.fft.rfft(windows, 256))
    rise = np.maximum(np.diff(np.log(level + 1e-3 * level.max() + 1e-6), axis=0), 0).sum(1)
    return (first + (int(rise.argmax()) + 1) * 24 + 48) / RATE


def test_onsets_are_where_the_truth_says_even_over_ringing():
    errors = []
    for event in events(60):
        sound = event_audio(event, round(2.5 * RATE), RATE)
        errors += [onset(sound, time) - time for time in event.contacts]
    assert len(errors) > 100 and np.abs(errors).max() < 0.005


def test_a_new_strike_damps_the_ringing_and_nothing_before_it():
    event = next(e for e in events(20, kind="bell") if len(e.contacts) >= 2)
    one = event_audio(
        replace(event, contacts=event.contacts[:1], speeds=event.speeds[:1]), 60000
    ).astype(np.float64)
    two = event_audio(
        replace(event, contacts=event.contacts[:2], speeds=event.speeds[:2]), 60000
    ).astype(np.float64)
    split = round(event.contacts[1] * RATE)
    gain = np.dot(one[:split], two[:split]) / np.dot(one[:split], one[:split])
    assert np.abs(two[:split] - gain * one[:split]).max() < 1e-5
    tail = slice(split + 1000, split + 9000)
    alone = event_audio(
        replace(event, contacts=event.contacts[1:2], speeds=event.speeds[1:2]), 60000
    ).astype(np.float64)
    parts = np.stack([one[tail], alone[tail]], 1)
    shares, *_ = np.linalg.lstsq(parts, two[tail], rcond=None)
    assert np.abs(parts @ shares - two[tail]).max() < 1e-4 and shares[0] == pytest.approx(
        0.25 * gain, rel=0.02
    )


def test_bodies_ring_at_their_modes():
    """Spectrum of a strike peaks at the lowest mode of a bell, to a percent or so of detuning."""
    body = BODIES["silver bell"]
    sound = ring(body, np.random.default_rng(0), 1.0, 0.25, RATE)
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    hertz = np.fft.rfftfreq(len(sound), 1 / RATE)
    near = (hertz > 0.97 * body.base) & (hertz < 1.03 * body.base)
    assert spectrum[near].max() > 20 * np.median(spectrum)


def test_strikers_touch_exactly_at_each_impact():
    for event in events(60):
        grid = np.arange(0, 2.5, 0.001)
        if event.kind == "ball":
            away = np.array([ball_height(event, t) for t in grid])
        else:
            away = np.array([strike_distance(event, t) for t in grid])
        assert (away >= -1e-9).all() and (away <= 1.11).all()
        assert np.abs(np.diff(away)).max() < 0.05  # no jumps
        for time in event.contacts:
            touch = (
                ball_height(event, time) if event.kind == "ball" else strike_distance(event, time)
            )
            assert touch == pytest.approx(0, abs=1e-6)
        for one, two in zip(event.contacts, event.contacts[1:], strict=False):
            inside = (grid > one + 0.03) & (grid < two - 0.03)
            assert away[inside].min() > 0.01


def test_a_bouncing_ball_obeys_gravity():
    """The second difference of the height is the same in every flight."""
    event = next(e for e in events(60, kind="ball") if len(e.contacts) >= 3)
    pulls = []
    for one, two in zip(event.contacts, event.contacts[1:], strict=False):
        a, b, c = (ball_height(event, (one + two) / 2 + d) for d in (-0.01, 0, 0.01))
        pulls.append((a - 2 * b + c) / 1e-4)
    assert np.ptp(pulls) < 1e-6 * abs(pulls[0]) and pulls[0] < 0


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ball"])
def test_the_frame_at_an_impact_is_the_one_that_touches(kind):
    """The frame that holds an impact is nearer to contact than its neighbours, in the motion and in
    the picture.
    """
    fps = 25
    for event in events(3, kind=kind):
        for time in event.contacts:
            held = int(time * fps)
            away = {i: strike_distance(event, (i + 0.5) / fps) for i in range(held - 2, held + 3)}
            assert min(away, key=away.__getitem__) == held
            # the picture without the rays and ripples that follow a contact: the time since is the
            # same in all of them
            still = replace(event, contacts=(time,), speeds=(1.0,))
            contact = render_event(still, time - 1e-6, 64).astype(np.float32)
            before = [
                np.abs(render_event(still, time - d, 64) - contact).mean()
                for d in (0.005, 0.02, 0.045)
            ]
            assert before[0] < 0.8 * min(before[1:]) and before[-1] > 0.3


def test_the_ball_is_lowest_in_pixels_at_its_impacts():
    fps = 50
    for event in events(40, kind="ball"):
        if len(event.contacts) < 3 or event.background == "grey":
            continue
        event = replace(event, drift=(64.0, 64.0))
        # the shadow moves less than the ball: rows above the floor line show the ball alone
        times = (np.arange(round(2.2 * fps)) + 0.5) / fps
        low = [ball_height(event, t) for t in times]
        for time in event.contacts[:-1]:
            near = [i for i in range(len(times)) if abs(times[i] - time) < 0.05]
            assert (
                abs(times[near[int(np.argmin([low[i] for i in near]))]] - time) <= 0.5 / fps + 1e-9
            )
        top = render_event(event, event.contacts[0] - 0.6, 64)
        floor = render_event(event, event.contacts[0], 64)
        moved = np.abs(top.astype(int) - floor).sum(-1) > 60
        rows = np.flatnonzero(moved.any(1))
        assert rows[0] < 30 and rows[-1] > 42
        return
    raise AssertionError("no ball that bounces thrice was drawn")


def test_sizes_show_the_same_scene_and_the_camera_is_still():
    for event in [events(1, kind=kind)[0] for kind in KINDS]:
        large, small = render_event(event, 0.7, 128), render_event(event, 0.7, 64)
        shrunk = large.reshape(64, 2, 64, 2, 3).mean((1, 3))
        assert np.abs(shrunk - small).mean() < 4
        corner = render_event(event, 0.1, 64)[:6, :6]
        assert np.array_equal(corner, render_event(event, 1.3, 64)[:6, :6])


def test_captions_tell_the_number_of_impacts():
    for event in events(25):
        for language in LANGUAGES:
            captions = event_captions(event, language, np.random.default_rng(1))
            assert len(captions) == (4 if language == "en" else 6)
            told = [phrases("en")["times"][len(event.contacts) - 1]] * 4
            told += [phrases(language)["times"][len(event.contacts) - 1]] * 2
            for caption, times in zip(captions, told, strict=False):
                assert (
                    times.lower() in caption.lower() and "{" not in caption and "  " not in caption
                )


def test_errors():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="kind='horn'"):
        sample_event(rng, 2.0, "horn")
    with pytest.raises(ValueError, match=r"seconds=0\.2"):
        sample_event(rng, 0.2)
    with pytest.raises(ValueError, match="size=4"):
        render_event(events(1)[0], 0.0, 4)
