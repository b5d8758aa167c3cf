"""How close a sound is to its original: STOI, PESQ, spectral distance, words recognised, time of
strokes.

STOI and PESQ come from `pystoi` and `pesq`, digits from `pocketsphinx`; all three are optional and
imported on use. `griffin_lim` is the control without a network that a vocoder has to beat.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Sequence
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import resample

from avdiff.models.codecs.mel import LogMel

DIGITS = ("zero", "oh", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_GRAMMAR = "#JSGF V1.0; grammar digits; public <digits> = (" + " | ".join(DIGITS) + ")+ ;"


def optional(name: str, packages: str = "") -> ModuleType:
    """Import an optional package or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = packages or name
        raise ValueError(f"this metric needs {wanted}: pip install {wanted}") from error


def _pair(original: np.ndarray, sound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both (S,), cut to the shorter."""
    if original.ndim != 1 or sound.ndim != 1:
        raise ValueError(
            f"sounds have shapes {original.shape} and {sound.shape}: both need to be (samples,)"
        )
    size = min(len(original), len(sound))
    return original[:size], sound[:size]


def stoi(original: np.ndarray, sound: np.ndarray, rate: int = 24000) -> float:
    """Short-time objective intelligibility (Taal et al. 2011), 0 to 1."""
    first, second = _pair(original, sound)
    return float(optional("pystoi").stoi(first, second, rate, extended=False))


def pesq(original: np.ndarray, sound: np.ndarray, rate: int = 24000) -> float:
    """Wide-band PESQ (ITU-T P.862.2) at 16 kHz, 1 to 4.64; NaN where it finds no speech."""
    package = optional("pesq")
    first, second = (
        resample(torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32)), rate, 16000).numpy()
        for x in _pair(original, sound)
    )
    try:
        return float(package.pesq(16000, first, second, "wb"))
    except package.NoUtterancesError:
        return float("nan")


def spectral_distance(
    original: Tensor, sound: Tensor, sizes: Sequence[int] = (512, 1024, 2048), floor: float = 5e-5
) -> Tensor:
    """Mean |log magnitude ratio| in dB over STFTs of several sizes: (B, S), (B, S) -> (B,).

    Magnitudes are those of a full-scale sine = 1; `floor` (-86 dB) keeps silence from counting.
    """
    total = torch.zeros(original.shape[0])
    for size in sizes:
        window = torch.hann_window(size)
        first, second = (
            torch.stft(x, size, size // 4, window=window, return_complex=True).abs() * (4.0 / size)
            for x in (original, sound)
        )
        total += 20 * ((first + floor) / (second + floor)).log10().abs().mean(dim=(1, 2))
    return total / len(sizes)


def griffin_lim(
    mel: Tensor, frontend: LogMel, iterations: int = 32, momentum: float = 0.99, seed: int = 0
) -> Tensor:
    """Normalised log-mel (N, T, M) -> waveform (N, T * hop) without a network.

    Magnitudes by multiplicative updates for non-negative least squares (Lee and Seung 2001), phases
    by fast Griffin-Lim (Perraudin et al. 2013).
    """
    bank = frontend.bank
    size = frontend.n_fft
    hop = frontend.hop_length
    target = frontend.amplitude(mel)  # (N, T, M)
    magnitude = target @ (bank / bank.sum(dim=0)).T + 1e-8
    for _ in range(60):
        magnitude = magnitude * (target @ bank.T) / (magnitude @ (bank @ bank.T) + 1e-9)
    magnitude = magnitude.transpose(1, 2) * (size / 4.0)  # (N, bins, T)
    side = (size - hop) // 2
    window = frontend.window
    length = (mel.shape[1] - 1) * hop + size
    angle = torch.rand(magnitude.shape, generator=torch.Generator().manual_seed(seed)) * 2 * np.pi
    phase = torch.polar(torch.ones_like(magnitude), angle)
    before = torch.zeros_like(magnitude, dtype=torch.complex64)
    # torch.istft wants centred frames: give it the same frames with half a window of shift at both
    # ends
    for _ in range(iterations):
        rebuilt = _frames(_overlap(magnitude * phase, window, hop, length), window, hop)
        moved = rebuilt + momentum * (rebuilt - before)
        phase = moved / (moved.abs() + 1e-12)
        before = rebuilt
    return _overlap(magnitude * phase, window, hop, length)[:, side : length - side]


def _frames(wave: Tensor, window: Tensor, hop: int) -> Tensor:
    """(N, S) -> STFT (N, bins, T) without padding."""
    return torch.fft.rfft(wave.unfold(1, len(window), hop) * window).transpose(1, 2)


def _overlap(spectrum: Tensor, window: Tensor, hop: int, length: int) -> Tensor:
    """Least-squares inverse of `_frames`: (N, bins, T) -> (N, length)."""
    size = len(window)
    frames = torch.fft.irfft(spectrum.transpose(1, 2), size) * window  # (N, T, size)

    def add(parts: Tensor) -> Tensor:
        return torch.nn.functional.fold(
            parts.transpose(1, 2), (1, length), (1, size), stride=(1, hop)
        )[:, 0, 0]

    return add(frames) / add(window.square().expand_as(frames)).clamp_min(1e-3)


def onset_seconds(sound: np.ndarray, near: float, rate: int = 24000, reach: float = 0.05) -> float:
    """When the log spectrum rises most (spectral flux, 4 ms windows, 1 ms steps) within `reach`
    seconds of `near`.

    Energy alone would take each swing of a low mode that still rings for a rise.

    Raises:
        ValueError: `near` lies outside the sound (S,).
    """
    step = max(1, rate // 1000)
    first = max(0, round((near - reach) * rate))
    last = min(len(sound), round((near + reach) * rate))
    if last - first < 5 * step:
        raise ValueError(
            f"near={near}: needs a time inside the sound, which has {len(sound) / rate:.3f} seconds"
        )
    part = sound[first : last + 3 * step].astype(
        np.float64
    )  # no padding: a cut tone splashes over all bands
    windows = np.lib.stride_tricks.sliding_window_view(part, 4 * step)[::step] * np.hanning(
        4 * step
    )
    level = np.abs(np.fft.rfft(windows, 8 * step))
    rise = np.maximum(np.diff(np.log(level + 1e-3 * level.max() + 1e-6), axis=0), 0).sum(axis=1)
    return (first + (int(rise.argmax()) + 3) * step) / rate  # middle of the window that rose


class GrammarReader:
    """Recognises English words with pocketsphinx and a grammar that says which may follow which.

    Args:
        grammar: JSGF with lower-case words of the CMU dictionary.

    Raises:
        ValueError: pocketsphinx is not installed.
    """

    def __init__(self, grammar: str) -> None:
        package = optional("pocketsphinx")
        with tempfile.NamedTemporaryFile("w", suffix=".gram", delete=False) as file:
            file.write(grammar)
        try:
            self._decoder = package.Decoder(
                hmm=package.get_model_path("en-us/en-us"),
                jsgf=file.name,
                dict=package.get_model_path("en-us/cmudict-en-us.dict"),
                loglevel="FATAL",
            )
        finally:
            os.unlink(file.name)

    def words(self, sound: np.ndarray, rate: int = 24000) -> list[str]:
        """Words heard in a sound (S,) in [-1, 1]; a quarter of a second of silence is added on both
        sides.
        """
        padded = np.pad(sound.astype(np.float32), rate // 4)
        at_16k = resample(torch.from_numpy(padded), rate, 16000).clamp(-1, 1)
        self._decoder.start_utt()
        self._decoder.process_raw((at_16k * 32767).to(torch.int16).numpy().tobytes(), full_utt=True)
        self._decoder.end_utt()
        found = self._decoder.hyp()
        return [word.split("(")[0] for word in found.hypstr.split()] if found else []


class DigitReader(GrammarReader):
    """Recognises strings of English digits."""

    def __init__(self) -> None:
        super().__init__(DIGIT_GRAMMAR)


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> int:
    """Substitutions, insertions and deletions between two word lists; "oh" and "zero" are the same
    digit.
    """
    first, second = (
        [("zero" if w == "oh" else w) for w in words] for words in (reference, hypothesis)
    )
    row = list(range(len(second) + 1))
    for i, word in enumerate(first, 1):
        above, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (word != other))
    return row[-1]
