"""Pitch and the phase of the fundamental, which the vocoder's training needs: where in its cycle a
voice is.

Autocorrelation with the window's own divided out (Boersma 1993, "Accurate short-term analysis..."),
a smooth path through it by dynamic programming, then the phase of the first harmonic by
demodulation with that path. Frames are those of `avdiff.models.codecs.mel.LogMel`: frame i is
centred on sample (i + 1/2) * hop.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.models.codecs.pitch import BINS, BINS_PER_OCTAVE, bin_hertz, smooth_path

WINDOW, LONGEST_LAG, BAND = (
    1200,
    448,
    1600.0,
)  # samples, samples, Hz: three periods of 60 Hz; harmonics that matter
# bins a frame, cost per octave and frame, bonus per octave
REACH = 6
GLIDE = 1.2
HIGHER = 0.03
EVERY = 48  # utterances tracked together


class PitchTrack(NamedTuple):
    """Per frame (T,): `phase` of the fundamental, radians, unwrapped; `hertz`, > 0 everywhere;
    `voiced`, 0 to 1.
    """

    phase: np.ndarray
    hertz: np.ndarray
    voiced: np.ndarray


def periodicity(sound: Tensor, hop: int, rate: int = 24000) -> tuple[Tensor, Tensor]:
    """Sound (B, S) -> normalized autocorrelation on the grid (B, T, BINS) and loudness (B, T) in
    dB, T = S / hop.
    """
    side = (WINDOW - hop) // 2
    window = torch.hann_window(WINDOW)
    frames = F.pad(sound, (side, WINDOW - hop - side)).unfold(1, WINDOW, hop) * window  # (B, T, W)
    size = 2048
    band = (torch.fft.rfftfreq(size, 1 / rate) < BAND).float()
    own = torch.fft.irfft(torch.fft.rfft(window, size).abs().square())[:LONGEST_LAG]
    auto = torch.fft.irfft(torch.fft.rfft(frames, size).abs().square() * band)[..., :LONGEST_LAG]
    energy = auto[..., :1]
    auto = auto / (energy + 1e-6) * (own[0] / own)
    lags = rate / bin_hertz(torch.arange(BINS))
    low = lags.long()
    part = lags - low
    return torch.lerp(auto[..., low], auto[..., low + 1], part), 10 * torch.log10(
        energy[..., 0] / WINDOW + 1e-10
    )


def fundamental_phase(
    sound: Tensor, hertz: Tensor, hop: int, rate: int = 24000
) -> tuple[Tensor, Tensor]:
    """Demodulate (B, S) by pitch (B, T): phase of the carrier at frame centres and the residual
    phasor, (B, T) each.
    """
    at_samples = F.interpolate(hertz[:, None].double(), scale_factor=float(hop), mode="linear")[
        :, 0
    ]  # (B, S)
    carrier = torch.cumsum(at_samples, dim=1) * (2 * math.pi / rate)
    beat = sound * torch.polar(torch.ones_like(carrier), -(carrier % (2 * math.pi))).to(
        torch.complex64
    )
    side = (4 * hop - hop) // 2
    window = torch.hann_window(4 * hop)
    padded = F.pad(
        torch.view_as_real(beat).permute(2, 0, 1), (side, 3 * hop - side)
    )  # (2, B, S + 3 hop)
    real, imaginary = (padded.unfold(2, 4 * hop, hop) * window).sum(dim=3)
    middle = (carrier[:, hop // 2 - 1 :: hop] + carrier[:, hop // 2 :: hop]) / 2
    return middle, torch.complex(real, imaginary)


def track(sounds: list[np.ndarray], hop: int = 240, rate: int = 24000) -> list[PitchTrack]:
    """Pitch tracks of sounds (S,) in [-1, 1]; each has ceil(S / hop) frames."""
    frames = [-(-len(sound) // hop) for sound in sounds]
    batch = torch.from_numpy(
        np.stack([np.pad(s, (0, max(frames) * hop - len(s))) for s in sounds]).astype(np.float32)
    )
    score, loudness = periodicity(batch, hop, rate)
    audible = torch.sigmoid((loudness + 52) / 3)  # half at 52 dB below full scale
    bonus = HIGHER / BINS_PER_OCTAVE * torch.arange(BINS)
    bins = smooth_path((score + bonus) * audible[..., None], REACH, GLIDE)
    hertz = bin_hertz(bins)
    strength = score.gather(2, bins[..., None])[..., 0] * audible
    carrier, phasor = fundamental_phase(batch, hertz, hop, rate)
    tracks = []
    for row, count in enumerate(frames):
        voiced = torch.sigmoid((strength[row, :count] - 0.55) / 0.05).numpy()
        tracks.append(
            _join(carrier[row, :count].numpy(), phasor[row, :count].numpy(), voiced, hop, rate)
        )
    return tracks


def _join(
    carrier: np.ndarray, phasor: np.ndarray, voiced: np.ndarray, hop: int, rate: int
) -> PitchTrack:
    """Add the residual phase where a voice is heard, and go straight from one voiced stretch to the
    next.
    """
    heard = np.flatnonzero(voiced > 0.5)
    phase = carrier.copy()
    if len(heard):
        residual = np.unwrap(np.angle(phasor[heard]).astype(np.float64))
        phase += np.interp(np.arange(len(carrier)), heard, residual)
    hertz = (
        np.gradient(phase) * (rate / hop / (2 * math.pi))
        if len(phase) > 1
        else np.full(len(phase), 100.0)
    )
    hertz = np.clip(hertz, 40.0, 600.0).astype(np.float32)
    return PitchTrack(phase.astype(np.float64), hertz, voiced.astype(np.float32))


class PitchBank:
    """Pitch tracks of every utterance of a speech bank, computed once and kept beside its decoded
    copy.

    Args:
        bank: the utterances. cache_dir: folder for the tracks; default ~/.cache/avdiff/bank.
    """

    def __init__(self, bank: SpeechCorpus, cache_dir: str | os.PathLike[str] | None = None) -> None:
        folder = Path(cache_dir or Path.home() / ".cache" / "avdiff" / "bank")
        path = folder / f"{bank.fingerprint}.pitch.npz"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            whole = SpeechCorpus(bank.root, decoded=True, cache_dir=folder)
            _write(path, whole)
        with np.load(path, allow_pickle=False) as stored:
            self._starts = {
                str(key): (int(a), int(b))
                for key, a, b in zip(
                    stored["ids"], stored["starts"][:-1], stored["starts"][1:], strict=True
                )
            }
            self._phase = stored["phase"]
            self._hertz = stored["hertz"]
            self._voiced = stored["voiced"]

    def __getitem__(self, utterance_id: str) -> PitchTrack:
        first, last = self._starts[utterance_id]
        return PitchTrack(
            self._phase[first:last],
            self._hertz[first:last],
            self._voiced[first:last].astype(np.float32),
        )


def _write(path: Path, bank: SpeechCorpus) -> None:
    """Track the whole bank, utterances of like length together (about a minute of one core per hour
    of speech).
    """
    utterances = sorted(bank, key=lambda utterance: utterance.duration)
    tracks: list[PitchTrack] = []
    for first in range(0, len(utterances), EVERY):
        tracks += track([bank.audio(utterance) for utterance in utterances[first : first + EVERY]])
    starts = np.cumsum([0] + [len(one.phase) for one in tracks])
    partial = path.with_name(f".{path.name}.{os.getpid()}.npz")
    np.savez(
        partial,
        ids=np.array([u.id for u in utterances]),
        starts=starts,
        phase=np.concatenate([one.phase for one in tracks]),
        hertz=np.concatenate([one.hertz for one in tracks]),
        voiced=np.concatenate([one.voiced for one in tracks]).astype(np.float16),
    )
    os.replace(partial, path)
