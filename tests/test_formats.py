"""What `write_clip` writes by suffix comes back; pictures for imageio and diffusers' users."""

from __future__ import annotations

from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from bad_clips import RATE, pictures, tone
from PIL import Image
from tiny import tiny_pipeline

from avdiff.media.container import MediaError
from avdiff.media.read import read_clip
from avdiff.media.write import write_clip

FACTS = {"seed": 3, "prompt": "ü"}


@pytest.mark.parametrize(("suffix", "error"), [("mkv", 1e-4), ("webm", 0.1)])
def test_films_with_sound(tmp_path: Path, suffix: str, error: float) -> None:
    frames, sound = pictures(), tone()
    path = tmp_path / f"a.{suffix}"
    write_clip(path, frames, 25, sound, RATE, FACTS)
    clip = read_clip(path, sample_rate=RATE)
    assert clip.fps == 25 and clip.frames.shape == frames.shape
    assert np.abs(clip.frames.astype(int) - frames).mean() < 8
    assert abs(clip.audio.shape[1] - sound.shape[1]) <= RATE // 50
    middle = slice(2000, 26000)
    assert np.abs(clip.audio[:, middle] - sound[:, middle]).max() < error  # in sync
    assert clip.metadata["seed"] == 3 and clip.metadata["prompt"] == "ü"
    write_clip(path, None, None, sound, RATE)
    assert read_clip(path).frames is None


@pytest.mark.parametrize("suffix", ["gif", "webp", "apng"])
def test_animations(tmp_path: Path, suffix: str) -> None:
    frames = pictures(0.8)
    path = tmp_path / f"a.{suffix}"
    write_clip(path, frames, 25, tone(0.8), RATE, FACTS)
    with Image.open(path) as image:
        assert image.n_frames == len(frames) and image.info.get("loop", 0) == 0
        told = str(image.info.get("comment")) + str(dict(image.getexif()))
    assert "AI-generated" in told
    clip = read_clip(path)
    assert clip.frames.shape == frames.shape and clip.audio is None
    assert float(clip.fps) == pytest.approx(25, abs=0.5)
    assert np.abs(clip.frames.astype(int) - frames).mean() < 8
    assert read_clip(path, max_seconds=0.2, size=32).frames.shape == (5, 32, 32, 3)


def test_rates_that_no_animation_has_do_not_drift(tmp_path: Path) -> None:
    """At 30 frames a second a GIF's hundredths are 3, 4, 3..., not 3 throughout."""
    write_clip(tmp_path / "a.gif", pictures(2.0, 30), 30)
    total = 0
    with Image.open(tmp_path / "a.gif") as image:
        for index in range(image.n_frames):
            image.seek(index)
            total += image.info["duration"]
    assert total == 2000


def test_sequences_of_pictures(tmp_path: Path) -> None:
    frames = pictures(0.48, size=(48, 65))
    write_clip(tmp_path / "f%03d.png", frames, 25)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"f{index:03d}.png" for index in range(12)]
    clip = read_clip(tmp_path)
    assert np.array_equal(clip.frames, frames) and clip.fps == 25  # odd sizes stay
    assert np.array_equal(read_clip(tmp_path, max_seconds=0.2).frames, frames[:5])
    (tmp_path / "one").mkdir()
    write_clip(tmp_path / "one" / "x.png", frames[:1], 25)
    write_clip(tmp_path / "one" / "y.png", frames[:2], 25, metadata=FACTS)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["x.png", "y-00000.png", "y-00001.png"]
    with Image.open(tmp_path / "one" / "y-00001.png") as image:
        assert image.info["comment"].startswith("AI-generated")


def test_a_broken_sequence_or_animation_leaves_nothing(tmp_path: Path) -> None:
    def broken():
        yield from pictures(0.2)
        yield np.zeros((8, 8, 3), np.uint8)

    for name in ("a.gif", "a.webp", "a.png", "a.apng"):
        with pytest.raises(MediaError, match="differs in size"):
            write_clip(tmp_path / name, broken(), 25)
        with pytest.raises(MediaError, match="at least one picture"):
            write_clip(tmp_path / name, [], 25)
        with pytest.raises(MediaError, match="ends in"):
            write_clip(tmp_path / name, None, None, tone(), RATE)
    with pytest.raises(MediaError, match="Opus needs one of"):
        write_clip(tmp_path / "a.webm", pictures(0.2), 25, tone(), 44100)
    assert not list(tmp_path.iterdir())


def test_tensors_as_pipelines_return_them(tmp_path: Path) -> None:
    frames, sound = pictures(0.4), tone(0.4)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255  # (F, 3, H, W)
    heard = torch.from_numpy(sound)
    kinds = {
        "pt": (video, heard),
        "batch": (video[None], heard[None]),
        "list": (list(video), heard[0]),
        "last": (video.permute(0, 2, 3, 1), heard),
    }
    for name, (pictures_given, sound_given) in kinds.items():
        write_clip(tmp_path / f"{name}.mp4", pictures_given, 25, sound_given, RATE)
    assert len({(tmp_path / f"{name}.mp4").read_bytes() for name in kinds}) == 1
    write_clip(tmp_path / "half.mp4", video.bfloat16(), 25, heard.bfloat16(), RATE)
    with pytest.raises(MediaError, match="picture 0 has shape"):
        write_clip(tmp_path / "x.mp4", video[:, :1], 25)


def test_output_of_the_pipeline_fits_imageio_and_diffusers(tmp_path: Path) -> None:
    from diffusers.utils import export_to_gif, export_to_video

    pipe = tiny_pipeline()
    options = dict(num_inference_steps=1, seconds=0.2, height=64, width=64)
    arrays = pipe("a bird", output_type="np", **options).frames[0]
    iio.imwrite(tmp_path / "a.gif", np.rint(255 * arrays).astype(np.uint8), is_batch=True)
    assert len(iio.imread(tmp_path / "a.gif", index=...)) == len(arrays)
    export_to_gif(pipe("a bird", output_type="pil", **options).frames[0], str(tmp_path / "b.gif"))
    with Image.open(tmp_path / "b.gif") as image:
        assert image.size == (64, 64)
    tensors = pipe("a bird", output_type="pt", **options)
    write_clip(tmp_path / "c.mp4", tensors.frames, 25, tensors.audio, tensors.sampling_rate)
    assert read_clip(tmp_path / "c.mp4").frames.shape[1:] == (64, 64, 3)
    export_to_video(list(arrays), str(tmp_path / "d.mp4"), fps=25)
    assert read_clip(tmp_path / "d.mp4").frames.shape[1:] == (64, 64, 3)
