"""How stored pixels are shown: turned or mirrored, and with pixels that need not be square.

This is the one place that knows. Buckets, facts of a file, the data check, cropping and faces all
go through it, for films (display matrix, sample aspect ratio) and stills (EXIF).
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageOps

NEARLY_SQUARE = Fraction(1, 200)  # pixel shapes that differ less from 1 are rounding of headers
MOST_ASPECT = 8  # a pixel shape beyond it is a damaged header
EXIF_ORIENTATION = 0x0112
# EXIF orientation -> transpose, then flip rows, then flip columns (TIFF 6.0, tag 274)
EXIF_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


@dataclass(frozen=True)
class Display:
    """From stored pictures to shown ones.

    Args:
        transpose, flip_rows, flip_columns: done in this order.
        pixel_aspect: width of a stored pixel over its height.
    """

    transpose: bool = False
    flip_rows: bool = False
    flip_columns: bool = False
    pixel_aspect: Fraction = Fraction(1)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Stored (height, width) -> shown (height, width): the shorter side of a pixel is
        stretched, so that no detail is lost.
        """
        if self.pixel_aspect > 1:
            width = round(width * self.pixel_aspect)
        elif self.pixel_aspect < 1:
            height = round(height / self.pixel_aspect)
        return (width, height) if self.transpose else (height, width)

    def turn(self, picture: np.ndarray) -> np.ndarray:
        """(H, W, ...) upright; pixels keep their shape."""
        if self.transpose:
            picture = np.swapaxes(picture, 0, 1)
        if self.flip_rows:
            picture = picture[::-1]
        if self.flip_columns:
            picture = picture[:, ::-1]
        return picture

    def show(self, picture: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
        """(H, W, 3) uint8 as it is shown; with `size` (height, width) cropped at the centre to that
        shape and scaled.
        """
        shown = self.size(*picture.shape[:2])
        turned = np.ascontiguousarray(self.turn(picture))  # (H', W', 3)
        if size is None:
            size = shown
        if turned.shape[:2] == size:
            return turned
        image = Image.fromarray(turned)
        if turned.shape[:2] == shown:
            fitted = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        else:
            box = _centre_box(turned.shape[:2], shown, size)
            fitted = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
        return np.array(fitted)


def _centre_box(
    stored: tuple[int, ...], shown: tuple[int, int], size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The part (left, top, right, bottom) of a stored picture that has the shape of `size` when it
    is shown.
    """
    share = min(shown[0] / size[0], shown[1] / size[1])
    height = stored[0] * size[0] * share / shown[0]
    width = stored[1] * size[1] * share / shown[1]
    left = (stored[1] - width) / 2
    top = (stored[0] - height) / 2
    return max(0.0, left), max(0.0, top), min(left + width, stored[1]), min(top + height, stored[0])


def display_of_frame(frame: Any, pixel_aspect: Fraction | None) -> Display:
    """Of a decoded PyAV frame and its stream's sample aspect ratio."""
    transpose = flip_rows = flip_columns = False
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None and frame.rotation % 90 == 0:
        # 3 x 3 numbers of 32 bits, rows (a b u) (c d v) (x y w): x' = a x + c y, y' = b x + d y
        a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
        transpose = abs(b) > abs(a)
        flip_rows = (b if transpose else d) < 0
        flip_columns = (c if transpose else a) < 0
    return Display(transpose, flip_rows, flip_columns, sensible_aspect(pixel_aspect))


def display_of_still(image: Image.Image) -> Display:
    """Of a picture file, by its EXIF orientation."""
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # whatever a damaged block of EXIF provokes in Pillow's parser
        orientation = 1
    return Display(*EXIF_TURNS.get(orientation, EXIF_TURNS[1]))


def sensible_aspect(pixel_aspect: Fraction | None) -> Fraction:
    """A sample aspect ratio, or 1 where it is missing, damaged or only rounding."""
    if not pixel_aspect or not Fraction(1, MOST_ASPECT) <= pixel_aspect <= MOST_ASPECT:
        return Fraction(1)
    return Fraction(1) if abs(pixel_aspect - 1) < NEARLY_SQUARE else Fraction(pixel_aspect)
