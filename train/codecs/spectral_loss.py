"""Spectral losses for training a vocoder; every term comes back per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class SpectralLoss(nn.Module):
    """Multi-resolution STFT loss with a phase-aware term at low frequencies.

    Per size: |log X - log Y| and spectral convergence ||X - Y|| / ||Y|| (Yamamoto et al. 2020,
    arXiv:1910.11480). Windows shorter than a pitch period see the shape of single pulses, and so
    fix the phases of harmonics to each other. The complex term compares X and Y themselves below
    `aligned_below` Hz: it makes sense only when the source runs in phase with the target.

    Args:
        sizes: window lengths; the hop is a quarter. aligned_size: window of the complex term, one
            of `sizes`, or 0 for none. aligned_below: Hz. sample_rate: Hz. floor: magnitude that
            counts as silence (a full-scale sine is 1).
    """

    def __init__(
        self,
        sizes: Sequence[int],
        aligned_size: int = 0,
        aligned_below: float = 1500.0,
        sample_rate: int = 24000,
        floor: float = 5e-5,
    ) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.aligned_size = aligned_size
        self.floor = floor
        self.aligned_bins = int(aligned_below / sample_rate * aligned_size)

    def spectrum(self, wave: Tensor, size: int) -> Tensor:
        """(B, S) -> complex (B, bins, frames); a full-scale sine reads 1."""
        window = torch.hann_window(size, device=wave.device)
        return torch.stft(wave, size, size // 4, window=window, return_complex=True) * (4.0 / size)

    def forward(self, wave: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Two waveforms (B, S) -> "log", "convergence" and, if asked for, "aligned", each (B,)."""
        parts = {"log": wave.new_zeros(len(wave)), "convergence": wave.new_zeros(len(wave))}
        for size in self.sizes:
            x = self.spectrum(wave, size)
            y = self.spectrum(target, size)
            mag_x = (x.real.square() + x.imag.square() + 1e-14).sqrt()
            mag_y = y.abs()
            log = ((mag_x + self.floor).log() - (mag_y + self.floor).log()).abs().mean(dim=(1, 2))
            loud = mag_y.square().sum(dim=(1, 2)).sqrt()
            off = (mag_x - mag_y).square().sum(dim=(1, 2)).add(1e-9).sqrt() / (loud + 0.5)
            parts["log"] = parts["log"] + log / len(self.sizes)
            parts["convergence"] = parts["convergence"] + off / len(self.sizes)
            if size == self.aligned_size:
                gap = (x - y)[:, 1 : self.aligned_bins]
                gap = (gap.real.square() + gap.imag.square() + 1e-10).sqrt().mean(dim=(1, 2))
                parts["aligned"] = gap / (mag_y[:, 1 : self.aligned_bins].mean(dim=(1, 2)) + 1e-3)
        return parts
