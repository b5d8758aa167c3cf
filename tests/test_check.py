"""The data check: every broken file of a folder is named, the good ones pass, the numbers are
right.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from bad_clips import CAPTION, RATE, make_folder, pictures, tone
from tiny import tiny_vae

from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.data.check import check_folder, checked_clips, round_trip_psnr, save_report
from avdiff.data.check_measures import (
    clipped_share,
    find_copies,
    likeness_code,
    loudness,
    mentions_sound,
    offset_estimate,
    silence_share,
)
from avdiff.data.clips import ClipOptions
from avdiff.media.write import write_clip

OPTIONS = ClipOptions(buckets="64x64x25")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    good, bad = make_folder(folder)
    return folder, good, bad, check_folder(folder)


def test_good_ones_pass_and_bad_ones_are_named(checked):
    _, good, bad, report = checked
    assert len(good) + len(bad) >= 40 and not good & bad
    assert set(report.good) - {"too_short.mp4"} == good  # short is bad only against a bucket
    assert bad - {"too_short.mp4"} <= set(report.refused)
    assert all(report.refused.values()) and report.exit_code == 1


def test_reasons_and_warnings_say_what_is_wrong(checked):
    _, _, _, report = checked
    clips = {clip.name: clip for clip in report.clips}
    reasons = {
        "no_sound.mp4": "no sound track",
        "silent.mp4": "silent for 100 %",
        "mostly_missing_sound.mp4": "silent for 9",
        "cut_short.mkv.mp4": "cut short",
        "not_utf8.mp4": "not UTF-8",
        "one_picture.mp4": "single picture",
        "flat.mp4": "flat colour",
        "zero_length.mp4": "cannot be read",
        "wrong_suffix.dat": "no kind of clip",
        "twice.mp4": "twice.mov",
    }
    for name, words in reasons.items():
        assert words in report.refused[name], (name, report.refused[name])
    told = {
        "variable_rate.mkv": "variable frame rate",
        "late_sound.mp4": "starts +0.2",
        "sound_longer.mp4": "0.80 s longer",
        "sound_shorter.mp4": "0.50 s shorter",
        "clipped.mp4": "clipped",
        "no_sound_words.mp4": "no caption says a word",
    }
    for name, words in told.items():
        assert any(words in warning for warning in clips[name].warnings), (
            name,
            clips[name].warnings,
        )
    copies = [name for name, clip in clips.items() if any("copy" in w for w in clip.warnings)]
    assert copies == ["plain.mp4"] and not clips["variable_rate.mkv"].problems
    assert (
        clips["ntsc.mp4"].fps == pytest.approx(29.97, abs=0.01)
        and clips["surround.mp4"].channels == 6
    )
    assert not clips["plain.mp4"].variable_rate and clips["stereo.mp4"].channels == 2


def test_only_the_good_ones_are_used(checked):
    folder, good, bad, report = checked
    clips = checked_clips(folder, OPTIONS, report)
    assert {entry.name for entry in clips.entries} == good
    assert bad <= set(clips.refused)
    for index in range(len(clips)):
        item = clips[index]
        assert item["name"] in good and float(item["audio"].square().mean()) > 1e-6


def test_silence_can_be_allowed(checked):
    folder, good, _, _ = checked
    report = check_folder(folder, allow_silent=True)
    assert set(report.good) - good == {
        "no_sound.mp4",
        "silent.mp4",
        "nearly_silent.mp4",
        "mostly_missing_sound.mp4",
        "too_short.mp4",
    }
    clips = checked_clips(folder, ClipOptions(buckets="64x64x25", allow_silent=True), report)
    items = {clips[i]["name"]: clips[i] for i in range(len(clips))}
    assert "audio" not in items["no_sound.mp4"] and "audio" not in items["silent.mp4"]


def test_the_report_is_json(checked, tmp_path):
    _, _, _, report = checked
    save_report(report, tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf8"))
    assert (
        told["exit_code"] == 1
        and told["good"] == len(report.good)
        and len(told["clips"]) == len(report.clips)
    )
    assert {"fps", "silence", "loudness", "start_gap", "offset", "warnings"} <= set(
        told["clips"][0]
    )


def test_exit_codes(tmp_path):
    write_clip(tmp_path / "a.mp4", pictures(), 25, tone(), RATE)
    (tmp_path / "a.txt").write_text(CAPTION)
    assert check_folder(tmp_path).exit_code == 0
    (tmp_path / "a.txt").unlink()
    assert check_folder(tmp_path).exit_code == 2
    with pytest.raises(ValueError, match="no such folder"):
        check_folder(tmp_path / "nowhere")


def test_loudness_of_the_reference_signal():
    """EBU Tech 3341: a 997 Hz stereo sine of -23 dBFS (peak) in both channels reads -23 LUFS."""
    t = np.arange(3 * 48000) / 48000
    sine = 10 ** (-23 / 20) * np.sin(2 * np.pi * 997 * t)
    assert loudness(np.stack([sine, sine]), 48000) == pytest.approx(-23.0, abs=0.1)
    assert loudness(np.zeros((1, 48000)), 48000) == float("-inf")
    half = np.concatenate([sine, np.zeros(3 * 48000)])  # the gate leaves silence out
    assert loudness(np.stack([half, half]), 48000) == pytest.approx(-23.0, abs=0.3)


def test_silence_and_clipping_shares():
    sound = tone(2.0)
    assert silence_share(sound, RATE) == 0.0 and clipped_share(sound) == 0.0
    sound[:, : sound.shape[1] // 4] = 0
    assert silence_share(sound, RATE) == pytest.approx(0.25, abs=0.02)
    assert (
        clipped_share(np.clip(20 * sound, -1, 1)) > 0.3 and silence_share(sound[:, :0], RATE) == 1.0
    )


@pytest.mark.parametrize("shift", [-0.2, 0.0, 0.24])
def test_the_offset_of_a_shifted_sound_is_found(shift):
    event = next(
        e
        for e in (sample_event(np.random.default_rng(i), 4.0, "knock") for i in range(50))
        if len(e.contacts) == 3
    )
    frames = np.stack([render_event(event, (i + 0.5) / 25, 64) for i in range(100)])
    sound = np.roll(event_audio(event, 4 * RATE, RATE), round(shift * RATE))[None]
    offset, _ = offset_estimate(frames, sound, 25.0, RATE)
    assert offset == pytest.approx(shift, abs=0.081)


def test_copies_are_found_after_encoding_again(tmp_path):
    frames, sound = pictures(2.0, seed=3), tone(2.0, seed=3)
    noisy = np.clip(
        frames.astype(int) + np.random.default_rng(0).integers(-3, 4, frames.shape), 0, 255
    ).astype(np.uint8)
    codes = {
        "a": likeness_code(frames, sound),
        "b": likeness_code(pictures(2.0, seed=5), tone(2.0, seed=5)),
        "c": likeness_code(noisy, sound * 0.8),
        "d": likeness_code(None, sound),
    }
    assert find_copies(codes) == {"c": "a"}


def test_words_on_sound():
    for caption in (
        'A man says "hi"',
        "A dog barks",
        "Une femme dit bonjour",
        "一个人说话",
        "彼女は言う",
        "Music plays",
    ):
        assert mentions_sound(caption)
    for caption in ("A red disc on a wall", "A woman with glasses", "Un mur bleu"):
        assert not mentions_sound(caption)


def test_round_trip_names_the_way_out(checked):
    """A codec that has learned nothing keeps little of a picture: the warning says how to go on."""
    torch.manual_seed(0)
    vae = tiny_vae().eval()
    assert round_trip_psnr(pictures(1.0), vae) < 25
    folder, _, _, _ = checked
    from avdiff.data.check import check_clip
    from avdiff.data.clip_table import find_clips

    entry = next(e for e in find_clips(folder).entries if e.name == "plain.mp4")
    report, _ = check_clip(entry, vae=vae)
    assert any(
        "use a pipeline whose video VAE" in warning and "--codecs" in warning
        for warning in report.warnings
    )
