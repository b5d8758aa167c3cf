"""Real clips on the model's clock: tables, buckets, sound that fits, masks and references."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from bad_clips import CAPTION, RATE, mux, pictures, steady, tone
from PIL import Image

from avdiff.clip import ClipSpec
from avdiff.data.clip_table import find_clips
from avdiff.data.clips import (
    ClipOptions,
    RealClips,
    choose_bucket,
    fit_length,
    mix_channels,
    parse_buckets,
    stretch_time,
)
from avdiff.media.timestamps import has_variable_rate, picture_times
from avdiff.media.write import write_clip

OPTIONS = ClipOptions(buckets="64x64x25")


def put(folder, name, frames=None, fps=25, sound=None, caption=CAPTION):
    path = folder / name
    write_clip(
        path,
        frames if frames is not None or name.endswith(".wav") else pictures(),
        fps,
        sound,
        RATE,
    )
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf8")
    return path


def test_items_look_like_those_of_the_corpus(tmp_path):
    put(tmp_path, "a.mp4", sound=tone(), caption="first caption\nsecond caption")
    clips = RealClips(tmp_path, OPTIONS)
    item = clips[0]
    assert item["video"].shape == (25, 64, 64, 3) and item["video"].dtype == torch.uint8
    assert item["audio"].shape == (1, 24000) and item["audio"].dtype == torch.float32
    assert (
        item["captions"] == ["first caption", "second caption"]
        and item["caption"] == "first caption"
    )
    assert (item["fps"], item["sample_rate"], item["phones"], item["kind"]) == (
        Fraction(25),
        24000,
        (),
        "clip",
    )
    assert clips.clip(0) == ClipSpec(25, 25, 64, 64) and clips.modalities(0) == ("video", "audio")


@pytest.mark.parametrize("fps", [Fraction(24000, 1001), 25, Fraction(30000, 1001), 60])
def test_pictures_are_taken_by_time_not_by_number(tmp_path, fps):
    """Brightness grows with time: at any source rate, frame i shows the moment (i + 1/2) / 25."""
    count = round(1.4 * float(fps))
    level = (np.arange(count) + 0.5) / float(fps) * 150 + 20
    frames = np.broadcast_to(level[:, None, None, None], (count, 64, 64, 3)).astype(np.uint8)
    put(tmp_path, "a.mp4", frames, fps, tone(1.4))
    video = RealClips(tmp_path, OPTIONS)[0]["video"].float().mean((1, 2, 3)).numpy()
    expected = (np.arange(25) + 0.5) / 25 * 150 + 20
    assert np.abs(video - expected).max() < 150 / float(fps) / 2 + 3


def test_variable_rates_are_seen_and_straightened(tmp_path):
    times = sorted({Fraction(i * i, 750) for i in range(32)})
    level = np.array([float(t) for t in times]) * 150 + 20
    frames = np.broadcast_to(level[:, None, None, None], (len(times), 64, 64, 3)).astype(np.uint8)
    mux(tmp_path / "a.mkv", frames, times, tone(1.4))
    (tmp_path / "a.txt").write_text(CAPTION)
    assert has_variable_rate(picture_times(tmp_path / "a.mkv"))
    video = RealClips(tmp_path, OPTIONS)[0]["video"].float().mean((1, 2, 3)).numpy()
    shown = [max(t for t in times if t <= Fraction(2 * i + 1, 50)) for i in range(25)]
    assert np.abs(video - (np.array([float(t) for t in shown]) * 150 + 20)).max() < 4
    put(tmp_path, "steady.mp4", fps=Fraction(30000, 1001), sound=tone())
    assert not has_variable_rate(picture_times(tmp_path / "steady.mp4"))


def test_late_sound_stays_late(tmp_path):
    """A click at 0.5 s of a sound that starts 0.2 s after the pictures is heard at 0.7 s."""
    sound = np.zeros((1, RATE), np.float32)
    sound[0, RATE // 2 : RATE // 2 + 200] = 0.8
    mux(tmp_path / "a.mp4", pictures(), steady(30), sound, late=0.2)
    (tmp_path / "a.txt").write_text(CAPTION)
    heard = RealClips(tmp_path, OPTIONS)[0]["audio"][0].numpy()
    first = np.flatnonzero(np.abs(heard) > 0.3)[0] / RATE
    # the muxer of a plain FFmpeg call does not hide the 1,024 samples of AAC priming
    assert first == pytest.approx(0.7, abs=1024 / RATE + 0.002)


def test_buckets_by_shape_and_length():
    buckets = parse_buckets("64x64x25;128x64x25;64x64x51;128x128x51", ClipOptions())
    assert choose_bucket(buckets, 100, 100, Fraction(1)) == buckets[0]
    assert choose_bucket(buckets, 480, 480, Fraction(5)) == buckets[3]
    assert choose_bucket(buckets, 100, 190, Fraction(5)) == buckets[1]
    assert choose_bucket(buckets, 100, 100, Fraction(1, 2)) is None


def test_batches_of_one_bucket_stack(tmp_path):
    for i, (size, seconds) in enumerate(
        [((64, 64), 1.2), ((64, 128), 1.2), ((70, 66), 1.1), ((64, 130), 2.5)]
    ):
        put(tmp_path, f"{i}.mp4", pictures(seconds, size=size, seed=i), sound=tone(seconds, seed=i))
    clips = RealClips(tmp_path, ClipOptions(buckets="64x64x25;128x64x25;128x64x51"))
    groups = clips.groups()
    assert groups[0] == groups[2] and len(set(groups)) == 3
    batch = torch.stack([clips[i]["video"] for i in (0, 2)])
    assert batch.shape == (2, 25, 64, 64, 3) and clips[3]["video"].shape == (51, 64, 128, 3)


def test_sound_is_cut_or_filled_to_the_sample(tmp_path):
    put(tmp_path, "long.mp4", sound=tone(2.0))
    put(tmp_path, "short.mp4", sound=tone(0.6))
    clips = RealClips(tmp_path, OPTIONS)
    long, short = clips[0]["audio"][0].numpy(), clips[1]["audio"][0].numpy()
    assert len(long) == len(short) == 24000
    assert np.abs(long[-2000:]).max() > 0.1 and np.abs(short[round(0.65 * RATE) :]).max() < 0.02
    assert np.array_equal(fit_length(np.ones((2, 5)), 7), [[1, 1, 1, 1, 1, 0, 0]] * 2)


def test_stretching_keeps_the_pitch(tmp_path):
    sound = tone(1.5, seed=2)
    pitch = 180 + 37 * 2
    for factor in (0.85, 1.2):
        slower = stretch_time(sound, factor)
        assert slower.shape == (1, round(sound.shape[1] / factor))
        spectrum = np.abs(np.fft.rfft(slower[0] * np.hanning(slower.shape[1])))
        assert np.argmax(spectrum) * RATE / slower.shape[1] == pytest.approx(pitch, abs=2)
    put(tmp_path, "a.mp4", pictures(1.2), sound=None)
    write_clip(tmp_path / "a.wav", None, None, tone(1.44), RATE)
    fitted = RealClips(tmp_path, ClipOptions(buckets="64x64x29", fit="stretch"))[0]["audio"]
    padded = RealClips(tmp_path, ClipOptions(buckets="64x64x29"))[0]["audio"]
    assert fitted.shape == padded.shape and not torch.allclose(fitted, padded)


def test_channels_are_mixed():
    sound = np.stack([np.full(4, v, np.float32) for v in (1, 0, 0, 9, 0, 0)])
    assert mix_channels(sound, 1).tolist() == [
        [pytest.approx(0.28)] * 4
    ]  # the bass channel is left out
    assert mix_channels(np.ones((1, 3), np.float32), 2).shape == (2, 3)
    assert mix_channels(np.array([[1.0], [0.0]], np.float32), 1).tolist() == [[0.5]]
    assert mix_channels(sound, 2).shape == (2, 4)


def test_tables_with_masks_and_references(tmp_path):
    put(tmp_path, "a.mp4", sound=tone(seed=1), caption=None)
    put(tmp_path, "voice.wav", sound=tone(seed=4), caption=None)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    gate = np.zeros((1, RATE), np.float32)
    gate[:, RATE // 2 :] = 1.0
    write_clip(tmp_path / "gate.wav", None, None, gate, RATE)
    row = {"file_name": "a.mp4", "audio": "voice.wav", "captions": ["one", "two"], "language": "fr"}
    row |= {"video_mask": "mask.png", "audio_mask": "gate.wav"}
    row |= {"reference_video": "a.mp4", "reference_audio": "voice.wav"}
    lines = [json.dumps(row), "not json", json.dumps({"video": "gone.mp4", "text": "x"})]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    clips = RealClips(tmp_path, OPTIONS)
    item = clips[0]
    assert item["language"] == "fr" and item["captions"] == ["one", "two"]
    assert item["video_mask"].shape == (25, 64, 64) and item[
        "video_mask"
    ].float().mean() == pytest.approx(0.5, abs=0.05)
    assert item["audio_mask"].float().mean() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(item["reference_video"], item["video"]) and torch.equal(
        item["reference_audio"], item["audio"]
    )
    assert (
        "no JSON" in clips.refused["metadata.jsonl:2"] and "not there" in clips.refused["gone.mp4"]
    )


def test_csv_tables_and_unlisted_files(tmp_path):
    put(tmp_path, "a.mp4", sound=tone(), caption=None)
    put(tmp_path, "b.mp4", sound=tone(), caption=None)
    put(tmp_path, "c.mp4", sound=tone(), caption=None)
    (tmp_path / "metadata.csv").write_text(
        'media_path,caption\na.mp4,"says ""hi"", twice"\nb.mp4,\n', encoding="utf-8-sig"
    )
    table = find_clips(tmp_path)
    assert [e.name for e in table.entries] == ["a.mp4"] and table.entries[
        0
    ].caption == 'says "hi", twice'
    assert "no caption" in table.refused["b.mp4"] and "not listed" in table.refused["c.mp4"]
    (tmp_path / "metadata.csv").write_bytes("media_path,caption\na.mp4,\xfc\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        find_clips(tmp_path)


def test_no_sound_is_an_error_unless_allowed(tmp_path):
    put(tmp_path, "a.mp4", sound=None)
    with pytest.raises(ValueError, match="no sound track"):
        RealClips(tmp_path, OPTIONS)
    item = RealClips(tmp_path, ClipOptions(buckets="64x64x25", allow_silent=True))[0]
    assert "audio" not in item and item["video"].shape[0] == 25
    put(tmp_path, "b.mp4", sound=np.zeros((1, RATE), np.float32))
    clips = RealClips(tmp_path, OPTIONS)
    with pytest.raises(ValueError, match="silence"):
        clips[0]


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        RealClips(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no clips there"):
        RealClips(tmp_path)
    for text, words in (
        ("128x128", "width x height x frames"),
        ("100x128x51", "width=100"),
        ("128x128x50", "num_frames=50"),
    ):
        with pytest.raises(ValueError, match=words):
            ClipOptions(buckets=text)
    with pytest.raises(ValueError, match="fit='squeeze'"):
        ClipOptions(fit="squeeze")
    put(tmp_path, "a.mp4", pictures(0.3), sound=tone(0.3))
    with pytest.raises(ValueError, match="shortest bucket needs"):
        RealClips(tmp_path, OPTIONS)
