"""Still pictures from files: a list of formats, bounded in size, upright by their EXIF."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from avdiff.media.container import MAX_PIXELS, MediaError, reason
from avdiff.media.display import display_of_still

# Pillow's names. No format is read that starts an interpreter (EPS) or opens other files.
STILL_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "DIB", "AVIF", "GIF")
STILL_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif", ".gif", ".apng")
)
STILL_NAMES = "PNG, JPEG, WebP, TIFF, BMP, AVIF or GIF"


def read_still(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """A picture as it is shown, (H, W, 3) uint8; of an animation the first picture.

    Args:
        size: (height, width): cropped at the centre to that shape and scaled.

    Raises:
        MediaError: no such file, none of the formats, damaged, or larger than `MAX_PIXELS`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's about size: the bound here is lower
        try:
            with open_still(path) as image:
                image.load()  # before its EXIF, whose parser is forgiven anything
                display = display_of_still(image)
                return display.show(np.array(_as_rgb(image)), size)
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
            if isinstance(error, MediaError):
                raise
            raise MediaError(
                f"path={path}: cannot be read as a picture ({reason(error)})"
            ) from error


def open_still(path: str | Path) -> Image.Image:
    """Open a picture file without decoding it; close it after use.

    Raises:
        MediaError: no such file, none of the formats, or larger than `MAX_PIXELS`.
    """
    file = Path(path)
    if "\0" in str(path):
        raise MediaError(f"path={str(path)!r}: holds a NUL character")
    if file.is_dir():
        raise MediaError(f"path={path}: is a folder, needs a picture")
    if not file.is_file():
        raise MediaError(f"path={path}: no such file")
    try:
        image = Image.open(file, formats=STILL_FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise MediaError(f"path={path}: cannot be read as {STILL_NAMES}") from error
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise MediaError(
            f"path={path}: is {image.width} x {image.height}; needs at most {MAX_PIXELS} pixels"
        )
    return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Eight bits a channel, without transparency."""
    if image.mode.startswith("I"):  # 16 bits of gray; Pillow would clip them to white
        gray = np.asarray(image).astype(np.float64)
        scale = 257.0 if gray.max(initial=0) > 255 else 1.0
        return Image.fromarray(np.clip(gray / scale, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def still_size(path: str | Path) -> tuple[int, int]:
    """(height, width) of a picture as it is shown, from its header.

    Raises:
        MediaError: as `open_still`.
    """
    with open_still(path) as image:
        if image.format == "TIFF":  # Pillow turns it itself and says so beforehand
            return image.height, image.width
        return display_of_still(image).size(image.height, image.width)
