"""Uploads: looked at and rewritten by a process of its own, with limits on memory and time.

    python -m avdiff.serve.uploads ROLE FILE TARGET MAX_SIDE MAX_SECONDS

A picture comes out as PNG, sound as WAV and film as what it was, after its pictures were counted:
what a worker opens later was decoded once under these limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import shutil
import sys
from pathlib import Path

from avdiff.serve.errors import bad

MEMORY = 3 * 2**30  # bytes of address space
SECONDS = 30  # of computing
WAIT_SECONDS = 60.0  # of anything
PICTURES = ("image", "last_image", "mask")
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")
SUFFIXES = {"audio": ".wav", "video": ".mp4"}


def target_name(role: str) -> str:
    """Name of the file that a role's upload becomes."""
    return role + SUFFIXES.get(role, ".png")


async def accept_upload(
    role: str, field: str, data: Path, folder: Path, max_side: int, max_seconds: float
) -> None:
    """Look at an uploaded file and put what it becomes into a folder.

    Raises:
        ApiError: 400 where it cannot be read, or is larger or longer than is allowed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / target_name(role)
    command = ["-m", "avdiff.serve.uploads", role, str(data), str(target)]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        str(max_side),
        str(max_seconds),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        said, _ = await asyncio.wait_for(process.communicate(), WAIT_SECONDS)
    except TimeoutError as error:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise bad(field, f"{field}: takes too long to read") from error
    if process.returncode:
        sentence = said.decode("utf-8", "replace").strip().split("\n")[-1][:300]
        fallback = "cannot be read, or needs more memory than is allowed"
        raise bad(field, f"{field}: {sentence or fallback}")


def _limit() -> None:
    """Bounds of this process: a bomb ends it and nothing else."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def convert_picture(source: Path, target: Path) -> None:
    """Any still picture -> PNG, upright, RGB."""
    from PIL import Image, ImageOps

    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    with Image.open(source, formats=FORMATS) as picture:
        if picture.width * picture.height > MAX_PIXELS:
            raise ValueError(f"has {picture.width} x {picture.height} pixels, too many")
        ImageOps.exif_transpose(picture).convert("RGB").save(target)


def convert_sound(source: Path, target: Path, max_seconds: float) -> None:
    """Any sound -> WAV of at most `max_seconds`."""
    from avdiff.media.read import probe, read_clip
    from avdiff.media.write import write_wav

    seconds = probe(source).audio_seconds
    if seconds is not None and seconds > max_seconds:
        raise ValueError(f"lasts {float(seconds):.0f} s, needs at most {max_seconds:g}")
    clip = read_clip(source, max_seconds=max_seconds)
    if clip.audio is None or clip.sample_rate is None:
        raise ValueError("has no sound in it")
    write_wav(target, clip.audio, clip.sample_rate)


def check_film(source: Path, target: Path, max_side: int, max_seconds: float) -> None:
    """A film within the limits, copied as it is."""
    from avdiff.media.read import probe, read_clip

    found = probe(source)
    if not found.width or not found.height:
        raise ValueError("has no pictures in it")
    if max(found.width, found.height) > max_side:
        raise ValueError(
            f"is {found.width} x {found.height} pixels, needs at most {max_side} on a side"
        )
    if found.video_seconds is None or found.video_seconds > max_seconds:
        raise ValueError(f"is longer than {max_seconds:g} s")
    if read_clip(source, max_seconds=max_seconds).frames is None:
        raise ValueError("has no pictures in it")
    shutil.copyfile(source, target)


def main(words: list[str]) -> int:
    """Entry point of the process: prints one sentence and returns 1 where a file does not fit."""
    role, source, target, max_side, max_seconds = words
    _limit()
    try:
        if role in PICTURES:
            convert_picture(Path(source), Path(target))
        elif role == "audio":
            convert_sound(Path(source), Path(target), float(max_seconds))
        else:
            check_film(Path(source), Path(target), int(max_side), float(max_seconds))
    except MemoryError:
        print("needs more memory than is allowed")
        return 1
    except Exception as error:
        said = " ".join(str(error).split()).replace(source, "the file")
        print(f"cannot be used ({said or type(error).__name__})")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
