"""Pixels on their way into a model and out of it: bytes 0..255 against the models' [-1, 1]."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

HALF = 127.5  # bytes from the middle of the range to its end


def to_model(pixels: torch.Tensor | np.ndarray | Image) -> torch.Tensor:
    """Pixels as bytes -> fp32 in [-1, 1], in the same layout.

    Args:
        pixels: uint8 values 0..255 of any shape, or a PIL image, which gives (height, width, 3).

    Raises:
        TypeError: values of another type, whose range would be a guess.
    """
    import torch

    if not isinstance(pixels, torch.Tensor | np.ndarray):
        pixels = np.array(pixels.convert("RGB"))
    if isinstance(pixels, np.ndarray):
        pixels = torch.from_numpy(pixels)
    if pixels.dtype != torch.uint8:
        raise TypeError(f"pixels of type {pixels.dtype}: needs uint8 values from 0 to 255")
    return pixels.float() / HALF - 1


def to_uint8(pixels: torch.Tensor) -> torch.Tensor:
    """Inverse of `to_model`, rounded to the nearest byte; what lies outside [-1, 1] is cut off."""
    return pixels.float().clamp(-1, 1).add(1).mul(HALF).round().byte()
