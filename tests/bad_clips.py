"""A folder of clips as users have them: good ones of many kinds, and broken ones of many more."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from avdiff.media.write import write_clip

RATE = 24000
CAPTION = "A drum is hit three times with a loud sound"


def pictures(
    seconds: float = 1.2, fps: float = 25, size: tuple[int, int] = (64, 64), seed: int = 0
) -> np.ndarray:
    """A bright disc that moves over a gradient: (F, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    height, width = size
    y, x = np.mgrid[:height, :width]
    colour, path = rng.integers(60, 250, 3), rng.uniform(0.2, 0.8, 4)
    frames = []
    for i in range(max(1, round(seconds * fps))):
        t = i / max(1.0, seconds * fps)
        cx, cy = (
            (path[0] * (1 - t) + path[1] * t) * width,
            (path[2] * (1 - t) + path[3] * t) * height,
        )
        disc = ((x - cx) ** 2 + (y - cy) ** 2) < (0.18 * min(size)) ** 2
        back = np.stack(
            [x * 160 // width, y * 120 // height, np.full_like(x, 70 + 40 * (seed % 4))], -1
        )
        frames.append(np.where(disc[..., None], colour, back).astype(np.uint8))
    return np.stack(frames)


def tone(seconds: float = 1.2, channels: int = 1, level: float = 0.3, seed: int = 0) -> np.ndarray:
    """Wavering tone with a pitch of its own: (C, S) float32."""
    t = np.arange(round(seconds * RATE)) / RATE
    pitch = 180 + 37 * (seed % 11)
    wave = (
        level
        * np.sin(2 * np.pi * pitch * t)
        * (0.6 + 0.4 * np.sin(2 * np.pi * (2 + seed % 3) * t + seed))
    )
    return np.repeat(wave[None].astype(np.float32), channels, axis=0)


def mux(
    path: Path,
    frames: np.ndarray | None,
    times: list[Fraction] | None,
    sound: np.ndarray | None,
    layout: str = "mono",
    late: float = 0.0,
    rotate: int = 0,
    codec: str = "aac",
) -> None:
    """Write with PyAV directly: any picture times, any layout, sound that starts late, a rotation
    tag.
    """
    with av.open(str(path), "w") as out:
        streams = []
        if frames is not None:
            video = out.add_stream("libx264", rate=25, options={"bf": "0"})
            video.height, video.width = frames.shape[1:3]
            video.pix_fmt, video.codec_context.time_base = "yuv420p", Fraction(1, 1000)
            if rotate:
                video.set_display_rotation(rotate)
            streams.append(video)
        if sound is not None:
            audio = out.add_stream(codec, rate=RATE, layout=layout)
            streams.append(audio)
        if frames is not None and times is not None:
            for picture, time in zip(frames, times, strict=True):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = round(time * 1000), Fraction(1, 1000)
                out.mux(video.encode(frame))
            out.mux(video.encode(None))
        if sound is not None:
            block = 1024
            for start in range(0, sound.shape[1], block):
                part = np.ascontiguousarray(sound[:, start : start + block])
                frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
                frame.pts = start + round(late * RATE)
                out.mux(audio.encode(frame))
            out.mux(audio.encode(None))


def steady(count: int, fps: int = 25) -> list[Fraction]:
    """Times of evenly spaced pictures."""
    return [Fraction(i, fps) for i in range(count)]


def make_folder(root: Path) -> tuple[set[str], set[str]]:
    """Write the folder -> names that must be used, names that must be refused."""
    root.mkdir(parents=True, exist_ok=True)
    good: set[str] = set()
    bad: set[str] = set()

    def clip(name: str, is_good: bool, caption: str | bytes | None = CAPTION) -> Path:
        (good if is_good else bad).add(name)
        path = root / name
        if isinstance(caption, bytes):
            path.with_suffix(".txt").write_bytes(caption)
        elif caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf8")
        return path

    def plain(
        name: str, is_good: bool, seed: int, caption: str | bytes | None = CAPTION, **options
    ) -> Path:
        path = clip(name, is_good, caption)
        frames = pictures(
            options.pop("seconds", 1.2), options.get("fps", 25), options.pop("size", (64, 64)), seed
        )
        sound = options.pop("sound", tone(seed=seed))
        write_clip(path, frames, options.get("fps", 25), sound, RATE)
        return path

    _good_kinds(clip, plain)
    _bad_kinds(root, clip, plain, bad)
    return good, bad


def _good_kinds(clip, plain) -> None:
    """Odd but usable."""
    first = plain("plain.mp4", True, 1)
    plain("quicktime.mov", True, 2)
    plain("stereo.mp4", True, 3, sound=tone(channels=2, seed=3))
    plain("film_rate.mp4", True, 4, fps=Fraction(24000, 1001))
    plain("ntsc.mp4", True, 5, fps=Fraction(30000, 1001))
    plain("fast.mp4", True, 6, fps=60)
    plain("odd_size.mp4", True, 7, size=(47, 65))
    plain("sound_longer.mp4", True, 8, sound=tone(2.0, seed=8))
    plain("sound_shorter.mp4", True, 9, sound=tone(0.7, seed=9))
    plain("clipped.mp4", True, 10, sound=np.clip(tone(level=9.0, seed=10), -1, 1))
    plain("no_sound_words.mp4", True, 11, caption="A red disc on a wall")
    plain("two_captions.mp4", True, 12, caption="A drum is hit\n\nSomeone hits a drum\n")
    clip("copy.mp4", True).write_bytes(first.read_bytes())
    mux(
        clip("variable_rate.mkv", True),
        pictures(seed=13),
        sorted({Fraction(i * i, 750) for i in range(30)}),
        tone(seed=13),
    )
    mux(clip("late_sound.mp4", True), pictures(seed=14), steady(30), tone(0.9, seed=14), late=0.3)
    mux(
        clip("surround.mp4", True),
        pictures(seed=15),
        steady(30),
        tone(channels=6, seed=15),
        layout="5.1",
    )
    mux(
        clip("rotated.mp4", True),
        pictures(size=(48, 64), seed=16),
        steady(30),
        tone(seed=16),
        rotate=90,
    )
    write_clip(
        plain("separate_sound.mp4", True, 17, sound=None).with_suffix(".wav"),
        None,
        None,
        tone(seed=18),
        RATE,
    )
    write_clip(clip("sound_alone.wav", True), None, None, tone(seed=19), RATE)


def _bad_kinds(root: Path, clip, plain, bad: set[str]) -> None:
    """Not usable, each for a reason of its own."""
    plain("no_sound.mp4", False, 21, sound=None)
    plain("silent.mp4", False, 22, sound=np.zeros((1, RATE), np.float32))
    plain("nearly_silent.mp4", False, 23, sound=tone(level=0.0004, seed=23))
    plain("mostly_missing_sound.mp4", False, 24, sound=tone(0.08, seed=24))
    plain("not_utf8.mp4", False, 25, caption="Ein Hund sagt \xfc".encode("latin-1"))
    plain("empty_caption.mp4", False, 26, caption=" \n")
    plain("no_caption.mp4", False, 27, caption=None)
    plain("too_short.mp4", False, 28, seconds=0.2, sound=tone(0.2, seed=28))
    whole = plain("cut_short.mkv.mp4", False, 29, seconds=3.0, sound=tone(3.0, seed=29))
    whole.write_bytes(_without_the_end(whole))
    half = plain("half_a_file.mp4", False, 30)
    half.write_bytes(half.read_bytes()[: half.stat().st_size // 2])
    clip("zero_length.mp4", False).write_bytes(b"")
    clip("text_as_video.mp4", False).write_text("this is no video\n" * 50)
    Image.new("RGB", (64, 64), (200, 30, 30)).save(
        clip("picture_as_video.mp4", False), format="JPEG"
    )
    plain("wrong_suffix.mp4", False, 31).rename(root / "wrong_suffix.dat")
    bad.remove("wrong_suffix.mp4")
    bad.update(("wrong_suffix.dat", "wrong_suffix.txt", "lonely.txt", "twice.mov"))
    (root / "lonely.txt").write_text("a caption that nobody needs")
    plain("twice.mp4", False, 32).with_suffix(".mov").write_bytes((root / "plain.mp4").read_bytes())
    (root / "a_folder.mp4").mkdir()
    mux(clip("one_picture.mp4", False), pictures(0.04, seed=33), steady(1), tone(seed=33))
    write_clip(
        clip("flat.mp4", False), np.full((30, 64, 64, 3), 90, np.uint8), 25, tone(seed=34), RATE
    )
    mux(clip("cover_only.mp4", False), None, None, tone(seed=35))
    (root / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    clip("noise.mp4", False)


def _without_the_end(path: Path) -> bytes:
    """An mp4 whose index comes first, cut in the middle of its data: it opens, and decodes up to
    the cut.
    """
    from av.container import open as reopen

    fast = path.with_name("fast_start.tmp.mp4")
    with (
        reopen(str(path)) as source,
        reopen(str(fast), "w", options={"movflags": "faststart"}) as out,
    ):
        streams = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None:
                packet.stream = streams[packet.stream_index]
                out.mux(packet)
    data = fast.read_bytes()
    fast.unlink()
    return data[: len(data) * 6 // 10]
