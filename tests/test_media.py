"""Media: what is written comes back, in sync, at its exact length; what cannot be read is one clear
sentence.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from avdiff.clip import as_fps
from avdiff.media.container import MediaError
from avdiff.media.pictures import contact_sheet, spectrogram_picture
from avdiff.media.probe import probe
from avdiff.media.read import read_clip
from avdiff.media.sound import AAC_FRAME, resample_audio
from avdiff.media.write import write_clip

RATE = 24000


def moving_frames(count: int, height: int = 64, width: int = 64) -> np.ndarray:
    """Frame i is a plain grey of level 20 + 4 * (i % 50): its number can be read back after
    compression.
    """
    levels = (20 + 4 * (np.arange(count) % 50)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3)).copy()


def frame_numbers(frames: np.ndarray) -> list[int]:
    return [round((float(f.mean()) - 20) / 4) for f in frames]


def tone(samples: int, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(samples) / rate)).astype(np.float32)[None]


@pytest.mark.parametrize("fps", ["23.976", 24, 25, "29.97", 30])
def test_flash_and_click_stay_together(tmp_path: Path, fps: str | int) -> None:
    rate, count = as_fps(fps), 75
    frames, audio = (
        np.zeros((count, 64, 64, 3), np.uint8),
        np.zeros((1, round(count / rate * RATE)), np.float32),
    )
    at = [10, 40, 70]
    for index in at:
        frames[index] = 255
        start = round(index / rate * RATE)
        audio[0, start : start + 60] = np.float32(0.9) * np.sin(np.arange(60) * 1.3)
    write_clip(tmp_path / "x.mp4", frames, rate, audio, RATE)
    clip = read_clip(tmp_path / "x.mp4")
    assert clip.frames is not None and clip.audio is not None and clip.fps == rate
    assert len(clip.frames) == count and clip.audio.shape == audio.shape  # both exact
    assert np.flatnonzero(clip.frames.mean(axis=(1, 2, 3)) > 128).tolist() == at
    loud = np.abs(clip.audio[0]) > 0.3
    for index in at:
        middle, window = round(index / rate * RATE), RATE // 4
        onset = np.flatnonzero(loud[middle - window : middle + window])[0] - window
        assert abs(onset) / RATE < 0.005, f"click {onset / RATE * 1000:.1f} ms from its flash"


def test_header_has_exact_lengths(tmp_path: Path) -> None:
    rate = Fraction(30000, 1001)
    audio = tone(round(51 / rate * RATE))
    write_clip(tmp_path / "x.mp4", moving_frames(51), rate, audio, RATE)
    info = probe(tmp_path / "x.mp4")
    assert info.fps == rate and info.num_frames == 51 and info.video_seconds == 51 / rate
    assert info.audio_seconds == Fraction(audio.shape[1], RATE) and info.start_gap == 0
    assert (info.height, info.width, info.channels, info.sample_rate) == (64, 64, 1, RATE)
    assert (info.video_codec, info.audio_codec) == ("h264", "aac")


def test_a_naive_reader_gets_sound_within_one_aac_frame(tmp_path: Path) -> None:
    """Readers that decode without looking at durations still get equal lengths, to within one
    frame.
    """
    audio = tone(50_000)
    write_clip(tmp_path / "x.mp4", moving_frames(52), 25, audio, RATE)
    with av.open(str(tmp_path / "x.mp4")) as container:
        decoded = sum(frame.samples for frame in container.decode(audio=0))
    assert 0 <= decoded - audio.shape[1] < AAC_FRAME


def test_colours_and_sound_survive(tmp_path: Path) -> None:
    frames = np.zeros((10, 64, 64, 3), np.uint8)
    frames[:, :32, :32], frames[:, :32, 32:], frames[:, 32:, :32] = (
        (200, 30, 40),
        (30, 200, 40),
        (40, 30, 200),
    )
    audio = np.concatenate([tone(9600), tone(9600, hertz=1000.0)])
    write_clip(tmp_path / "x.mp4", frames, 25, audio, RATE)
    clip = read_clip(tmp_path / "x.mp4")
    assert clip.frames is not None and clip.audio is not None
    for row, column in ((16, 16), (16, 48), (48, 16), (48, 48)):
        assert np.abs(clip.frames[5, row, column].astype(int) - frames[5, row, column]).max() <= 6
    middle = slice(2000, -2000)
    for heard, said in zip(clip.audio, audio, strict=True):
        assert np.corrcoef(heard[middle], said[middle])[0, 1] > 0.999


def test_every_kind_of_picture_gives_the_same_file(tmp_path: Path) -> None:
    frames = moving_frames(6)
    kinds = {
        "array": frames,
        "float": frames.astype(np.float32) / 255,
        "pil": [Image.fromarray(f) for f in frames],
        "generator": (f for f in frames),
    }
    for name, kind in kinds.items():
        write_clip(tmp_path / f"{name}.mp4", kind, 25)
    contents = {(tmp_path / f"{name}.mp4").read_bytes() for name in kinds}
    assert len(contents) == 1


def test_odd_sizes_are_padded(tmp_path: Path) -> None:
    write_clip(tmp_path / "x.mp4", moving_frames(3, 63, 41), 25)
    info = probe(tmp_path / "x.mp4")
    assert (info.height, info.width, info.audio_codec) == (64, 42, None)


@pytest.mark.parametrize(("name", "tolerance"), [("x.wav", 1e-4), ("x.m4a", 0.05)])
def test_sound_alone(tmp_path: Path, name: str, tolerance: float) -> None:
    audio = tone(RATE + 17) * np.minimum(1, np.arange(RATE + 17) / 2000).astype(np.float32)
    write_clip(tmp_path / name, None, None, audio, RATE, {"seed": 3})
    clip = read_clip(tmp_path / name)
    assert (
        clip.frames is None
        and clip.fps is None
        and clip.audio is not None
        and clip.audio.shape == audio.shape
    )
    assert np.abs(clip.audio - audio)[:, :-AAC_FRAME].max() < tolerance
    assert clip.metadata["seed"] == 3


def test_tags_say_who_made_it(tmp_path: Path) -> None:
    facts = {"model": "presenter", "seed": 7, "prompt": 'A woman says "guten Tag, мир"'}
    write_clip(tmp_path / "x.mp4", moving_frames(3), 25, metadata=facts)
    with av.open(str(tmp_path / "x.mp4")) as container:
        comment = container.metadata["comment"]
    assert comment.startswith("AI-generated ") and json.loads(comment.partition(" ")[2]) == facts
    assert {k: read_clip(tmp_path / "x.mp4").metadata[k] for k in facts} == facts
    write_clip(tmp_path / "drawn.mp4", moving_frames(3), 25)
    assert "comment" not in probe(tmp_path / "drawn.mp4").metadata


def test_frames_are_resampled_by_time(tmp_path: Path) -> None:
    write_clip(tmp_path / "x.mp4", moving_frames(50), 25)
    slow, fast = (
        read_clip(tmp_path / "x.mp4", fps=12.5).frames,
        read_clip(tmp_path / "x.mp4", fps=50).frames,
    )
    assert slow is not None and fast is not None
    assert len(slow) == 25 and frame_numbers(slow) in ([*range(0, 50, 2)], [*range(1, 50, 2)])
    assert frame_numbers(fast) == [i // 2 for i in range(100)]
    part = read_clip(tmp_path / "x.mp4", max_seconds=0.4).frames
    assert part is not None and frame_numbers(part) == list(range(10))


def write_irregular(
    path: Path, times_ms: list[int], rotate: int = 0, sound_at: float = 0.0
) -> np.ndarray:
    """A variable-rate file as phones and screen recorders make them; the sound, a click, begins at
    `sound_at`.
    """
    frames = moving_frames(len(times_ms), 48, 64)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0"})
        video.width, video.height, video.pix_fmt, video.codec_context.time_base = (
            64,
            48,
            "yuv420p",
            Fraction(1, 1000),
        )
        if rotate:
            video.set_display_rotation(rotate)
        sound = container.add_stream(
            "pcm_s16le" if path.suffix == ".mkv" else "aac", rate=RATE, layout="mono"
        )
        if rotate:
            frames[:, :24] = 255  # the upper half is white
        for picture, time in zip(frames, times_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        click = np.zeros((1, RATE), np.int16)
        click[0, :48] = 20000
        chunk = av.AudioFrame.from_ndarray(click, format="s16", layout="mono")
        chunk.sample_rate, chunk.pts, chunk.time_base = (
            RATE,
            round(sound_at * RATE),
            Fraction(1, RATE),
        )
        converter = av.AudioResampler(format=sound.codec_context.format, frame_size=AAC_FRAME)
        for piece in (*converter.resample(chunk), *converter.resample(None)):
            container.mux(sound.encode(piece))
        container.mux(sound.encode(None))
    return frames


def test_variable_rate_follows_the_timestamps(tmp_path: Path) -> None:
    times = [0, 40, 80, 400, 440, 960, 1000]  # two long holds
    write_irregular(tmp_path / "x.mkv", times)
    frames = read_clip(tmp_path / "x.mkv", fps=25).frames
    assert frame_numbers(frames)[:26] == [0, 1] + [2] * 8 + [3] + [4] * 13 + [5, 6]


@pytest.mark.parametrize("gap", [0.2, -0.2])
def test_start_gap_of_the_sound_is_honoured(tmp_path: Path, gap: float) -> None:
    first = 0 if gap > 0 else 200
    write_irregular(tmp_path / "x.mkv", [first + 40 * i for i in range(25)], sound_at=max(gap, 0.0))
    clip = read_clip(tmp_path / "x.mkv")
    assert clip.audio is not None
    assert abs(float(clip.start_gap) - gap) < 0.0015
    click = np.flatnonzero(np.abs(clip.audio[0]) > 0.3)
    if gap > 0:
        assert abs(click[0] / RATE - gap) < 0.002
    else:  # the click came before the first picture
        assert click.size == 0 and abs(clip.audio.shape[1] / RATE - 0.8) < 0.002


def test_rotation_and_size(tmp_path: Path) -> None:
    for degrees, white in ((90, "left"), (-90, "right"), (180, "lower")):
        write_irregular(tmp_path / "x.mp4", [0, 40, 80], rotate=degrees)
        frames = read_clip(tmp_path / "x.mp4").frames
        assert frames is not None
        height, width = frames.shape[1:3]
        assert (height, width) == ((48, 64) if degrees == 180 else (64, 48))
        halves = {
            "left": frames[0, :, : width // 2],
            "right": frames[0, :, width // 2 :],
            "lower": frames[0, height // 2 :],
        }
        assert halves[white].mean() > 230, (degrees, {k: v.mean() for k, v in halves.items()})
    small = read_clip(tmp_path / "x.mp4", size=(32, 32)).frames
    assert small is not None and small.shape[1:] == (32, 32, 3)


def test_resampling_keeps_time_and_level() -> None:
    audio = np.concatenate([tone(RATE), tone(RATE, hertz=100.0)])
    for target in (16000, 48000, 44100):
        other = resample_audio(audio, RATE, target)
        assert other.shape == (2, target)
        expected = np.concatenate([tone(target, target), tone(target, target, 100.0)])
        assert np.abs(other - expected)[:, 500:-500].max() < 0.01


def test_pictures() -> None:
    sheet = contact_sheet(moving_frames(40), count=16, columns=8, fps=25)
    assert sheet.size == (8 * 64, 2 * 64)
    levels = np.asarray(sheet)[32::64, 48::64].reshape(-1, 3)[:, 0]
    assert frame_numbers(levels[[0, -1]]) == [0, 39]
    picture = (
        np.asarray(spectrogram_picture(tone(RATE, hertz=3000.0), RATE, height=120))
        .astype(int)
        .sum(axis=2)
    )
    brightest = picture[:, 50].argmax()
    assert picture.shape == (120, 100) and abs((119 - brightest) / 120 * 12000 - 3000) <= 100


BAD_WRITES = {
    "suffix": ({"path": "x.avi"}, "needs a name that ends in .mp4"),
    "no folder": ({"path": "none/x.mp4"}, "folder does not exist"),
    "fps": ({"fps": 0}, "frame rate above 0"),
    "no fps": ({"fps": None}, "need a frame rate"),
    "channels": ({"frames": np.zeros((2, 8, 8, 4), np.uint8)}, r"needs \(height, width, 3\)"),
    "dtype": ({"frames": np.zeros((2, 8, 8, 3), np.int64)}, "needs uint8"),
    "nan picture": ({"frames": np.full((2, 8, 8, 3), np.nan)}, "NaN"),
    "no pictures": ({"frames": []}, "at least one picture"),
    "mixed sizes": (
        {"frames": [np.zeros((8, 8, 3), np.uint8), np.zeros((16, 8, 3), np.uint8)]},
        "differs in size",
    ),
    "nan sound": ({"audio": np.full((1, 99), np.nan)}, "NaN"),
    "int sound": ({"audio": np.zeros((1, 99), np.int16)}, "needs float"),
    "many channels": ({"audio": np.zeros((6, 99))}, "1 or 2 channels"),
    "rate": ({"sample_rate": 23456}, "AAC needs one of"),
    "nothing": ({"frames": None, "audio": None}, "nothing to write"),
}


@pytest.mark.parametrize("case", BAD_WRITES)
def test_bad_writes_are_one_sentence_and_leave_nothing(tmp_path: Path, case: str) -> None:
    change, message = BAD_WRITES[case]
    good = {
        "path": "x.mp4",
        "frames": moving_frames(2),
        "fps": 25,
        "audio": tone(1920),
        "sample_rate": RATE,
    }
    arguments = good | change
    with pytest.raises(ValueError, match=message) as caught:
        write_clip(tmp_path / arguments.pop("path"), **arguments)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_clip(tmp_path / "x.mp4", moving_frames(3), 25)
    before = (tmp_path / "x.mp4").read_bytes()

    def broken():
        yield from moving_frames(30)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_clip(tmp_path / "x.mp4", broken(), 25)
    assert (tmp_path / "x.mp4").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).integers(0, 256, (10, 128, 128, 3), dtype=np.uint8)
    try:
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (4096, hard)
        )  # the kernel refuses writes beyond it, as a full disk does
        with pytest.raises(MediaError, match="cannot be written") as caught:
            write_clip(tmp_path / "x.mp4", noise, 25)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_reads_are_one_sentence(tmp_path: Path) -> None:
    write_clip(tmp_path / "good.mp4", moving_frames(100), 25, tone(96000), RATE)
    whole = (tmp_path / "good.mp4").read_bytes()
    (tmp_path / "text.mp4").write_text("this is no film")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    (tmp_path / "head.mp4").write_bytes(whole[:40])
    for name, message in {
        "none.mp4": "no such file",
        ".": "is a folder",
        "text.mp4": "cannot be read",
        "empty.mp4": "cannot",
        "head.mp4": "cannot be read|holds neither",
        "cut.mp4": "cut short|cannot be read",
    }.items():
        with pytest.raises(MediaError, match=message) as caught:
            read_clip(tmp_path / name)
        assert "\n" not in str(caught.value)
    for arguments in (
        {"fps": 0},
        {"size": 0},
        {"max_seconds": -1},
        {"max_seconds": float("nan")},
        {"sample_rate": 7},
    ):
        with pytest.raises(ValueError, match=f"^{next(iter(arguments))}="):
            read_clip(tmp_path / "good.mp4", **arguments)


def test_damaged_files_never_surprise(tmp_path: Path) -> None:
    """Whatever bytes are hit: a clip, or one sentence; never another error."""
    write_clip(tmp_path / "good.mp4", moving_frames(12), 25, tone(11520), RATE)
    whole = np.frombuffer((tmp_path / "good.mp4").read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    refusals: list[str] = []
    for _ in range(60):
        hurt = whole.copy()
        start = int(rng.integers(0, len(hurt)))
        hurt[start : start + int(rng.integers(1, 40))] ^= rng.integers(1, 256, dtype=np.uint8)
        (tmp_path / "hurt.mp4").write_bytes(hurt.tobytes())
        for read in (read_clip, probe):
            try:
                read(tmp_path / "hurt.mp4")
            except MediaError as error:
                refusals.append(str(error))
    assert refusals
    assert not [text for text in refusals if "\n" in text]
