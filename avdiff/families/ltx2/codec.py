"""LTX-2's codecs: pixels and samples to packed, normalized latents and back.

Shape legend: B clips, F frames, H/W pixels, S samples, N tokens, C values of a token, T mel frames.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction

import torch
import torchaudio
from diffusers import AutoencoderKLLTX2Audio, AutoencoderKLLTX2Video
from diffusers.pipelines.ltx2 import LTX2Vocoder, LTX2VocoderWithBWE
from torch import Tensor, nn

from avdiff.clip import ClipSpec, Clock
from avdiff.families.ltx2.layout import LTX2Layout
from avdiff.latents import Joint, pack_audio, pack_video, unpack_audio, unpack_video

N_FFT = 1024  # samples of a mel window, as long as its transform (ltx-core, AudioProcessor)
MEL_FLOOR = 1e-5  # of a magnitude, before the logarithm


class LTX2Codec:
    """The video VAE, the audio VAE and the vocoder of a folder.

    Attributes:
        clock: strides. sample_rate: Hz of what `encode_audio` takes. out_rate: Hz of what
            `decode_audio` gives. channels: of the sound, two.
    """

    def __init__(
        self,
        vae: AutoencoderKLLTX2Video,
        audio_vae: AutoencoderKLLTX2Audio,
        vocoder: LTX2Vocoder | LTX2VocoderWithBWE | None,
    ) -> None:
        self.vae = vae
        self.audio_vae = audio_vae
        self.vocoder = vocoder
        config = audio_vae.config
        hop = config.mel_hop_length
        audio_stride = hop * audio_vae.temporal_compression_ratio
        # The ratios are attributes of the VAE and not in its config.
        self.clock = Clock(
            vae.temporal_compression_ratio, vae.spatial_compression_ratio, 1, audio_stride, hop
        )
        self.sample_rate: int = config.sample_rate
        self.out_rate: int = self.sample_rate
        if vocoder is not None:
            self.out_rate = vocoder.config.output_sampling_rate
        self.channels: int = config.in_channels
        self._mel = torchaudio.transforms.MelSpectrogram(
            config.sample_rate,
            n_fft=N_FFT,
            hop_length=hop,
            f_min=0.0,
            f_max=config.sample_rate / 2,
            n_mels=config.mel_bins,
            power=1.0,
            mel_scale="slaney",
            norm="slaney",
            pad_mode="reflect",
        )

    def layout(self, clip: ClipSpec) -> LTX2Layout:
        """Counts of `clip`, which must be on this codec's clock and sample rate."""
        config = self.audio_vae.config
        channels = Joint(self.vae.config.latent_channels, config.latent_channels)
        return LTX2Layout(clip, channels, config.mel_bins // self.audio_vae.mel_compression_ratio)

    def clip(self, num_frames: int, fps: Fraction, height: int, width: int) -> ClipSpec:
        """A clip on this codec's clock; sizes in pixels."""
        return ClipSpec(num_frames, fps, height, width, self.sample_rate, self.clock)

    # ----------------------------------------------------------------------------------- to latents
    @torch.no_grad()
    def encode_video(self, frames: Tensor) -> Tensor:
        """(B, 3, F, H, W) in [-1, 1], F = 8k+1 -> (B, N_v, C_v) fp32."""
        latents = self.vae.encode(frames.to(self.vae.dtype)).latent_dist.mode().float()
        mean, std = self._video_statistics(latents)
        return pack_video((latents - mean) * self.vae.config.scaling_factor / std, 1)

    def mel(self, waveform: Tensor) -> Tensor:
        """(B, channels, S) -> log mel magnitudes (B, channels, T, bins), natural logarithm."""
        magnitudes = self._mel.to(waveform.device)(waveform.float())
        return magnitudes.clamp(min=MEL_FLOOR).log().transpose(2, 3)

    @torch.no_grad()
    def encode_audio(self, waveform: Tensor, steps: int | None = None) -> Tensor:
        """(B, channels, S) at `sample_rate` in [-1, 1] -> (B, N_a, C_a) fp32, at most `steps`."""
        mel = self.mel(waveform)
        latents = self.audio_vae.encode(mel.to(self.audio_vae.dtype)).latent_dist.mode()
        tokens = pack_audio(latents.float())[:, :steps]
        mean, std = self.audio_vae.latents_mean.to(tokens), self.audio_vae.latents_std.to(tokens)
        return (tokens - mean) / std

    # --------------------------------------------------------------------------------- from latents
    def video_latents(self, tokens: Tensor, layout: LTX2Layout) -> Tensor:
        """Packed tokens -> the VAE's own latents (B, C, F, H, W), no longer normalized."""
        latents = unpack_video(tokens, 1, layout.grid)
        mean, std = self._video_statistics(latents)
        return latents * std / self.vae.config.scaling_factor + mean

    def audio_latents(self, tokens: Tensor, layout: LTX2Layout) -> Tensor:
        """Packed tokens -> the audio VAE's own latents (B, C, L, M)."""
        mean, std = self.audio_vae.latents_mean.to(tokens), self.audio_vae.latents_std.to(tokens)
        return unpack_audio(tokens * std + mean, layout.channels.audio)

    @torch.no_grad()
    def decode_video(self, tokens: Tensor, layout: LTX2Layout) -> Tensor:
        """(B, N_v, C_v) -> (B, 3, F, H, W) fp32, about [-1, 1]."""
        latents = self.video_latents(tokens, layout).to(self.vae.dtype)
        time = None
        if self.vae.config.timestep_conditioning:  # decoded at time 0: no noise is added
            time = latents.new_zeros(latents.shape[0])
        return self.vae.decode(latents, time, return_dict=False)[0].float()

    @torch.no_grad()
    def decode_audio(self, tokens: Tensor, layout: LTX2Layout) -> Tensor:
        """(B, N_a, C_a) -> (B, channels, S) fp32 at `out_rate`.

        Raises:
            ValueError: the folder has no vocoder.
        """
        if self.vocoder is None:
            raise ValueError("vocoder=None: sound cannot be decoded; load the folder's vocoder")
        latents = self.audio_latents(tokens, layout).to(self.audio_vae.dtype)
        mel = self.audio_vae.decode(latents, return_dict=False)[0]
        return self.vocoder(mel).float()

    def _video_statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.vae.latents_mean.view(1, -1, 1, 1, 1).to(latents)
        return mean, self.vae.latents_std.view(1, -1, 1, 1, 1).to(latents)

    def fingerprint(self) -> dict[str, str]:
        """Hash of the weights and statistics of each codec, for caches of latents."""
        return {"vae": weights_hash(self.vae), "audio_vae": weights_hash(self.audio_vae)}


def weights_hash(module: nn.Module) -> str:
    """First 16 hex digits of the SHA-256 over names, types and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}:{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
