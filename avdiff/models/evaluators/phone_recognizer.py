"""PhoneRecognizer: waveform -> log-mel -> which phone is heard, 50 times a second, in eight
languages at once.

One head serves two losses. It is trained on the phone of every frame, with silence as CTC's blank,
so its phones last as long as they sound and their times can be read off; and by CTC (Graves et al.
2006) on the whole row of phones, so that it does not flicker. Most work is done at 25 Hz by
ConvNeXt blocks over time; one block at 50 Hz on either side keeps short phones apart (a U-Net of
two levels, as in Squeezeformer, arXiv:2206.00888).

Shape legend: B clips, S samples, T frames at 50 Hz, M mel bands, D width, P phones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avdiff.models.codecs.mel import LogMel


class SpeechBlock(nn.Module):
    """ConvNeXt block over time, (B, T, D) -> same; it starts close to the identity.

    x + gain * W2 gelu(W1 norm(depthwise(x)))

    The depthwise convolution runs as a 2-D one of height 1, which the CPU does in two thirds of the
    time.

    Args:
        width: D. expansion: hidden width over D. kernel: taps, odd. dropout: share of the branch's
            inputs dropped (there, because random numbers are dear on a CPU and the hidden layer is
            wide).
    """

    def __init__(self, width: int, expansion: int, kernel: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            width, width, (1, kernel), padding=(0, kernel // 2), groups=width
        )
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, width * expansion)
        self.down = nn.Linear(width * expansion, width)
        self.gain = nn.Parameter(torch.full((width,), 0.2))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(rearrange(x, "b t d -> b d 1 t"))
        y = F.dropout(self.norm(rearrange(y, "b d 1 t -> b t d")), self.dropout, self.training)
        return x + self.gain * self.down(F.gelu(self.up(y)))


class PhoneRecognizer(ModelMixin, ConfigMixin):
    """Phone posteriors of any speech.

    Args:
        phones: symbols; the place is the class, class 0 is silence and CTC's blank.
        sample_rate: Hz. mel_hop_length: samples a mel frame. mel_bins: bands.
        width, expansion, kernel: of the blocks. layers: blocks at 25 Hz. dropout: in training.
    """

    @register_to_config
    def __init__(
        self,
        phones: Sequence[str] = ("sil", "a"),
        sample_rate: int = 24000,
        mel_hop_length: int = 240,
        mel_bins: int = 100,
        width: int = 256,
        expansion: int = 3,
        kernel: int = 9,
        layers: int = 5,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.mel_frontend = LogMel(sample_rate, 4 * mel_hop_length, mel_hop_length, mel_bins)
        self.stem = nn.Linear(2 * mel_bins, width)
        self.fine_in = SpeechBlock(width, expansion, kernel, dropout)
        self.fold = nn.Linear(2 * width, width)
        self.blocks = nn.ModuleList(
            SpeechBlock(width, expansion, kernel, dropout) for _ in range(layers)
        )
        self.unfold = nn.Linear(width, 2 * width)
        self.fine_out = SpeechBlock(width, expansion, kernel, dropout)
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(phones)))

    @property
    def samples_per_frame(self) -> int:
        """Audio samples that one frame of the output stands for (20 ms)."""
        return 2 * self.config.mel_hop_length

    @property
    def frame_rate(self) -> float:
        """Frames of the output a second."""
        return self.config.sample_rate / self.samples_per_frame

    def mel(self, waveform: Tensor) -> Tensor:
        """Waveform (B, S) in [-1, 1] -> normalized log-mel (B, 4 n, M): filled with silence up to
        whole 40 ms.

        Raises:
            ValueError: not two dimensions, or no samples.
        """
        if waveform.ndim != 2 or not waveform.shape[1]:
            raise ValueError(f"waveform has shape {tuple(waveform.shape)}: needs (batch, samples)")
        step = 2 * self.samples_per_frame
        whole = step * max(2, -(-waveform.shape[1] // step))
        return self.mel_frontend(F.pad(waveform, (0, whole - waveform.shape[1])))

    def forward(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 2 T, M), T even -> log probabilities of the phones (B, T, P), fp32; frame i
        covers i/50 s on.

        Raises:
            ValueError: a number of mel frames that is no multiple of 4, or other bands than the
                config's.
        """
        if mel.ndim != 3 or mel.shape[1] % 4 or mel.shape[2] != self.config.mel_bins:
            raise ValueError(
                f"mel has shape {tuple(mel.shape)}: needs (batch, a multiple of 4 frames, "
                f"{self.config.mel_bins})"
            )
        fine = self.fine_in(self.stem(rearrange(mel, "b (t r) m -> b t (r m)", r=2)))  # (B, T, D)
        x = self.fold(rearrange(fine, "b (t r) d -> b t (r d)", r=2))  # (B, T/2, D)
        for block in self.blocks:
            x = block(x)
        x = fine + rearrange(self.unfold(x), "b t (r d) -> b (t r) d", r=2)
        return self.head(self.fine_out(x)).float().log_softmax(dim=-1)

    @torch.no_grad()
    def listen(self, waveform: Tensor) -> Tensor:
        """Waveform (S,) in [-1, 1] -> log probabilities (T, P), T = ceil(S / 480): frames that
        begin within it.
        """
        frames = -(-waveform.shape[-1] // self.samples_per_frame)
        return self(self.mel(waveform[None]))[0, :frames]
