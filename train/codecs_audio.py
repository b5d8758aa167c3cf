"""Training tasks of the audio codecs: sound segments from a speech bank (or any folder) and events -> VAE, vocoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from avdiff.data.corpus.speech import SpeechBank
from avdiff.models.audio_vae import AVAudioVAE
from avdiff.train.task import Loss, Task

EventSource = Callable[[np.random.Generator, int], np.ndarray]  # (rng, samples) -> float32 (samples,)


class SoundSegments(Dataset[Tensor]):
    """Random pieces of speech, with some event-like sounds, of one length: item -> float32 (1, S) in [-1, 1].

    An item draws utterance and place from torch's global generator, which the training loop seeds per row; utterances
    are drawn in proportion to their length. Levels vary by `gain_db`, and one piece in five gets faint noise.

    Args:
        bank: source of utterances. samples: length S. events: source of other sounds, or None. event_share: part of
            items that are events. size: nominal number of items (an epoch). gain_db: range of level change.
    """

    def __init__(self, bank: SpeechBank, samples: int, events: EventSource | None = None, event_share: float = 0.12,
                 size: int = 8192, gain_db: tuple[float, float] = (-9.0, 4.0)) -> None:
        self.bank, self.samples, self.events, self.size, self.gain_db = bank, samples, events, size, gain_db
        self.event_share = event_share if events is not None else 0.0
        lengths = np.array([utterance.duration for utterance in bank])
        self.cumulative = np.cumsum(lengths) / lengths.sum()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        rng = np.random.default_rng(int(torch.randint(2**62, ())))
        if rng.random() < self.event_share and self.events is not None:
            piece = self.events(rng, self.samples)
        else:
            piece = self.speech(rng)
        return torch.from_numpy(self.vary(piece, rng))[None]

    def speech(self, rng: np.random.Generator) -> np.ndarray:
        """A piece of one utterance; it may hang over either end by a tenth of a second, or all of a short one."""
        which = int(np.searchsorted(self.cumulative, rng.random()))
        sound = self.bank.audio(self.bank[min(which, len(self.bank) - 1)])
        over = max(2400, self.samples - len(sound))
        padded = np.pad(sound, over)
        start = int(rng.integers(over - 2400, len(padded) - over + 2400 - self.samples + 1)) if (
            len(sound) + 4800 > self.samples) else int(rng.integers(0, len(padded) - self.samples + 1))
        return padded[start : start + self.samples]

    def vary(self, sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another level, and sometimes faint noise (60 to 90 dB below full scale)."""
        peak = float(np.abs(sound).max())
        gain = min(10 ** (rng.uniform(*self.gain_db) / 20), 0.99 / max(peak, 1e-4))
        varied = sound * np.float32(gain)
        if rng.random() < 0.2:
            varied = varied + rng.standard_normal(len(varied), dtype=np.float32) * np.float32(10 ** rng.uniform(-4.5, -3))
        return varied.astype(np.float32)


def held_out(bank: SpeechBank, samples: int, count: int) -> Tensor:
    """The middle pieces of `count` utterances spread over the bank: (count, 1, samples), short ones padded."""
    pieces = []
    for k in np.linspace(0, len(bank) - 1, count).astype(int):
        sound = bank.audio(bank[int(k)])
        start = max(0, (len(sound) - samples) // 2)
        piece = sound[start : start + samples]
        pieces.append(np.pad(piece, (0, samples - len(piece))))
    return torch.from_numpy(np.stack(pieces))[:, None]


class AudioVAETask(Task):
    """Trains `AVAudioVAE`: L1 + L2 on the log-mel, a small KL, and noise on the latents.

    A diffusion model lands near a latent, not on it: half of the rows are decoded from latents with noise of up to
    `latent_noise` of each channel's deviation, so that neighbours decode to neighbours.

    Args:
        vae: model to train. dataset: segments (1, S). held_out: segments (N, 1, S) for validation.
        kl_weight: weight of the KL divergence, mean over latent values. latent_noise: largest noise deviation.
    """

    def __init__(self, vae: AVAudioVAE, dataset: Dataset[Tensor], held_out: Tensor, kl_weight: float = 1e-3,
                 latent_noise: float = 0.35) -> None:
        self.vae, self.dataset, self.held_out = vae, dataset, held_out
        self.kl_weight, self.latent_noise = kl_weight, latent_noise
        self.modules = {"audio_vae": vae}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kl_weight": self.kl_weight, "latent_noise": self.latent_noise}

    def loss(self, batch: Tensor, phase: str, generator: torch.Generator) -> Loss:
        mel = self.vae.mel(batch)  # (B, 1, T, M)
        posterior = self.vae.encode(mel).latent_dist
        scale = posterior.mean.detach().std(dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
        level = torch.rand(len(mel), 2, generator=generator, device=mel.device)  # half the rows get none
        level = torch.where(level[:, :1] < 0.5, level[:, 1:], 0.0).view(-1, 1, 1, 1) * self.latent_noise
        white = torch.randn(posterior.mean.shape, generator=generator, device=mel.device)
        z = posterior.sample(generator=generator) + level * scale * white
        error = self.vae.decode(z).sample - mel
        absolute, square = error.abs().mean(dim=(1, 2, 3)), error.square().mean(dim=(1, 2, 3))
        kl = posterior.kl() / posterior.mean[0].numel()  # nats per latent value
        rows = absolute + 0.5 * square + self.kl_weight * kl
        return Loss(rows.mean(), {"l1": absolute, "l2": square, "kl": kl})

    def validate(self) -> dict[str, float]:
        """L1 of the round trip, with latent noise of 0, 0.15 and 0.3, and how many channels carry information."""
        mel = self.vae.mel(self.held_out)
        z = self.vae.encode(mel).latent_dist.mode()
        scale = z.std(dim=(0, 2, 3), keepdim=True)
        generator = torch.Generator().manual_seed(0)
        white = torch.randn(z.shape, generator=generator)
        report = {f"l1_noise_{level}": float((self.vae.decode(z + level * scale * white).sample - mel).abs().mean())
                  for level in (0.0, 0.15, 0.3)}
        report["live_channels"] = float((scale > 0.3).sum())
        return report


def measure_latents(vae: AVAudioVAE, segments: Sequence[Tensor] | Dataset[Tensor], count: int, batch: int = 32) -> None:
    """Set `latents_mean` and `latents_std` from `count` training segments (1, S)."""
    total, squares, values = 0.0, 0.0, 0
    with torch.no_grad():
        for first in range(0, count, batch):
            sound = torch.stack([segments[k] for k in range(first, min(first + batch, count))])
            z = vae.encode(vae.mel(sound)).latent_dist.mode().double()  # (B, C, L, 1)
            total, squares = total + z.sum(dim=(0, 2, 3)), squares + z.square().sum(dim=(0, 2, 3))
            values += z.shape[0] * z.shape[2]
    mean = total / values
    vae.latents_mean.copy_(mean)
    vae.latents_std.copy_((squares / values - mean.square()).clamp_min(1e-8).sqrt())
