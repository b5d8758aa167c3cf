"""Between pixels and waveforms outside and packed, normalized latents inside."""

from __future__ import annotations

from typing import Any

import torch

from avdiff.clip import ClipSpec, Clock
from avdiff.latents import (
    denormalize_latents,
    normalize_latents,
    pack_audio,
    pack_video,
    unpack_audio,
    unpack_video,
)


class CodecMixin:
    """Encoding and decoding with the pipeline's own codecs."""

    vae: Any
    audio_vae: Any
    vocoder: Any
    clock: Clock
    _execution_device: Any

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> packed normalized tokens."""
        z = self.vae.encode(frames.to(self._execution_device, self.vae.dtype)).latent_dist.mode()
        return pack_video(normalize_latents(z, self.vae), self.clock.patch).float()

    def encode_audio(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, C, S) at the audio VAE's rate -> packed normalized tokens."""
        z = self.audio_vae.encode(
            self.audio_vae.mel(waveform.to(self._execution_device))
        ).latent_dist.mode()
        return pack_audio(normalize_latents(z, self.audio_vae)).float()

    def decode_video(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> video (B, 3, F, H, W) in [-1, 1]."""
        z = unpack_video(tokens, self.clock.patch, clip.video_grid).to(self.vae.dtype)
        return self.vae.decode(denormalize_latents(z, self.vae)).sample.float().clamp(-1, 1)

    def decode_audio(self, tokens: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
        """Packed tokens -> waveform (B, C, S) of exactly the clip's length, in [-1, 1]."""
        z = unpack_audio(tokens, self.audio_vae.config.latent_channels).to(self.audio_vae.dtype)
        mel = self.audio_vae.decode(denormalize_latents(z, self.audio_vae)).sample
        waveform = self.vocoder(mel.float())  # fp32: bf16 vocoders are audibly worse
        missing = max(0, clip.num_samples - waveform.shape[-1])
        return torch.nn.functional.pad(waveform, (0, missing))[..., : clip.num_samples].clamp(-1, 1)
