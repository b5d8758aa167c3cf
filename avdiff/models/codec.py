"""LatentCodec: pixels and waveforms outside, packed and normalized latents inside, both ways.

One for the pipeline, the caches and every round trip, so that what a model learns from is what it
is asked to draw.

Shape legend: B batch, F frames, S samples, N tokens, C values of a token.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor

from avdiff.clip import ClipSpec, Clock
from avdiff.latents import (
    Joint,
    denormalize_latents,
    normalize_latents,
    pack_audio,
    pack_video,
    unpack_audio,
    unpack_video,
)

if TYPE_CHECKING:
    from avdiff.models.codecs.audio_vae import AVAudioVAE
    from avdiff.models.codecs.video_vae import AVVideoVAE
    from avdiff.models.codecs.vocoder import AVVocoder


@dataclass(frozen=True)
class ClipLayout:
    """How a clip lies on the latents of the presenter's codecs.

    Args:
        clip: size and length. channels: values of a token of each modality.
    """

    clip: ClipSpec
    channels: Joint[int]

    def tokens(self) -> Joint[int]:
        """N of each modality."""
        return Joint(self.clip.video_tokens, self.clip.audio_tokens)

    def widths(self) -> Joint[int]:
        """C of each modality."""
        return self.channels

    def edges(self) -> Joint[torch.Tensor]:
        """(N, 2) seconds at which each token begins and ends; the first latent frame is one frame,
        every later one `video_stride` of them.
        """
        clip = self.clip
        frames, rows, columns = clip.video_grid
        stride = clip.clock.video_stride
        starts = [0.0, *((1 + k * stride) / float(clip.fps) for k in range(frames))]
        step = clip.clock.audio_stride / clip.sample_rate
        video = torch.tensor(starts, dtype=torch.float64)
        audio = torch.arange(clip.audio_tokens + 1, dtype=torch.float64) * step
        pairs = Joint(video, audio).map(lambda edge: torch.stack([edge[:-1], edge[1:]], dim=1))
        return Joint(pairs.video.repeat_interleave(rows * columns, dim=0), pairs.audio)

    def noise(
        self,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        wanted: Joint[bool] | None = None,
    ) -> Joint[torch.Tensor]:
        """White noise (B, N, C) fp32, video first; what is not wanted is not drawn."""

        def draw(count: int, width: int, draws: bool | None) -> torch.Tensor | None:
            shape = (batch, count, width)
            return randn_tensor(shape, generator, device, torch.float32) if draws else None

        return self.tokens().map(draw, self.widths(), wanted or Joint(True, True))


@dataclass(frozen=True)
class LatentCodec:
    """The frozen networks between a clip and its tokens.

    Args:
        vae, audio_vae: encode and decode. vocoder: mel to waveform; None where no sound is decoded.
        clock: their strides. device: where they run; None for where their weights are.
    """

    vae: AVVideoVAE
    audio_vae: AVAudioVAE
    vocoder: AVVocoder | None = None
    clock: Clock = field(default_factory=Clock)
    device: torch.device | None = None

    @property
    def sample_rate(self) -> int:
        """Hz of the sound that `encode_audio` takes."""
        return self.audio_vae.config.sample_rate

    @property
    def channels(self) -> int:
        """Channels of that sound."""
        return self.audio_vae.config.audio_channels

    @property
    def out_rate(self) -> int:
        """Hz of the sound that `decode_audio` returns."""
        return self.sample_rate if self.vocoder is None else self.vocoder.config.sampling_rate

    def layout(self, clip: ClipSpec) -> ClipLayout:
        """Where the tokens of a clip lie."""
        video = self.vae.config.latent_channels * self.clock.patch**2
        return ClipLayout(clip, Joint(video, self.audio_vae.config.latent_channels))

    def encode_video(self, frames: torch.Tensor) -> torch.Tensor:
        """Video (B, 3, F, H, W) in [-1, 1] -> packed normalized tokens (B, N_v, C_v) fp32."""
        x = frames.to(self.device or self.vae.device, self.vae.dtype)
        latents = self.vae.encode(x).latent_dist.mode().float()
        return pack_video(normalize_latents(latents, self.vae), self.clock.patch)

    def encode_audio(self, waveform: torch.Tensor) -> torch.Tensor:
        """Waveform (B, channels, S) at `sample_rate` -> packed normalized tokens (B, N_a, C_a)
        fp32.
        """
        mel = self.audio_vae.mel(waveform.to(self.device or self.audio_vae.device))
        latents = self.audio_vae.encode(mel).latent_dist.mode().float()
        return pack_audio(normalize_latents(latents, self.audio_vae))

    def encode(self, video: torch.Tensor | None, audio: torch.Tensor | None) -> Joint[torch.Tensor]:
        """Both modalities; what is None stays None."""
        return Joint(
            None if video is None else self.encode_video(video),
            None if audio is None else self.encode_audio(audio),
        )

    def video_latents(self, tokens: torch.Tensor, layout: ClipLayout) -> torch.Tensor:
        """Packed tokens -> latents (B, C, F, H, W) that `vae.decode` takes."""
        packed = unpack_video(tokens, self.clock.patch, layout.clip.video_grid)
        return denormalize_latents(packed.to(self.vae.dtype), self.vae)

    def audio_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """Packed tokens -> latents (B, C, L, 1) that `audio_vae.decode` takes."""
        packed = unpack_audio(tokens, self.audio_vae.config.latent_channels)
        return denormalize_latents(packed.to(self.audio_vae.dtype), self.audio_vae)

    def decode_video(self, tokens: torch.Tensor, layout: ClipLayout) -> torch.Tensor:
        """Packed tokens -> video (B, 3, F, H, W) fp32 in [-1, 1]."""
        return self.vae.decode(self.video_latents(tokens, layout)).sample.float().clamp(-1, 1)

    def decode_audio(self, tokens: torch.Tensor, layout: ClipLayout) -> torch.Tensor:
        """Packed tokens -> waveform (B, channels, S) fp32 in [-1, 1], exactly as long as the clip.

        Raises:
            ValueError: there is no vocoder.
        """
        if self.vocoder is None:
            raise ValueError("vocoder=None: needs one to turn latents into sound")
        mel = self.audio_vae.decode(self.audio_latents(tokens)).sample
        waveform = self.vocoder(mel.float())  # fp32: bf16 vocoders are audibly worse
        length = layout.clip.num_samples
        missing = max(0, length - waveform.shape[-1])
        return torch.nn.functional.pad(waveform, (0, missing))[..., :length].clamp(-1, 1)

    def decode(self, latents: Joint[torch.Tensor], layout: ClipLayout) -> Joint[torch.Tensor]:
        """Both modalities; what is None stays None."""
        video = latents.video
        audio = latents.audio
        return Joint(
            None if video is None else self.decode_video(video, layout),
            None if audio is None else self.decode_audio(audio, layout),
        )

    def fingerprint(self) -> dict[str, str]:
        """Hash of each encoder's weights and statistics: what cached latents depend on."""
        return {"vae": weights_hash(self.vae), "audio_vae": weights_hash(self.audio_vae)}


def codec_clock(vae: AVVideoVAE, audio_vae: AVAudioVAE, patch: int, shared_rate: float) -> Clock:
    """Strides of two codecs, with the patch and the shared rate of the transformer."""
    hop = audio_vae.config.mel_hop_length
    return Clock(
        video_stride=vae.config.temporal_compression_ratio,
        spatial_stride=vae.config.spatial_compression_ratio,
        patch=patch,
        audio_stride=hop * audio_vae.config.temporal_compression_ratio,
        mel_hop=hop,
        shared_rate=Fraction(shared_rate or 12.5).limit_denominator(1000),
    )


def weights_hash(module: torch.nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names and fp32 values of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
