"""Files are taken as players show and play them: turned, with their pixel shape, their sound track
and their real length.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from bad_clips import CAPTION, RATE, mux, pictures, steady, tone
from PIL import Image

from avdiff.data.check import check_folder
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.media.color import BT2020, HLG, PQ, to_sdr
from avdiff.media.container import MediaError
from avdiff.media.display import Display, display_of_still
from avdiff.media.frames import read_sound, walk_pictures
from avdiff.media.probe import probe
from avdiff.media.read import read_clip
from avdiff.media.stills import read_still, still_size
from avdiff.media.write import write_clip

BUCKETS = ClipOptions(buckets="128x64x25;64x128x25;64x64x25", words=False)


def encode(path: Path, parts, options: dict[str, str] | None = None, form: str | None = None):
    """Write one stream a part: (codec, frames, setup of the stream)."""
    with av.open(str(path), "w", format=form, options=options or {}) as out:
        streams = []
        for codec, frames, setup in parts:
            stream = out.add_stream(codec, **setup.pop("stream", {}))
            for name, value in setup.items():
                setattr(stream, name, value)
            streams.append((stream, frames))
        for stream, frames in streams:
            for frame in frames:
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))


def sound_frames(samples: np.ndarray, form: str = "fltp", rate: int = RATE):
    for start in range(0, samples.shape[1], 1024):
        part = np.ascontiguousarray(samples[:, start : start + 1024])
        layout = "mono" if len(part) == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(part, format=form, layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
        yield frame


def picture_frames(frames: np.ndarray, form: str = "rgb24", fps: int = 25):
    for number, picture in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(picture, format=form)
        frame.pts, frame.time_base = number, Fraction(1, fps)
        yield frame


def test_an_upright_phone_clip_goes_into_the_upright_bucket(tmp_path: Path) -> None:
    mux(tmp_path / "a.mp4", pictures(size=(64, 128)), steady(30), tone(), rotate=90)
    (tmp_path / "a.txt").write_text(CAPTION)
    info = probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == (128, 64)
    assert (RealClips(tmp_path, BUCKETS).clip(0).width, check_folder(tmp_path).clips[0].height) == (
        64,
        128,
    )
    assert next(walk_pictures(tmp_path / "a.mp4"))[1].shape == (128, 64, 3)


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path) -> None:
    """64 x 64 pixels twice as wide as high: a square of 16 x 32 of them is shown square."""
    frames = np.zeros((30, 64, 64, 3), np.uint8)
    frames[:, 16:48, 24:40] = 255
    path = tmp_path / "a.mp4"
    shape = {"width": 64, "height": 64, "pix_fmt": "yuv420p", "sample_aspect_ratio": Fraction(2)}
    encode(path, [("libx264", picture_frames(frames), {"stream": {"rate": 25}, **shape})])
    (tmp_path / "a.txt").write_text(CAPTION)
    assert (probe(path).height, probe(path).width) == (64, 128)
    clips = RealClips(tmp_path, ClipOptions(**{**vars(BUCKETS), "allow_silent": True}))
    assert (clips.clip(0).width, clips.clip(0).height) == (128, 64)
    for picture in (
        clips[0]["video"][9].numpy(),
        read_clip(path).frames[9],
        next(walk_pictures(path))[1],
    ):
        rows, columns = np.where(picture.mean(-1) > 128)
        assert picture.shape[:2] == (64, 128)
        assert abs(np.ptp(rows) - np.ptp(columns)) <= 1
    small = read_clip(path, size=(32, 32)).frames[9]
    rows, columns = np.where(small.mean(-1) > 128)
    assert (np.ptp(rows), np.ptp(columns)) == (15, 15)


def test_eight_orientations_of_stills(tmp_path: Path) -> None:
    """Pillow's own turning is the reference."""
    picture = np.random.default_rng(0).integers(0, 255, (5, 7, 3), dtype=np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
        with Image.open(tmp_path / "a.png") as image:
            from PIL import ImageOps

            expected = np.asarray(ImageOps.exif_transpose(image))
            display = display_of_still(image)
        assert np.array_equal(display.show(picture), expected)
        assert display.size(5, 7) == expected.shape[:2]


def test_a_display_without_turns_changes_nothing() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    assert np.array_equal(Display().show(picture), picture)


@pytest.mark.parametrize(("suffix", "form"), [("mp3", "mp3"), ("aac", "adts"), ("ts", "mpegts")])
def test_length_is_what_is_decoded_where_headers_guess(
    tmp_path: Path, suffix: str, form: str
) -> None:
    """Quiet, then noise: a guess from the bit rate at the start is far off, either way."""
    rng = np.random.default_rng(0)
    for loud_first in (False, True):
        noise = rng.uniform(-0.5, 0.5, (1, 3 * RATE)).astype(np.float32)
        quiet = tone(3.0, level=0.0005)
        parts = [noise, quiet] if loud_first else [quiet, noise]
        sound = np.concatenate(parts, axis=1)
        path = tmp_path / f"a.{suffix}"
        codec = "libmp3lame" if suffix == "mp3" else "aac"
        options = {"write_xing": "0"} if suffix == "mp3" else {}
        quality = {"flags": "+qscale", "global_quality": "236"}
        stream = {"rate": RATE, "layout": "mono", "options": quality}
        encode(path, [(codec, sound_frames(sound), {"stream": stream})], options, form)
        found = read_clip(path).audio
        assert found.shape[1] / RATE == pytest.approx(6.0, abs=0.15)
        assert float(probe(path).audio_seconds) == pytest.approx(6.0, abs=0.15)


def two_tracks(path: Path) -> None:
    stream = {"stream": {"rate": RATE, "layout": "mono"}}
    film = {"stream": {"rate": 25}, "width": 64, "height": 64, "pix_fmt": "yuv420p"}
    first, second = (tone(1.2, seed=seed) for seed in (0, 5))
    encode(
        path,
        [
            ("libx264", picture_frames(pictures()), film),
            ("aac", sound_frames(first), {**stream, "disposition": av.stream.Disposition(0)}),
            (
                "aac",
                sound_frames(second),
                {"stream": {**stream["stream"]}, "disposition": av.stream.Disposition.default},
            ),
        ],
    )


def pitch(sound: np.ndarray) -> float:
    line = sound[:RATE]
    return float(np.abs(np.fft.rfft(line)).argmax() * RATE / len(line))


def test_the_default_sound_track_is_taken_and_others_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    two_tracks(path)
    clip = read_clip(path)
    assert pitch(clip.audio[0]) == pytest.approx(180 + 37 * 5, abs=3)
    assert pitch(read_sound(path)[0]) == pytest.approx(180 + 37 * 5, abs=3)
    assert pitch(read_clip(path, audio_track=1).audio[0]) == pytest.approx(180, abs=3)
    assert any("2 sound tracks; number 2" in note for note in clip.notes)
    assert probe(path).audio_tracks == 2 and probe(path).notes == clip.notes
    with pytest.raises(MediaError, match="audio_track=3"):
        read_clip(path, audio_track=3)
    (tmp_path / "a.txt").write_text(CAPTION)
    one = RealClips(tmp_path, ClipOptions(buckets="64x64x25", words=False, audio_track=1))
    assert pitch(one[0]["audio"][0].numpy()) == pytest.approx(180, abs=3)


def test_channels_that_cancel_are_no_silence(tmp_path: Path) -> None:
    sound = tone(channels=2)
    sound[1] *= -1
    write_clip(tmp_path / "a.mp4", pictures(), 25, sound, RATE)
    (tmp_path / "a.txt").write_text(CAPTION)
    report = check_folder(tmp_path).clips[0]
    assert "cancel each other" in report.problems[0] and "silent" not in str(report)
    options = {"buckets": "64x64x25", "words": False}
    with pytest.raises(MediaError, match="cancel each other"):
        RealClips(tmp_path, ClipOptions(**options))[0]
    assert check_folder(tmp_path, audio_channel=2).clips[0].good
    heard = RealClips(tmp_path, ClipOptions(**options, audio_channel=2))[0]["audio"].numpy()
    assert np.corrcoef(heard[0][2000:20000], sound[1, 2000:20000])[0, 1] > 0.99
    assert np.abs(read_sound(tmp_path / "a.mp4")[0]).max() > 0.1
    with pytest.raises(MediaError, match="audio_channel=3"):
        read_clip(tmp_path / "a.mp4", audio_channel=3)


def pq(light: np.ndarray) -> np.ndarray:
    """cd/m2 -> SMPTE ST 2084 code, equation 4.1."""
    power = (light / 10_000) ** (2610 / 16384)
    return ((107 / 128 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32)


TO_BT2020 = np.array(  # ITU-R BT.2087
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
)


def linear(color: np.ndarray) -> np.ndarray:
    coded = color / 255
    return np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("color", [(200, 50, 20), (30, 180, 90), (128, 128, 128), (0, 0, 0)])
def test_high_dynamic_range_comes_back_as_it_was(color: tuple[int, int, int]) -> None:
    light = TO_BT2020 @ linear(np.array(color, float))
    code = np.rint(pq(203 * light) * 65535).astype(np.uint16)
    found = to_sdr(np.tile(code, (2, 2, 1)), PQ, BT2020)[0, 0]
    assert np.abs(found.astype(int) - color).max() <= 2
    wide = np.rint(255 * np.where(light > 0.0031308, 1.055 * light ** (1 / 2.4) - 0.055, 0))
    found = to_sdr(np.tile((wide * 257).astype(np.uint16), (2, 2, 1)), 1, BT2020)[0, 0]
    assert np.abs(found.astype(int) - color).max() <= 5
    assert to_sdr(np.full((1, 1, 3), 65535, np.uint16), PQ, BT2020).min() == 255


def test_hybrid_log_gamma_puts_white_at_three_quarters() -> None:
    """ITU-R BT.2408: 75 % is diffuse white, 203 cd/m2 of 1,000."""
    white = to_sdr(np.full((1, 1, 3), round(0.75 * 65535), np.uint16), HLG, BT2020)
    grey = to_sdr(np.full((1, 1, 3), round(0.38 * 65535), np.uint16), HLG, BT2020)
    assert 245 <= white.min() <= 255 and 95 < grey.min() < 140


def test_files_of_high_dynamic_range_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    light = 203 * TO_BT2020 @ linear(np.array([200, 50, 20], float))
    code = np.rint(pq(light) * 65535).astype(np.uint16)
    frames = np.tile(code[[1, 2, 0]][:, None, None], (5, 1, 64, 64))  # planes G, B, R

    def planar():
        for number, picture in enumerate(frames):
            frame = av.VideoFrame(64, 64, "gbrp16le")
            for plane, values in zip(frame.planes, picture, strict=True):
                plane.update(np.ascontiguousarray(values).tobytes())
            frame.pts, frame.time_base = number, Fraction(1, 25)
            frame.color_trc, frame.color_primaries = PQ, BT2020
            yield frame

    film = {"stream": {"rate": 25}, "width": 64, "height": 64, "pix_fmt": "gbrp16le"}
    film |= {"color_trc": PQ, "color_primaries": BT2020}
    encode(path, [("ffv1", planar(), film)])
    clip = read_clip(path)
    assert any("HDR (PQ)" in note for note in clip.notes) and clip.notes == probe(path).notes
    assert np.abs(clip.frames[2, 30, 30].astype(int) - (200, 50, 20)).max() <= 3
    picture = next(walk_pictures(path))[1]
    assert np.abs(picture[30, 30].astype(int) - (200, 50, 20)).max() <= 3


def test_interlaced_files_are_told(tmp_path: Path) -> None:
    film = {"stream": {"rate": 25, "options": {"x264-params": "tff=1:log-level=0"}}}
    film |= {"width": 64, "height": 64, "pix_fmt": "yuv420p"}
    encode(tmp_path / "a.mp4", [("libx264", picture_frames(pictures()), film)])
    assert any("interlaced" in note for note in read_clip(tmp_path / "a.mp4").notes)
    write_clip(tmp_path / "b.mp4", pictures(), 25)
    assert read_clip(tmp_path / "b.mp4").notes == ()


def test_stills_are_read_upright_and_from_a_list_of_formats(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "tiff", "bmp", "avif", "gif"):
        exif = Image.Exif()  # writing AVIF takes the orientation out of it
        exif[0x0112] = 6
        options = {} if suffix in ("bmp", "gif") else {"exif": exif}
        Image.fromarray(picture).save(tmp_path / f"a.{suffix}", **options)
        found = read_still(tmp_path / f"a.{suffix}")
        assert found.shape == ((60, 40, 3) if options else (40, 60, 3)), suffix
        assert still_size(tmp_path / f"a.{suffix}") == found.shape[:2]
    assert np.array_equal(read_still(tmp_path / "a.png"), np.rot90(picture, -1))
    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert np.abs(read_still(tmp_path / "deep.png").astype(int) - 127).max() <= 1
    (tmp_path / "eps.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n{} loop\n"
    )
    with pytest.raises(MediaError, match="cannot be read as PNG, JPEG"):
        read_still(tmp_path / "eps.png")


def test_masks_of_a_table_are_upright(tmp_path: Path) -> None:
    write_clip(tmp_path / "a.mp4", pictures(), 25, tone(), RATE)
    mask = np.zeros((64, 64), np.uint8)
    mask[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(mask).save(tmp_path / "mask.png", exif=exif)
    row = {"file_name": "a.mp4", "caption": CAPTION, "video_mask": "mask.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    found = RealClips(tmp_path, ClipOptions(buckets="64x64x25", words=False))[0]["video_mask"]
    assert found[0, 48:].all() and not found[0, :48].any()
