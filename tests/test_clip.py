"""The clock: all counts and positions of a clip agree, whatever its rate, length and sample
rate.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdiff.clip import ClipSpec, Clock, as_fps

RATES = st.sampled_from(["23.976", 24, 25, "29.97", 30])
CLOCKS = st.builds(
    lambda video, hop, mels, tick: Clock(
        video_stride=video, audio_stride=hop * mels, mel_hop=hop, shared_rate=tick
    ),
    st.integers(1, 8),
    st.sampled_from([160, 240, 256, 320]),
    st.integers(1, 8),
    st.fractions(5, 30, max_denominator=8),
)
CLIPS = st.builds(
    lambda seconds, fps, rate, clock: ClipSpec.from_seconds(
        seconds, fps, sample_rate=rate, clock=clock
    ),
    st.floats(0.5, 20),
    RATES,
    st.sampled_from([16000, 22050, 24000, 44100, 48000]),
    CLOCKS,
)


@given(CLIPS)
def test_all_streams_end_within_one_latent_step(clip: ClipSpec) -> None:
    step = Fraction(clip.clock.audio_stride, clip.sample_rate)
    audio_end, tick_end = clip.audio_tokens * step, clip.num_shared / clip.clock.shared_rate
    assert 0 <= audio_end - clip.seconds < step
    assert 0 <= tick_end - clip.seconds < 1 / clip.clock.shared_rate
    assert abs(Fraction(clip.num_samples, clip.sample_rate) - clip.seconds) <= Fraction(
        1, 2 * clip.sample_rate
    )
    assert (
        clip.mel_frames * clip.clock.mel_hop
        == clip.audio_tokens * clip.clock.audio_stride
        >= clip.num_samples - 1
    )


@given(st.floats(0.5, 20), RATES, CLOCKS)
def test_from_seconds_is_the_shortest_that_lasts(
    seconds: float, fps: str | int, clock: Clock
) -> None:
    clip = ClipSpec.from_seconds(seconds, fps, clock=clock)
    wanted = Fraction(str(seconds))
    assert clip.seconds >= wanted
    shorter = Fraction(clip.num_frames - clock.video_stride) / clip.fps
    assert shorter < wanted


@given(CLIPS)
def test_latent_bins_tile_the_clip(clip: ClipSpec) -> None:
    """The bins of video latents, built frame by frame, have the given midpoints and cover each
    frame once.
    """
    bins, frame = [], 0
    while frame < clip.num_frames:
        width = 1 if frame == 0 else clip.clock.video_stride
        bins.append((frame, frame + width))
        frame += width
    assert frame == clip.num_frames
    assert len(bins) == clip.latent_frames == clip.video_grid[0]
    assert clip.video_seconds() == [Fraction(a + b) / (2 * clip.fps) for a, b in bins]
    assert clip.frame_times() == [k / clip.fps for k in range(clip.num_frames)]


@given(CLIPS)
def test_positions_are_fp32_midpoints_rounded_once(clip: ClipSpec) -> None:
    pairs = [
        (
            clip.video_positions()[:: clip.video_tokens // clip.latent_frames, 0],
            clip.video_seconds(),
        ),
        (clip.audio_positions()[:, 0], clip.audio_seconds()),
        (clip.shared_positions()[:, 0], clip.shared_seconds()),
    ]
    for positions, exact in pairs:
        assert positions.dtype == torch.float32
        assert len(positions) == len(exact)
        error = np.array(
            [abs(Fraction(p) - t) for p, t in zip(positions.tolist(), exact, strict=True)],
            dtype=float,
        )
        assert (error <= np.spacing(positions.numpy()) / 2 * (1 + 1e-6)).all()
        steps = np.diff(np.array(exact[1:], dtype=float))
        assert len(steps) == 0 or np.allclose(steps, steps[0])


def test_video_positions_run_frame_by_frame_row_by_row() -> None:
    clip = ClipSpec(num_frames=5, height=128, width=192)
    positions = clip.video_positions().reshape(*clip.video_grid, 3)
    assert positions.shape == (3, 2, 3, 3)
    assert positions[:, 0, 0, 0].tolist() == pytest.approx([0.02, 0.08, 0.16])
    assert positions[0, :, 0, 1].tolist() == [32, 96]
    assert positions[0, 0, :, 2].tolist() == [32, 96, 160]


def test_presenter_counts() -> None:
    clip = ClipSpec.from_seconds(4)
    assert (clip.num_frames, clip.latent_frames, clip.video_tokens) == (101, 51, 204)
    assert (clip.audio_tokens, clip.mel_frames, clip.num_samples, clip.num_shared) == (
        101,
        404,
        96960,
        51,
    )


@pytest.mark.parametrize(
    ("given_rate", "exact"),
    [
        (29.97, Fraction(30000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        ("24000/1001", Fraction(24000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (12.5, Fraction(25, 2)),
        (25, Fraction(25)),
        (np.float32(25), Fraction(25)),
    ],
)
def test_frame_rates_are_exact(given_rate: float | str, exact: Fraction) -> None:
    assert as_fps(given_rate) == exact


@pytest.mark.parametrize(
    "fps",
    [0, -25, float("nan"), float("inf"), "fast", "1/0", "1e999999999", 10**40, 1e300, None, ""],
)
def test_bad_frame_rates_are_refused(fps: object) -> None:
    with pytest.raises(ValueError, match=r"^fps=.*needs"):
        as_fps(fps)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 50}, r"num_frames=50: needs 2\*k\+1; nearest are 49 and 51"),
        ({"num_frames": 0}, "the smallest is 1"),
        ({"num_frames": -3}, "the smallest is 1"),
        ({"num_frames": 5.0}, "num_frames=5.0: needs a whole number"),
        ({"num_frames": 10**9 + 1}, "at most 3600 s"),
        ({"num_frames": 10**400 + 1}, "at most 3600 s"),
        (
            {"num_frames": 5, "height": 100},
            "height=100: needs a multiple of 64; nearest are 64 and 128",
        ),
        ({"num_frames": 5, "width": 64 * 10**6}, "at most 16384 pixels"),
        ({"num_frames": 5, "sample_rate": 10}, "sample_rate=10: needs 1000"),
        ({"num_frames": 5, "fps": 0}, "fps=0: needs"),
    ],
)
def test_bad_clips_are_refused_in_one_sentence(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipSpec(**arguments)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 4000])
def test_bad_durations_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^seconds="):
        ClipSpec.from_seconds(seconds)


@pytest.mark.parametrize(
    "change", [{"video_stride": 0}, {"patch": 1.5}, {"audio_stride": 961}, {"shared_rate": 0}]
)
def test_bad_clocks_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        Clock(**change)
