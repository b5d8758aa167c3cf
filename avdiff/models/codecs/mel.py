"""The mel front end that the audio VAE and the vocoder share: waveform -> normalized log-mel, one
frame per hop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.functional import melscale_fbanks

# -90 dB below a full-scale sine: room noise of the corpus stays visible, digital silence is bounded
LOG_FLOOR = 3e-5
LOG_MEAN, LOG_STD = (
    -6.8,
    2.2,
)  # over the training split of the speech bank; close to zero mean and unit variance


@contextmanager
def _default_fp32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class LogMel(nn.Module):
    """Normalised log-mel spectrogram of Hann-windowed magnitudes.

    Frame i is centred on sample (i + 1/2) * hop, so S samples give exactly S / hop frames and
    frames belong to the samples they stand for; the ends are padded by reflection. The bands are
    Slaney's (linear below 1 kHz), 34 Hz apart at the bottom, where the harmonics of a voice must
    stay apart.

    Args:
        sample_rate: Hz. n_fft: window and transform length. hop_length: samples from frame to
            frame. n_mels: bands from 0 Hz to half the sample rate.
    """

    bank: Tensor
    window: Tensor
    spread: Tensor

    def __init__(
        self, sample_rate: int = 24000, n_fft: int = 960, hop_length: int = 240, n_mels: int = 100
    ) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.hop_length = hop_length
        with _default_fp32():  # `from_pretrained(dtype=...)` changes the default while it builds
            bank = melscale_fbanks(
                n_fft // 2 + 1,
                0.0,
                sample_rate / 2,
                n_mels,
                sample_rate,
                norm=None,
                mel_scale="slaney",
            )
            window = torch.hann_window(n_fft)
        self.register_buffer("bank", bank, persistent=False)  # (n_fft / 2 + 1, n_mels)
        self.register_buffer("window", window, persistent=False)
        spread = bank / bank.sum(dim=0) / bank.sum(dim=1, keepdim=True).clamp_min(1e-6)
        self.register_buffer(
            "spread", spread.T.contiguous(), persistent=False
        )  # (n_mels, n_fft / 2 + 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LogMel:
        """Follow the model to another device, but stay in fp32: 90 dB do not fit a half-precision
        filter bank.
        """
        kept = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self

    def magnitude(self, waveform: Tensor) -> Tensor:
        """(..., S) in [-1, 1], S a multiple of the hop -> (..., S / hop, n_fft / 2 + 1); a
        full-scale sine reads 1.
        """
        if waveform.shape[-1] % self.hop_length or waveform.shape[-1] < self.n_fft:
            raise ValueError(
                f"waveform has {waveform.shape[-1]} samples: needs a multiple of "
                f"{self.hop_length}, "
                f"at least {self.n_fft}"
            )
        flat = waveform.float().reshape(-1, waveform.shape[-1])
        side = (self.n_fft - self.hop_length) // 2
        padded = F.pad(flat[:, None], (side, side), mode="reflect")[:, 0]
        spectrum = torch.stft(
            padded,
            self.n_fft,
            self.hop_length,
            window=self.window,
            center=False,
            return_complex=True,
        ).abs()  # (N, bins, T)
        scaled = spectrum.transpose(1, 2) * (4.0 / self.n_fft)
        return scaled.reshape(*waveform.shape[:-1], -1, self.n_fft // 2 + 1)

    def forward(self, waveform: Tensor) -> Tensor:
        """(..., S) in [-1, 1] -> (..., S / hop, n_mels), about zero mean and unit variance on
        speech.
        """
        with torch.autocast(
            waveform.device.type, enabled=False
        ):  # a level in bf16 is known to 0.4 % only
            return self.normalize(self.magnitude(waveform) @ self.bank)

    def envelope(self, log_mel: Tensor, iterations: int = 0) -> Tensor:
        """Normalised log-mel (..., n_mels) -> a magnitude spectrum that it may stand for (...,
        n_fft / 2 + 1).

        Without iterations it is the smooth one; each iteration (non-negative least squares by
        multiplicative updates, Lee and Seung 2001) makes its mel agree better with the one given.
        """
        with torch.autocast(log_mel.device.type, enabled=False):
            target = self.amplitude(log_mel)
            bank, spread = (
                self.bank.to(target.device),
                self.spread.to(target.device),
            )  # else only `forward` moves them
            magnitude = target @ spread + 1e-8
            for _ in range(iterations):
                magnitude = (
                    magnitude * (target @ bank.T + 1e-9) / (magnitude @ bank @ bank.T + 1e-9)
                )
            return magnitude

    @staticmethod
    def normalize(mel: Tensor) -> Tensor:
        """Mel magnitudes -> normalized log-mel."""
        return ((mel + LOG_FLOOR).log() - LOG_MEAN) / LOG_STD

    @staticmethod
    def amplitude(log_mel: Tensor) -> Tensor:
        """Inverse of `normalize`: normalized log-mel -> mel magnitudes, at least 0."""
        return ((log_mel.float() * LOG_STD + LOG_MEAN).exp() - LOG_FLOOR).clamp_min(0.0)
