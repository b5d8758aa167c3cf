"""Bytes of pixels against the models' range."""

import numpy as np
import pytest
import torch
from PIL import Image

from avdiff.clip import midpoints
from avdiff.pixels import to_model, to_uint8


def test_every_byte_comes_back() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(2, 128)
    values = to_model(pixels)
    assert values.dtype == torch.float32 and values.min() == -1 and values.max() == 1
    assert torch.equal(to_uint8(values), pixels)
    assert torch.equal(to_model(pixels.numpy()), values)


def test_pictures_of_any_mode_give_three_channels() -> None:
    gray = Image.fromarray(np.full((2, 3), 255, np.uint8))
    assert torch.equal(to_model(gray), torch.ones(2, 3, 3))


def test_what_lies_outside_is_cut_off_and_floats_are_refused() -> None:
    assert to_uint8(torch.tensor([-3.0, 0.0, 7.0])).tolist() == [0, 128, 255]
    with pytest.raises(TypeError, match="float32: needs uint8"):
        to_model(torch.zeros(2))


def test_midpoints_of_frames() -> None:
    assert midpoints(3, 25).tolist() == pytest.approx([0.02, 0.06, 0.1])
