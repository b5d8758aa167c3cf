"""Still pictures of a clip: a contact sheet of its frames and a spectrogram of its sound."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

# Anchors of the "magma" colour map (matplotlib, CC0); values between them are interpolated.
MAGMA = np.array(
    [
        (0, 0, 4),
        (40, 17, 89),
        (101, 26, 128),
        (161, 48, 126),
        (222, 73, 104),
        (251, 135, 97),
        (252, 253, 191),
    ]
)


def contact_sheet(
    frames: Sequence[Any] | np.ndarray,
    count: int = 16,
    columns: int = 8,
    fps: Fraction | float | None = None,
) -> Image.Image:
    """Tile up to `count` evenly spaced frames, first and last among them.

    Args:
        frames: F pictures (H, W, 3) uint8 or PIL. columns: pictures in a row. fps: if given, times
            are written in.

    Raises:
        ValueError: no frames, or a count below 1.
    """
    if len(frames) == 0 or count < 1 or columns < 1:
        raise ValueError(
            f"frames of {len(frames)} pictures, count={count}, columns={columns}: each needs at "
            "least 1"
        )
    chosen = np.unique(np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int))
    picked = [frames[int(i)] for i in chosen]
    tiles = [
        frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
        for frame in picked
    ]
    width, height = tiles[0].size
    columns = min(columns, len(tiles))
    sheet = Image.new("RGB", (columns * width, -(-len(tiles) // columns) * height))
    draw = ImageDraw.Draw(sheet)
    for n, (index, tile) in enumerate(zip(chosen, tiles, strict=True)):
        corner = (n % columns * width, n // columns * height)
        sheet.paste(tile, corner)
        if fps is not None:
            position = (corner[0] + 3, corner[1] + 2)
            label = f"{float(index / fps):.2f} s"
            draw.text(position, label, fill="white", stroke_width=1, stroke_fill="black")
    return sheet


def spectrogram_picture(
    audio: np.ndarray | Any,
    sample_rate: int,
    height: int = 256,
    pixels_per_second: int = 100,
    floor_db: float = -80.0,
) -> Image.Image:
    """Log-magnitude spectrogram, low frequencies at the bottom, 0 Hz to half the sample rate on a
    linear axis.

    Args:
        audio: (S,) or (C, S) float; channels are averaged. floor_db: level below the loudest point
            that shows black.

    Raises:
        ValueError: no samples, or not finite.
    """
    wave = np.asarray(audio.detach().cpu() if hasattr(audio, "detach") else audio, dtype=np.float64)
    wave = wave.mean(axis=0) if wave.ndim == 2 else wave
    if wave.ndim != 1 or wave.size == 0 or not np.isfinite(wave).all():
        raise ValueError(f"audio of shape {np.shape(audio)}: needs finite samples (S,) or (C, S)")
    window = np.hanning(2 * height)
    columns = max(1, round(len(wave) / sample_rate * pixels_per_second))
    centres = (np.arange(columns) / pixels_per_second * sample_rate).astype(int)
    padded = np.pad(wave, (height, 2 * height))
    pieces = padded[centres[:, None] + np.arange(2 * height)] * window  # (columns, 2 * height)
    power = np.abs(np.fft.rfft(pieces))[:, :height] ** 2  # (columns, height)
    level = 10 * np.log10(np.maximum(power, 1e-12)) - 10 * np.log10(max(power.max(), 1e-12))
    shade = np.clip(1 - level / floor_db, 0, 1).T[::-1] * (
        len(MAGMA) - 1
    )  # rows: high to low frequency
    channels = [np.interp(shade, np.arange(len(MAGMA)), MAGMA[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
