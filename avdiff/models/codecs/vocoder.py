"""AVVocoder: log-mel -> 24 kHz waveform, one small network a frame and one inverse FFT.

A network that must invent phases needs long adversarial training. Here the phases come from a
source: a pulse train that follows the pitch read off the mel, and white noise. The network shapes
    both with complex filters, frame by frame
in the STFT domain, and adds a free complex spectrum for what is neither (clicks, strokes):

    S = H_pulse * STFT(pulses) + H_noise * STFT(noise) + S_free
    A^2 = |H_pulse * STFT(pulses)|^2 + A_rest^2

S is a good start but its noise is not the noise that was heard. The mel tells magnitudes rather
well, so a few iterations of fast Griffin-Lim (Perraudin et al. 2013) pull S towards the magnitudes
A, trained through two of them. Harmonic-plus-noise filtering as in the neural homomorphic vocoder
(Liu et al., Interspeech 2020) and DDSP (Engel et al. 2020, arXiv:2001.04643); ConvNeXt trunk and
iSTFT head of Vocos (Siuzdak 2023, arXiv:2306.00814).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.normalization import FP32LayerNorm
from einops import rearrange
from torch import Tensor, nn

from avdiff.models.codecs.audio_vae import TimeBlock
from avdiff.models.codecs.mel import LogMel
from avdiff.models.codecs.pitch import BINS, bin_hertz, smooth_path

LOUDEST = 6.0  # filters may lie this far (nepers) above the envelope that the mel gives
FITS = 6  # updates that fit the envelope to the mel


class Pitch(NamedTuple):
    """Pitch per frame, (N, T) each: `phase` of the fundamental at frame centres in radians
    (float64, unwrapped), `hertz`, and `voiced` (0 to 1).
    """

    phase: Tensor
    hertz: Tensor
    voiced: Tensor


class PitchReader(nn.Module):
    """Reads pitch off the mel: (N, T, M) -> logits over `BINS` log-spaced pitches (N, T, BINS) and
    voicing (N, T).
    """

    def __init__(self, mel_bins: int, width: int, layers: int) -> None:
        super().__init__()
        self.enter = nn.Linear(mel_bins, width)
        self.blocks = nn.ModuleList(TimeBlock(width, 2, 7) for _ in range(layers))
        self.leave = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, BINS + 1))

    def forward(self, mel: Tensor) -> tuple[Tensor, Tensor]:
        x = self.enter(mel)
        for block in self.blocks:
            x = block(x)
        y = self.leave(x).float()
        return y[..., :BINS], y[..., BINS]


class AVVocoder(ModelMixin, ConfigMixin):
    """Waveform from a normalized log-mel of `avdiff.models.codecs.mel.LogMel`.

    Args:
        sampling_rate: Hz. hop_length: samples per mel frame. n_fft: window of mel and synthesis,
            four hops.
        mel_bins: bands.
        width, layers, expansion, kernel: the trunk's ConvNeXt blocks. pitch_width, pitch_layers:
            the pitch reader's.
        refine_steps: Griffin-Lim iterations, about 2 ms per second of sound each; 0 takes S as it
            is.
    """

    # Half precision is audible in phases. Of the weights only the norm of the heads takes the
    # model's dtype, and it computes in fp32 all the same: so a vocoder loaded in half precision
    # says that it has this
    # dtype.
    _keep_in_fp32_modules: ClassVar[list[str]] = [
        "frames",
        "pitch",
        "enter",
        "blocks",
        "1",
    ]  # "1": linear, in heads

    @register_to_config
    def __init__(
        self,
        sampling_rate: int = 24000,
        hop_length: int = 240,
        n_fft: int = 960,
        mel_bins: int = 100,
        width: int = 256,
        layers: int = 5,
        expansion: int = 3,
        kernel: int = 7,
        pitch_width: int = 128,
        pitch_layers: int = 3,
        refine_steps: int = 8,
    ) -> None:
        super().__init__()
        if n_fft != 4 * hop_length:
            raise ValueError(f"n_fft={n_fft}: needs four times hop_length={hop_length}")
        self.frames = LogMel(sampling_rate, n_fft, hop_length, mel_bins)
        self.pitch = PitchReader(mel_bins, pitch_width, pitch_layers)
        self.enter = nn.Linear(mel_bins + 2, width)
        self.blocks = nn.ModuleList(TimeBlock(width, expansion, kernel) for _ in range(layers))
        shapes = nn.Linear(width, 6 * (n_fft // 2 + 1))
        self.heads = nn.Sequential(FP32LayerNorm(width), shapes)
        bias = shapes.bias.detach().view(6, -1)
        bias.zero_()
        bias[0], bias[2], bias[3] = (
            -0.5,
            -1.0,
            -4.0,
        )  # pulses and noise share the envelope, the free part starts faint
        bias[5] = -0.2
        shapes.weight.detach().mul_(0.3)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AVVocoder:
        """A `pipe.to(dtype)` leaves in fp32 what `from_pretrained(dtype=...)` does."""
        kept = {
            id(p)
            for name, p in self.named_parameters()
            if {*name.split(".")} & {*self._keep_in_fp32_modules}
        }

        def keep(x: Tensor) -> Tensor:
            moved = fn(x)
            return (
                x.to(moved.device)
                if id(x) in kept and moved.element_size() < x.element_size()
                else moved
            )

        return super()._apply(keep, recurse)

    def forward(self, mel: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Normalised log-mel (B, C, T, mel_bins) -> waveform (B, C, T * hop_length), about [-1, 1].

        The noise in it comes from `generator`; None takes the same noise each time.

        Raises:
            ValueError: not four dimensions, other bins than the config's, or fewer than four
                frames.
        """
        if mel.ndim != 4 or mel.shape[3] != self.config.mel_bins or mel.shape[2] < 4:
            raise ValueError(
                f"mel has shape {tuple(mel.shape)}: needs (batch, channels, at least 4 frames, "
                f"{self.config.mel_bins})"
            )
        flat = rearrange(mel, "b c t m -> (b c) t m").float()
        start, magnitude = self.predict(flat, self.read_pitch(flat), generator)
        wave = self.overlap_add(self.refine(start, magnitude, self.config.refine_steps))
        return rearrange(wave, "(b c) s -> b c s", b=mel.shape[0])

    def read_pitch(self, mel: Tensor) -> Pitch:
        """(N, T, M) -> the pitch that the mel shows, its phase started at zero and summed up."""
        logits, voicing = self.pitch(mel)
        voiced = voicing.sigmoid()
        chance = logits.log_softmax(dim=-1)
        path = smooth_path(chance * (0.05 + voiced[..., None]), reach=6, glide=6.0)  # (N, T)
        near = (path[..., None] + torch.arange(-3, 4, device=path.device)).clamp(0, BINS - 1)
        weight = chance.gather(-1, near).softmax(dim=-1)
        hertz = bin_hertz((weight * near).sum(dim=-1))
        step = (hertz + F.pad(hertz, (1, 0), mode="replicate")[:, :-1]).double() / 2
        phase = torch.cumsum(step, dim=1) * (
            2 * math.pi * self.config.hop_length / self.config.sampling_rate
        )
        return Pitch(phase, hertz, voiced)

    def predict(
        self, mel: Tensor, pitch: Pitch, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-mel (N, T, M) and its pitch -> S, complex, and A, both (N, T, n_fft / 2 + 1)."""
        pulses = self.spectrum(self.pulse_train(pitch))  # (N, T, bins) complex
        noise = self.spectrum(self.white(mel, generator))  # (N or 1, T, bins)
        features = torch.cat(
            [mel, (pitch.hertz / 150).log2()[..., None], pitch.voiced[..., None]], dim=-1
        )
        x = self.enter(features.float())
        for block in self.blocks:
            x = block(x)
        shape = self.heads(x).float().unflatten(-1, (6, -1)).unbind(dim=-2)  # six of (N, T, bins)
        smooth = (self.frames.envelope(mel) + 1e-6).log()
        envelope = (self.frames.envelope(mel, FITS) + 1e-6).log()
        voice = torch.polar((smooth + shape[0].clamp(max=LOUDEST)).exp(), shape[1]) * pulses
        h_noise = (envelope + shape[2].clamp(max=LOUDEST)).exp()
        free = torch.polar((envelope + shape[3].clamp(max=LOUDEST)).exp(), shape[4])
        rest = (2 * (envelope + shape[5].clamp(max=LOUDEST))).exp()
        magnitude = (voice.real.square() + voice.imag.square() + rest).sqrt()
        return voice + h_noise * noise + free, magnitude

    def refine(
        self, start: Tensor, magnitude: Tensor, steps: int, momentum: float = 0.99
    ) -> Tensor:
        """`steps` of fast Griffin-Lim from the phases of `start`: (N, T, bins) complex -> same,
        with `magnitude`.
        """
        if not steps:
            return start
        current = magnitude * _unit(start)
        before = None
        for _ in range(steps):
            consistent = self.spectrum(self.overlap_add(current))
            moved = consistent if before is None else consistent + momentum * (consistent - before)
            current = magnitude * _unit(moved)
            before = consistent
        return current

    def pulse_train(self, pitch: Pitch) -> Tensor:
        """Band-limited pulses (N, T * hop): every harmonic with amplitude sqrt(hertz / 150), phase
        k * fundamental.

        sum_{k=1..K} cos(k p) = (sin((K + 1/2) p) / sin(p / 2) - 1) / 2
        """
        hop = self.config.hop_length
        rate = self.config.sampling_rate
        phase = F.interpolate(_extend(pitch.phase), scale_factor=float(hop), mode="linear")[
            :, 0, hop:-hop
        ]
        hertz = F.interpolate(pitch.hertz[:, None], scale_factor=float(hop), mode="linear")[:, 0]
        wrapped = (
            torch.remainder(phase + math.pi, 2 * math.pi) - math.pi
        )  # float64 until here: sums grow long
        count = torch.floor(0.48 * rate / hertz).double()
        half = torch.sin(wrapped / 2)
        safe = torch.where(half.abs() < 1e-6, 1e-6, half)
        ratio = torch.where(
            half.abs() < 1e-6, 2 * count + 1, torch.sin((count + 0.5) * wrapped) / safe
        )
        return ((ratio - 1) / 2).float() * (hertz / 150).sqrt()

    def white(self, mel: Tensor, generator: torch.Generator | None) -> Tensor:
        """White noise (N, T * hop) whose STFT has mean square 1."""
        rows = (
            mel.shape[0] if generator is not None else 1
        )  # the same noise for every row: a batch equals its singles
        generator = generator or torch.Generator().manual_seed(0)
        shape = (rows, mel.shape[1] * self.config.hop_length)
        noise = torch.randn(shape, generator=generator, device=generator.device).to(mel.device)
        return noise * (
            self.config.n_fft / 4 / math.sqrt(0.375 * self.config.n_fft)
        )  # 3/8 = mean square of Hann

    def spectrum(self, wave: Tensor) -> Tensor:
        """Waveform (N, T * hop) -> complex STFT (N, T, n_fft / 2 + 1), frames and scale as in the
        mel front end.
        """
        size = self.config.n_fft
        hop = self.config.hop_length
        side = (size - hop) // 2
        frames = F.pad(wave[:, None], (side, side), mode="reflect")[:, 0].unfold(1, size, hop)
        return torch.fft.rfft(frames * self.frames.window.to(wave.device)) * (4.0 / size)

    def overlap_add(self, spectrum: Tensor) -> Tensor:
        """Least-squares inverse of `spectrum`: (N, T, n_fft / 2 + 1) complex -> (N, T * hop)."""
        size = self.config.n_fft
        hop = self.config.hop_length
        window = self.frames.window.to(spectrum.device)
        frames = torch.fft.irfft(spectrum * (size / 4.0), size) * window  # (N, T, n_fft)
        weight = window.square().expand(1, spectrum.shape[1], -1)
        side = (size - hop) // 2
        return (_add(frames, hop) / _add(weight, hop).clamp_min(1e-3))[:, side:-side]


def _unit(spectrum: Tensor) -> Tensor:
    """Phases alone, with a bounded slope where there is next to nothing."""
    return spectrum * (spectrum.real.square() + spectrum.imag.square() + 1e-10).rsqrt()


def _add(frames: Tensor, hop: int) -> Tensor:
    """(N, T, 4 hop) overlapping by three quarters -> (N, (T + 3) hop)."""
    parts = frames.unflatten(2, (4, hop))  # (N, T, 4, hop)
    total = F.pad(parts[:, :, 0], (0, 0, 0, 3))
    for k in range(1, 4):
        total = total + F.pad(parts[:, :, k], (0, 0, k, 3 - k))
    return total.flatten(1)


def _extend(phase: Tensor) -> Tensor:
    """(N, T) -> (N, 1, T + 2): one frame more on both sides at the pitch of the ends."""
    first = 2 * phase[:, :1] - phase[:, 1:2]
    last = 2 * phase[:, -1:] - phase[:, -2:-1]
    return torch.cat([first, phase, last], dim=1)[:, None]
