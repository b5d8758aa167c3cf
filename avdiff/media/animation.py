"""Animations (GIF, WebP, APNG) and sequences of pictures, through imageio and Pillow.

They hold no sound. Times are kept exactly in the mean: the duration of each picture is rounded so
that the sum never drifts.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from PIL import Image, PngImagePlugin

from avdiff.media.container import LONGEST_CLIP, LONGEST_GAP, MAX_BYTES, MediaError, reason
from avdiff.media.display import display_of_still
from avdiff.media.sound import too_long
from avdiff.media.stills import STILL_SUFFIXES, open_still, read_still

ANIMATIONS = (".gif", ".webp", ".apng")
SEQUENCES = (".png",)
GIF_STEP = 10  # milliseconds; the unit of its durations
DEFAULT_MS = 100  # of a picture without a duration, as browsers do
SEQUENCE_FPS = Fraction(25)  # of a folder of pictures unless another is asked for
NUMBER = re.compile(r"%0?(\d*)d")
IMAGE_DESCRIPTION = 0x010E  # EXIF


def write_animation(
    path: Path, pictures: Iterable[np.ndarray], fps: Fraction, comment: str | None
) -> None:
    """Write pictures (H, W, 3) uint8 as an animation that repeats for ever.

    Raises:
        MediaError: more pictures than memory should hold. OSError: it cannot be written.
    """
    frames: list[np.ndarray] = []
    for picture in pictures:
        frames.append(picture)
        if len(frames) * picture.nbytes > MAX_BYTES:
            raise MediaError(
                f"path={path}: an animation of {len(frames)} pictures is too much for memory; "
                "needs .mp4, .mkv or .webm"
            )
    step = GIF_STEP if path.suffix.lower() == ".gif" else 1
    ends = [round(index * 1000 / fps / step) * step for index in range(len(frames) + 1)]
    durations = np.maximum(np.diff(ends), step).tolist()
    options: dict[str, Any] = {"duration": durations, "loop": 0}
    suffix = path.suffix.lower()
    if suffix == ".webp":
        options |= {"quality": 90, "method": 4}
    if comment is not None and suffix == ".gif":
        options["comment"] = comment.encode("utf-8", "replace")
    elif comment is not None and suffix == ".apng":
        options["pnginfo"] = _png_comment(comment)
    elif comment is not None:
        exif = Image.Exif()
        exif[IMAGE_DESCRIPTION] = comment
        options["exif"] = exif.tobytes()
    iio.imwrite(path, frames, plugin="pillow", extension=suffix, is_batch=True, **options)


def write_sequence(path: Path, pictures: Iterable[np.ndarray], comment: str | None) -> None:
    """Write each picture (H, W, 3) uint8 as a file of its own: `name-%05d.png` takes numbers where
    the pattern says; a name without one gets them at its end, if there is more than one picture.

    All files appear when all are complete.

    Raises:
        OSError: they cannot be written.
    """
    temporary = path.with_name(f".{path.stem[:64]}.{os.getpid()}.partial")
    temporary.mkdir()
    try:
        count = 0
        for picture in pictures:
            name = temporary / f"{count}.png"
            tags = None if comment is None else _png_comment(comment)
            iio.imwrite(name, picture, plugin="pillow", pnginfo=tags)
            count += 1
        for index in range(count):
            os.replace(temporary / f"{index}.png", _numbered(path, index, count))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _numbered(path: Path, index: int, count: int) -> Path:
    """The name of a picture of a sequence."""
    if NUMBER.search(path.name):
        name = NUMBER.sub(lambda found: f"{index:0{int(found[1] or 1)}d}", path.name)
        return path.with_name(name)
    return path if count == 1 else path.with_name(f"{path.stem}-{index:05d}{path.suffix}")


def _png_comment(comment: str) -> PngImagePlugin.PngInfo:
    tags = PngImagePlugin.PngInfo()
    tags.add_itxt("comment", comment)
    return tags


def is_sequence(path: Path) -> bool:
    """Whether a path is read here: an animation that FFmpeg does not decode, or a folder of
    pictures.
    """
    if path.is_dir():
        return any(_pictures_of_folder(path))
    return path.suffix.lower() in (".webp", ".avif") and path.is_file()


def read_sequence(
    path: Path,
    fps: Fraction | None,
    size: tuple[int, int] | None,
    limit: Fraction | None,
) -> tuple[np.ndarray, Fraction]:
    """Pictures (F, H, W, 3) uint8 on a steady clock and its rate; see `read_clip`.

    The files of a folder are taken in the order of the numbers in their names, one a frame.

    Raises:
        MediaError: not readable, of different sizes, or more than memory should hold.
    """
    if path.is_dir():
        rate = fps or SEQUENCE_FPS
        files = list(_pictures_of_folder(path))
        wanted = len(files) if limit is None else max(1, min(len(files), round(limit * rate)))
        return _stack(path, (read_still(file, size) for file in files[:wanted])), rate
    try:
        return _read_animation(path, fps, size, limit)
    except (OSError, SyntaxError, EOFError) as error:
        raise MediaError(f"path={path}: cannot be read as a picture ({reason(error)})") from error


def _read_animation(
    path: Path, fps: Fraction | None, size: tuple[int, int] | None, limit: Fraction | None
) -> tuple[np.ndarray, Fraction]:
    ends: list[Fraction] = []  # seconds at which each picture leaves the screen
    shown: list[np.ndarray] = []
    now = Fraction(0)
    with open_still(path) as image:  # its format is on the list, its size within bounds
        display = display_of_still(image)
    with iio.imopen(path, "r", plugin="pillow") as file:
        for index, picture in enumerate(file.iter(mode="RGB")):
            tags = file.metadata(index=index, exclude_applied=False)
            length = Fraction(int(tags.get("duration") or DEFAULT_MS), 1000)
            if length > LONGEST_GAP:
                raise MediaError(f"path={path}: a picture stands for {float(length):.0f} s")
            now += length
            if limit is None and now > LONGEST_CLIP:
                raise MediaError(too_long(path, None))
            ends.append(now)
            shown.append(display.show(np.asarray(picture), size))
            if len(shown) * shown[0].nbytes > MAX_BYTES:
                raise MediaError(f"path={path}: its pictures are too many for memory")
            if limit is not None and now >= limit:
                break
    rate = fps or 1 / (now / len(ends))
    until = now if limit is None else min(now, limit)
    count = max(1, round(until * rate))
    moments = [min((index + Fraction(1, 2)) / rate, now) for index in range(count)]
    chosen = np.searchsorted([float(end) for end in ends[:-1]], [float(m) for m in moments])
    return _stack(path, (shown[int(index)] for index in chosen)), rate


def _stack(path: Path, pictures: Iterator[np.ndarray]) -> np.ndarray:
    """(F, H, W, 3), within the bound of memory."""
    kept: list[np.ndarray] = []
    for picture in pictures:
        if kept and picture.shape != kept[0].shape:
            raise MediaError(f"path={path}: its pictures differ in size; give a size")
        kept.append(picture)
        if len(kept) * picture.nbytes * 2 > MAX_BYTES:
            raise MediaError(f"path={path}: its pictures are too many for memory; give max_seconds")
    return np.stack(kept)


def _pictures_of_folder(folder: Path) -> list[Path]:
    """Picture files of a folder, 2 before 10."""
    files = [path for path in folder.iterdir() if path.suffix.lower() in STILL_SUFFIXES]
    visible = [path for path in files if path.is_file() and not path.name.startswith(".")]
    return sorted(visible, key=lambda path: (_natural(path.name), path.name))


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]
