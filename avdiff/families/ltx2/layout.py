"""How a clip lies on LTX-2's latents: counts, the seconds of each token, and noise in the family's
order.

Shape legend: B clips, N tokens, C latent channels, F latent frames, H/W latent rows and columns, L
audio latent steps, M mel groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from avdiff.clip import ClipSpec
from avdiff.latents import Joint, pack_audio, pack_video

Generators = torch.Generator | list[torch.Generator] | None


@dataclass(frozen=True)
class LTX2Layout:
    """Counts and times of a clip's latents.

    Args:
        clip: on LTX-2's clock, at the sample rate of its audio VAE (16 kHz).
        channels: latent channels of each modality before packing. mel_groups: mel bins of a latent
            step, 16.
    """

    clip: ClipSpec
    channels: Joint[int]
    mel_groups: int

    @property
    def grid(self) -> tuple[int, int, int]:
        """Latent (F, H, W); a token is one of these cells."""
        return self.clip.video_grid

    @property
    def audio_steps(self) -> int:
        """Latent steps of sound, 25 a second, rounded to the nearest; `ClipSpec` would round up."""
        step = Fraction(self.clip.clock.audio_stride, self.clip.sample_rate)
        return round(float(self.clip.seconds / step))

    def tokens(self) -> Joint[int]:
        """Number of tokens of each modality."""
        return Joint(self.clip.video_tokens, self.audio_steps)

    def widths(self) -> Joint[int]:
        """Values of one packed token."""
        audio = None if self.channels.audio is None else self.channels.audio * self.mel_groups
        return Joint(self.channels.video, audio)

    def edges(self) -> Joint[Tensor]:
        """Seconds [start, end) of each token, fp32 (N, 2) on the CPU.

        The first latent frame holds one frame, the others `video_stride`. The first latent step of
        sound holds one mel frame (10 ms), the others four: sound is 30 ms ahead of a regular grid.
        """
        clip, clock = self.clip, self.clip.clock
        frames = _causal_edges(self.grid[0], clock.video_stride) / float(clip.fps)
        mels = _causal_edges(self.audio_steps, clock.mels_per_token)
        sounds = mels * clock.mel_hop / clip.sample_rate
        cell = self.grid[1] * self.grid[2]
        video = torch.stack([frames[:-1], frames[1:]], -1).repeat_interleave(cell, 0)
        return Joint(video, torch.stack([sounds[:-1], sounds[1:]], -1))

    def noise(self, batch: int, generator: Generators, device: torch.device) -> Joint[Tensor]:
        """Packed fp32 noise (B, N, C), drawn unpacked and video first as diffusers draws it, so
        that a seed gives the same clip here and there.
        """
        picture = (batch, self.channels.video, *self.grid)
        sound = (batch, self.channels.audio, self.audio_steps, self.mel_groups)
        video = randn_tensor(picture, generator, device, torch.float32)
        audio = randn_tensor(sound, generator, device, torch.float32)
        return Joint(pack_video(video, 1), pack_audio(audio))


def _causal_edges(steps: int, stride: int) -> Tensor:
    """Edges 0, 1, 1 + stride, ... of `steps` bins, the first of which holds one unit."""
    return (torch.arange(steps + 1, dtype=torch.float32) * stride + 1 - stride).clamp(min=0)
