"""AVAudioVAE: waveform -> log-mel -> 25 tokens a second of 48 values, and back to log-mel.

Four mel frames (40 ms) become one token, exactly: L tokens decode to 4 L frames. Nearly all work is
done at 25 Hz by ConvNeXt blocks over time (Liu et al. 2022, arXiv:2201.03545; in 1-D as in Vocos,
arXiv:2306.00814); two light blocks at 100 Hz smooth the seams between tokens. There is no
normalisation over time, so silence elsewhere in a clip changes nothing, and a token sees at most
`receptive_tokens` neighbours to either side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import (
    AutoencoderMixin,
    DecoderOutput,
    DiagonalGaussianDistribution,
)
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from avdiff.latents import denormalize_latents, normalize_latents
from avdiff.models.codecs.mel import LogMel


class TimeBlock(nn.Module):
    """ConvNeXt block over time, (B, T, D) -> same; it starts close to the identity.

    x + gain * W2 gelu(W1 norm(depthwise(x)))

    Args:
        width: D. expansion: hidden width over D. kernel: taps of the depthwise convolution, odd.
    """

    def __init__(self, width: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * expansion)
        self.down = nn.Linear(width * expansion, width)
        self.gain = nn.Parameter(torch.full((width,), 0.2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x.transpose(1, 2)).transpose(1, 2))
        return x + self.gain * self.down(F.gelu(self.up(y)))


class AVAudioVAE(ModelMixin, ConfigMixin, AutoencoderMixin):
    """Audio autoencoder with its mel front end.

    Args:
        sample_rate: Hz. mel_hop_length: samples per mel frame. mel_fft: window of the mel front
            end. mel_bins: bands.
        audio_channels: 1 mono, 2 stereo (the channels of a frame are coded together).
        temporal_compression_ratio: mel frames per token. latent_channels: values per token.
        width: channels at token rate. expansion: hidden width of a block over its width. kernel:
            taps over tokens.
        encoder_layers, decoder_layers: blocks at token rate. fine_width, fine_layers: the decoder's
            blocks at mel rate.

    `latents_mean` and `latents_std` (latent_channels,) describe the encoder's output on the
    training data; callers that want unit variance use (z - mean) / std.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 24000,
        mel_hop_length: int = 240,
        mel_fft: int = 960,
        mel_bins: int = 100,
        audio_channels: int = 1,
        temporal_compression_ratio: int = 4,
        latent_channels: int = 48,
        width: int = 256,
        expansion: int = 3,
        kernel: int = 5,
        encoder_layers: int = 2,
        decoder_layers: int = 3,
        fine_width: int = 128,
        fine_layers: int = 2,
    ) -> None:
        super().__init__()
        ratio = temporal_compression_ratio
        folded = audio_channels * mel_bins
        self.mel_frontend = LogMel(sample_rate, mel_fft, mel_hop_length, mel_bins)
        self.encoder_in = nn.Linear(ratio * folded, width)
        self.encoder_blocks = nn.ModuleList(
            TimeBlock(width, expansion, kernel) for _ in range(encoder_layers)
        )
        self.encoder_out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * latent_channels))
        self.decoder_in = nn.Linear(latent_channels, width)
        self.decoder_blocks = nn.ModuleList(
            TimeBlock(width, expansion, kernel) for _ in range(decoder_layers)
        )
        self.unfold = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ratio * fine_width))
        self.fine_blocks = nn.ModuleList(TimeBlock(fine_width, 2, 7) for _ in range(fine_layers))
        self.decoder_out = nn.Sequential(nn.LayerNorm(fine_width), nn.Linear(fine_width, folded))
        self.register_buffer("latents_mean", torch.zeros(latent_channels))
        self.register_buffer("latents_std", torch.ones(latent_channels))

    @property
    def samples_per_token(self) -> int:
        """Audio samples that one token stands for."""
        return self.config.mel_hop_length * self.config.temporal_compression_ratio

    @property
    def receptive_tokens(self) -> int:
        """Neighbours to either side of a token that can change what decodes in its place (encoder
        plus decoder).
        """
        layers = self.config.encoder_layers + self.config.decoder_layers
        fine = -(-3 * self.config.fine_layers // self.config.temporal_compression_ratio)
        return layers * (self.config.kernel // 2) + fine

    @apply_forward_hook
    def mel(self, waveform: Tensor) -> Tensor:
        """Waveform (B, C, S) in [-1, 1] -> normalized log-mel (B, C, T, mel_bins), T = 4 * ceil(S /
        960).

        The end is filled with silence up to a whole token (at least two, which the window of the
        front end needs).

        Raises:
            ValueError: not three dimensions, no samples, or another number of channels than the
                config's.
        """
        if (
            waveform.ndim != 3
            or waveform.shape[1] != self.config.audio_channels
            or not waveform.shape[2]
        ):
            raise ValueError(
                f"waveform has shape {tuple(waveform.shape)}: needs (batch, "
                f"{self.config.audio_channels}, samples)"
            )
        step = self.samples_per_token
        tokens = max(2, -(-waveform.shape[2] // step))
        return self.mel_frontend(F.pad(waveform, (0, tokens * step - waveform.shape[2])))

    @apply_forward_hook
    def encode(
        self, mel: Tensor, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Log-mel (B, C, T, mel_bins), T a multiple of 4 -> distribution over latents (B,
        latent_channels, T / 4, 1).

        Raises:
            ValueError: T is not a multiple of the compression ratio, or other channels or bins than
                the config's.
        """
        ratio = self.config.temporal_compression_ratio
        if (
            mel.ndim != 4
            or mel.shape[1] != self.config.audio_channels
            or mel.shape[3] != self.config.mel_bins
        ):
            raise ValueError(
                f"mel has shape {tuple(mel.shape)}: needs (batch, {self.config.audio_channels}, "
                "frames, "
                f"{self.config.mel_bins})"
            )
        if not mel.shape[2] or mel.shape[2] % ratio:
            raise ValueError(f"mel has {mel.shape[2]} frames: needs a multiple of {ratio}")
        x = self.encoder_in(
            rearrange(mel, "b c (l r) m -> b l (r c m)", r=ratio).to(self.dtype)
        )  # (B, L, D)
        for block in self.encoder_blocks:
            x = block(x)
        moments = self.encoder_out(x).float()  # (B, L, 2 * latent)
        posterior = DiagonalGaussianDistribution(rearrange(moments, "b l c -> b c l 1"))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Latents (B, latent_channels, L, 1), not normalized -> log-mel (B, C, 4 L, mel_bins)."""
        x = self.decoder_in(rearrange(z, "b c l 1 -> b l c").to(self.dtype))  # (B, L, D)
        for block in self.decoder_blocks:
            x = block(x)
        x = rearrange(
            self.unfold(x), "b l (r d) -> b (l r) d", r=self.config.temporal_compression_ratio
        )
        for block in self.fine_blocks:
            x = block(x)
        mel = rearrange(self.decoder_out(x).float(), "b t (c m) -> b c t m", m=self.config.mel_bins)
        return DecoderOutput(sample=mel) if return_dict else (mel,)

    def forward(
        self,
        sample: Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> DecoderOutput | tuple[Tensor]:
        """Round trip of a log-mel: encode, take the mode (or a sample) of the posterior, decode."""
        posterior = self.encode(sample).latent_dist
        z = posterior.sample(generator=generator) if sample_posterior else posterior.mode()
        return self.decode(z, return_dict=return_dict)

    def normalize(self, z: Tensor) -> Tensor:
        """Latents (B, latent_channels, L, 1) -> about zero mean and unit variance per channel."""
        return normalize_latents(z, self)

    def denormalise(self, z: Tensor) -> Tensor:
        """Inverse of `normalize`."""
        return denormalize_latents(z, self)
