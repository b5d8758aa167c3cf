"""Between pixels and waveforms outside and packed, normalised latents inside."""

from __future__ import annotations

from typing import Any

import torch

from avdiff.clip import ClipSpec, Clock
from avdiff.latents import pack_audio, pack_video, unpack_audio, unpack_video


class CodecMixin:
    """Encoding and decoding with the pipeline's own codecs."""

    vae: Any
    audio_vae: Any
    vocoder: Any
    clock: Clock

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> packed normalised tokens."""
        z = self.vae.encode(frames.to(self.vae.dtype)).latent_dist.mode()
        return pack_video(
            (z - _stat(self.vae.latents_mean, z)) / _stat(self.vae.latents_std, z), self.clock.patch
        ).float()

    def encode_audio(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, C, S) at the audio VAE's rate -> packed normalised tokens."""
        z = self.audio_vae.encode(self.audio_vae.mel(waveform)).latent_dist.mode()
        return pack_audio((z - _stat(self.audio_vae.latents_mean, z)) / _stat(self.audio_vae.latents_std, z)).float()

    def decode_video(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> video (B, 3, F, H, W) in [-1, 1]."""
        z = unpack_video(tokens, self.clock.patch, clip.video_grid).to(self.vae.dtype)
        z = z * _stat(self.vae.latents_std, z) + _stat(self.vae.latents_mean, z)
        return self.vae.decode(z).sample.float().clamp(-1, 1)

    def decode_audio(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> waveform (B, C, S) of exactly the clip's length, in [-1, 1]."""
        z = unpack_audio(tokens, self.audio_vae.config.latent_channels).to(self.audio_vae.dtype)
        mel = self.audio_vae.decode(
            z * _stat(self.audio_vae.latents_std, z) + _stat(self.audio_vae.latents_mean, z)
        ).sample
        waveform = self.vocoder(mel.float())  # fp32: bf16 vocoders are audibly worse
        return torch.nn.functional.pad(waveform, (0, max(0, clip.num_samples - waveform.shape[-1])))[
            ..., : clip.num_samples
        ].clamp(-1, 1)


def _stat(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Per-channel statistics (C,) shaped to broadcast over (B, C, ...)."""
    return values.to(like).view(1, -1, *(1,) * (like.ndim - 2))
