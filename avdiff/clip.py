"""The clock: every conversion between seconds, frames, samples, latent steps, tokens and positions.

Time is exact (`fractions.Fraction`) until the last moment; each derived count is rounded once, from
the exact duration. Video latents follow the causal convention of video VAEs: the first frame alone,
then groups of `video_stride` frames.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

# 23.976 and 29.97 are names for NTSC rates (SMPTE ST 12-1), not numbers.
NTSC = {
    Fraction("23.976"): Fraction(24000, 1001),
    Fraction("29.97"): Fraction(30000, 1001),
    Fraction("59.94"): Fraction(60000, 1001),
}
MAX_SIDE = 16384  # pixels: beyond it no codec for video follows
# an hour: beyond it a request is a slip of the keyboard, and it would exhaust memory
MAX_SECONDS = 3600


def as_fps(fps: Fraction | float | int | str) -> Fraction:
    """Exact frame rate: 29.97 -> 30000/1001, 25 -> 25, "24000/1001" as written.

    Raises:
        ValueError: not a finite number in (0, 1000].
    """
    text = str(fps)
    try:  # no exponents: Fraction("1e999999999") would build that number
        plain = len(text) < 32 and "e" not in text.lower()
        exact = fps if isinstance(fps, Fraction) else Fraction(text if plain else "?")
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(
            f"fps={text[:40]}: needs a positive number such as 25, 29.97 or '30000/1001'"
        ) from error
    exact = NTSC.get(exact, exact)
    # a float of an NTSC rate such as 24000 / 1001 is within 1e-15 of it
    near = exact.limit_denominator(1001)
    exact = near if abs(near - exact) < Fraction(1, 10**9) else exact
    if not 0 < exact <= 1000:
        raise ValueError(f"fps={text[:40]}: needs a frame rate above 0 and at most 1000")
    return exact


def midpoints(count: int, rate: float) -> np.ndarray:
    """(count,) fp64 seconds of the middles of frames, `rate` frames a second."""
    import numpy as np

    return (np.arange(count) + 0.5) / rate


@dataclass(frozen=True)
class Clock:
    """Strides of the codecs and the shared rate.

    Args:
        video_stride: frames per latent frame after the first.
        spatial_stride: pixels per latent row or column; `patch`: latent rows and columns per token.
        audio_stride: samples per audio latent step. shared_rate: shared-stream tokens per second.
    """

    video_stride: int = 2
    spatial_stride: int = 32
    patch: int = 2
    audio_stride: int = 960
    mel_hop: int = 240
    shared_rate: Fraction = Fraction(25, 2)

    def __post_init__(self) -> None:
        for name in ("video_stride", "spatial_stride", "patch", "audio_stride", "mel_hop"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)}: needs a whole number of at least 1"
                )
        if not self.shared_rate > 0:
            raise ValueError(f"shared_rate={self.shared_rate}: needs a rate above 0")
        if self.audio_stride % self.mel_hop:
            raise ValueError(
                f"audio_stride={self.audio_stride}: needs a multiple of mel_hop={self.mel_hop}"
            )

    @property
    def mels_per_token(self) -> int:
        """Mel frames in one audio latent step."""
        return self.audio_stride // self.mel_hop


@dataclass(frozen=True)
class ClipSpec:
    """Size and length of a clip on the clock.

    Args:
        num_frames: 1 + k * clock.video_stride. fps: exact frame rate.
        height, width: pixels, multiples of spatial_stride * patch. sample_rate: Hz.

    Raises:
        ValueError: names the argument, its value and the nearest values that fit.
    """

    num_frames: int
    fps: Fraction = Fraction(25)
    height: int = 128
    width: int = 128
    sample_rate: int = 24000
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fps", as_fps(self.fps))
        for name in ("num_frames", "height", "width", "sample_rate"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: needs a whole number")
        stride = self.clock.video_stride
        grid = self.clock.spatial_stride * self.clock.patch
        if self.num_frames < 1 or (self.num_frames - 1) % stride:
            low = max(0, (self.num_frames - 1) // stride) * stride + 1
            near = (
                f"nearest are {low} and {low + stride}"
                if self.num_frames > 0
                else "the smallest is 1"
            )
            raise ValueError(f"num_frames={self.num_frames}: needs {stride}*k+1; {near}")
        for name in ("height", "width"):
            size = getattr(self, name)
            if size < grid or size % grid:
                low = max(1, size // grid) * grid
                raise ValueError(
                    f"{name}={size}: needs a multiple of {grid}; nearest are {low} and {low + grid}"
                )
            if size > MAX_SIDE:
                raise ValueError(f"{name}={size}: needs at most {MAX_SIDE} pixels")
        if not 1000 <= self.sample_rate <= 384000:
            raise ValueError(f"sample_rate={self.sample_rate}: needs 1000 to 384000 Hz")
        if self.seconds > MAX_SECONDS:
            raise ValueError(
                f"num_frames={self.num_frames}: {self.seconds // 1} s at {float(self.fps):g} fps; "
                f"a clip may last at most {MAX_SECONDS} s"
            )

    @classmethod
    def from_seconds(
        cls, seconds: Fraction | float, fps: Fraction | float = 25, **kwargs
    ) -> ClipSpec:
        """Shortest clip that lasts at least `seconds` (it overshoots by less than one latent
        frame).
        """
        clock = kwargs.get("clock") or Clock()
        rate = as_fps(fps)
        if not 0 < seconds <= MAX_SECONDS:  # also refuses NaN
            raise ValueError(
                f"seconds={seconds}: needs a duration above 0 and at most {MAX_SECONDS} s"
            )
        # 0.1 is meant as 1/10
        exact = seconds if isinstance(seconds, Fraction) else Fraction(str(seconds))
        groups = max(0, -((1 - exact * rate) // clock.video_stride))  # ceil((frames - 1) / stride)
        return cls(num_frames=1 + clock.video_stride * int(groups), fps=rate, **kwargs)

    @property
    def seconds(self) -> Fraction:
        """Exact duration: num_frames / fps."""
        return Fraction(self.num_frames) / self.fps

    @property
    def num_samples(self) -> int:
        """Audio samples per channel of the finished clip."""
        return round(self.seconds * self.sample_rate)

    @property
    def latent_frames(self) -> int:
        """Video latent frames: the first frame alone, then one for each group of `video_stride`."""
        return 1 + (self.num_frames - 1) // self.clock.video_stride

    @property
    def video_grid(self) -> tuple[int, int, int]:
        """Tokens along (time, rows, columns)."""
        cell = self.clock.spatial_stride * self.clock.patch
        return self.latent_frames, self.height // cell, self.width // cell

    @property
    def video_tokens(self) -> int:
        """Number of video tokens."""
        f, h, w = self.video_grid
        return f * h * w

    @property
    def audio_tokens(self) -> int:
        """Audio latent steps, enough to cover the clip (rounded up once, so the sound never ends
        early).
        """
        return int(-(-self.seconds * self.sample_rate // self.clock.audio_stride))

    @property
    def mel_frames(self) -> int:
        """Mel frames that the audio latents stand for."""
        return self.audio_tokens * self.clock.mels_per_token

    @property
    def num_shared(self) -> int:
        """Tokens of the shared stream, rounded up to cover the clip."""
        return int(-(-self.seconds * self.clock.shared_rate // 1))

    def frame_times(self) -> list[Fraction]:
        """Exact start time of each frame in seconds."""
        return [Fraction(i) / self.fps for i in range(self.num_frames)]

    def video_seconds(self) -> list[Fraction]:
        """Exact midpoint of each latent frame's bin: [0, 1/fps) for the first, then groups of
        `video_stride` frames.
        """
        s = self.clock.video_stride
        later = [
            Fraction(2 * (1 + j * s) + s) / (2 * self.fps) for j in range(self.latent_frames - 1)
        ]
        return [1 / (2 * self.fps), *later]

    def audio_seconds(self) -> list[Fraction]:
        """Exact midpoint of each audio latent step."""
        step = Fraction(self.clock.audio_stride, self.sample_rate)
        return [(i + Fraction(1, 2)) * step for i in range(self.audio_tokens)]

    def shared_seconds(self) -> list[Fraction]:
        """Exact midpoint of each shared tick."""
        return [(i + Fraction(1, 2)) / self.clock.shared_rate for i in range(self.num_shared)]

    def video_positions(self) -> torch.Tensor:
        """(N_v, 3) fp32: seconds, row and column midpoints in pixels."""
        import torch

        _, rows, columns = self.video_grid
        cell = self.clock.spatial_stride * self.clock.patch
        seconds = torch.tensor([float(t) for t in self.video_seconds()], dtype=torch.float32)
        y = (torch.arange(rows, dtype=torch.float32) + 0.5) * cell
        x = (torch.arange(columns, dtype=torch.float32) + 0.5) * cell
        return torch.stack(torch.meshgrid(seconds, y, x, indexing="ij"), dim=-1).reshape(-1, 3)

    def audio_positions(self) -> torch.Tensor:
        """(N_a, 1) fp32 seconds."""
        import torch

        return torch.tensor([[float(t)] for t in self.audio_seconds()], dtype=torch.float32)

    def shared_positions(self) -> torch.Tensor:
        """(N_s, 1) fp32 seconds."""
        import torch

        return torch.tensor([[float(t)] for t in self.shared_seconds()], dtype=torch.float32)
