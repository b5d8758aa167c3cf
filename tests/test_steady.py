"""Flicker goes, motion stays: against a background that trembles, a square that moves, and edges of
the arguments.
"""

from __future__ import annotations

import pytest
import torch

from avdiff.pipelines.deflicker import smooth_flicker
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from tests.tiny import tiny_components


def tiny() -> AVDiffPipeline:
    """Untrained, without a progress bar."""
    pipe = AVDiffPipeline(**tiny_components())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scene(tremble: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, 24, 30, 34): a grey wall whose brightness trembles, a white square that walks before
    it; where it is.
    """
    generator = torch.Generator().manual_seed(seed)
    video = torch.zeros(1, 3, 24, 30, 34) + tremble / 127.5 * torch.randn(
        1, 3, 24, 1, 1, generator=generator
    )
    square = torch.zeros(24, 30, 34, dtype=torch.bool)
    for t in range(24):
        square[t, 10:18, t : t + 8] = True
    video[:, :, square] = 0.9
    return video, square


def step(video: torch.Tensor) -> float:
    """Mean step of the upper rows, of 255."""
    return float(127.5 * video[:, :, :, :6].diff(dim=2).abs().mean())


def test_flicker_goes_and_motion_stays():
    video, square = scene(tremble=2.0)
    steady = smooth_flicker(video, 6.0)
    assert step(video) > 1.5 and step(steady) < 0.2 * step(video)
    assert (steady - video)[
        :, :, square
    ].abs().mean() < 0.02  # of 0.9: the square is still there, and nowhere else
    assert (steady - video)[:, :, ~square].abs().mean() < 0.03


def test_larger_changes_are_motion():
    video, _ = scene(tremble=40.0)
    assert step(smooth_flicker(video, 1.0)) > 0.95 * step(video)


def test_none_for_stills_and_zero():
    video, _ = scene(tremble=2.0)
    assert smooth_flicker(video, 0.0) is video
    still = video[:, :, :1]
    assert smooth_flicker(still, 6.0) is still
    flat = torch.full((2, 3, 5, 9, 7), 0.25)
    torch.testing.assert_close(smooth_flicker(flat, 6.0), flat)


def test_the_pipeline_steadies_by_its_own_default_and_by_the_call():
    pipe = tiny()
    call = dict(
        prompt="a woman speaks",
        num_frames=9,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="pt",
        check_prompt=False,
    )

    def make(**more):
        return pipe(**call, **more, generator=torch.Generator().manual_seed(1)).frames

    plain, steady = make(), make(deflicker_strength=20.0)
    assert steady.diff(dim=1).abs().mean() < plain.diff(dim=1).abs().mean()
    pipe.register_to_config(deflicker_strength=20.0)
    torch.testing.assert_close(make(), steady)
    torch.testing.assert_close(make(deflicker_strength=0.0), plain)
    with pytest.raises(ValueError, match=r"deflicker_strength=-1: needs a number from 0 to 255"):
        make(deflicker_strength=-1)


def test_given_frames_come_back_untouched():
    pipe = tiny()
    film = torch.rand(1, 3, 5, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    out = pipe(
        "a woman speaks",
        video=film,
        audio=torch.zeros(1, 1, 3200),
        num_frames=9,
        height=64,
        width=64,
        num_inference_steps=2,
        output_type="pt",
        check_prompt=False,
        deflicker_strength=30.0,
        generator=torch.Generator().manual_seed(1),
    )
    torch.testing.assert_close(out.frames[:, :5] * 2 - 1, film.transpose(1, 2), atol=1e-6, rtol=0)
