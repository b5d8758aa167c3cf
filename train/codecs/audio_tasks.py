"""Training tasks of the audio codecs: sound segments from a speech bank (or any folder) and events
-> VAE, vocoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from avdiff.corpus.speech.read import SpeechCorpus, Utterance
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.pitch import hertz_bin
from avdiff.models.codecs.vocoder import AVVocoder, Pitch
from avdiff.train.codecs.pitch import PitchBank, PitchTrack, track
from avdiff.train.codecs.spectral_loss import SpectralLoss
from avdiff.train.loop.dataloader import SeededDataset, row_generator
from avdiff.train.loop.task import Loss, Task

EventSource = Callable[
    [np.random.Generator, int], np.ndarray
]  # (rng, samples) -> float32 (samples,)


class SoundSegments(SeededDataset[Tensor]):
    """Random pieces of speech, with some event-like sounds, of one length: item -> float32 (1, S)
    in [-1, 1].

    An item draws utterance and place from torch's global generator, which the training loop seeds
    per row; utterances are drawn in proportion to their length. Levels vary by `gain_db`, and one
    piece in five gets faint noise.

    Args:
        bank: source of utterances. samples: length S. events: source of other sounds, or None.
            event_share: part of items that are events. size: nominal number of items (an epoch).
                gain_db: range of level change.
    """

    def __init__(
        self,
        bank: SpeechCorpus,
        samples: int,
        events: EventSource | None = None,
        event_share: float = 0.12,
        size: int = 8192,
        gain_db: tuple[float, float] = (-9.0, 4.0),
    ) -> None:
        self.bank = bank
        self.samples = samples
        self.events = events
        self.size = size
        self.gain_db = gain_db
        self.event_share = event_share if events is not None else 0.0
        lengths = np.array([utterance.duration for utterance in bank])
        self.cumulative = np.cumsum(lengths) / lengths.sum()

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, seed: int) -> Tensor:
        rng = row_generator(seed)
        if rng.random() < self.event_share and self.events is not None:
            piece = self.events(rng, self.samples)
        else:
            piece = self.speech(rng)
        return torch.from_numpy(self.vary(piece, rng))[None]

    def draw(self, rng: np.random.Generator) -> Utterance:
        """An utterance, long ones more often."""
        which = int(np.searchsorted(self.cumulative, rng.random()))
        return self.bank[min(which, len(self.bank) - 1)]

    def speech(self, rng: np.random.Generator) -> np.ndarray:
        """A piece of one utterance; it may hang over either end by a tenth of a second, or all of a
        short one.
        """
        sound = self.bank.audio(self.draw(rng))
        over = max(2400, self.samples - len(sound))
        padded = np.pad(sound, over)
        start = (
            int(rng.integers(over - 2400, len(padded) - over + 2400 - self.samples + 1))
            if (len(sound) + 4800 > self.samples)
            else int(rng.integers(0, len(padded) - self.samples + 1))
        )
        return padded[start : start + self.samples]

    def vary(self, sound: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Another level, and sometimes faint noise (60 to 90 dB below full scale)."""
        peak = float(np.abs(sound).max())
        gain = min(10 ** (rng.uniform(*self.gain_db) / 20), 0.99 / max(peak, 1e-4))
        varied = sound * np.float32(gain)
        if rng.random() < 0.2:
            level = np.float32(10 ** rng.uniform(-4.5, -3))
            varied = varied + rng.standard_normal(len(varied), dtype=np.float32) * level
        return varied.astype(np.float32)


def held_out(bank: SpeechCorpus, samples: int, count: int) -> Tensor:
    """The middle pieces of `count` utterances spread over the bank: (count, 1, samples), short ones
    padded.
    """
    pieces = []
    for k in np.linspace(0, len(bank) - 1, count).astype(int):
        sound = bank.audio(bank[int(k)])
        start = max(0, (len(sound) - samples) // 2)
        piece = sound[start : start + samples]
        pieces.append(np.pad(piece, (0, samples - len(piece))))
    return torch.from_numpy(np.stack(pieces))[:, None]


class AudioVAETask(Task):
    """Trains `AVAudioVAE`: L1 + L2 on the log-mel, a small KL, and noise on the latents.

    A diffusion model lands near a latent, not on it: half of the rows are decoded from latents with
    noise of up to `latent_noise` of each channel's deviation, so that neighbours decode to
    neighbours.

    Args:
        vae: model to train. dataset: segments (1, S). held_out: segments (N, 1, S) for validation.
        kl_weight: weight of the KL divergence, mean over latent values. latent_noise: largest noise
            deviation.
        decoder_only: leave the encoder as it is, so that latents made earlier stay valid.
    """

    def __init__(
        self,
        vae: AVAudioVAE,
        dataset: Dataset[Tensor],
        held_out: Tensor,
        kl_weight: float = 1e-3,
        latent_noise: float = 0.35,
        decoder_only: bool = False,
    ) -> None:
        self.vae = vae
        self.dataset = dataset
        self.held_out = held_out
        self.kl_weight = kl_weight
        self.latent_noise = latent_noise
        self.decoder_only = decoder_only
        self.modules = {"audio_vae": vae}

    def settings(self) -> dict[str, Any]:
        own = {
            "kl_weight": self.kl_weight,
            "latent_noise": self.latent_noise,
            "decoder_only": self.decoder_only,
        }
        return {**super().settings(), **own}

    def parameters(self, phase: str) -> Iterator[torch.nn.Parameter]:
        return (
            p
            for name, p in self.vae.named_parameters()
            if not (self.decoder_only and name.startswith("encoder"))
        )

    def loss(self, batch: Tensor, phase: str, generator: torch.Generator) -> Loss:
        mel = self.vae.mel(batch)  # (B, 1, T, M)
        with torch.set_grad_enabled(not self.decoder_only):
            posterior = self.vae.encode(mel).latent_dist
        scale = posterior.mean.detach().std(dim=(0, 2, 3), keepdim=True)  # (1, C, 1, 1)
        level = torch.rand(
            len(mel), 2, generator=generator, device=mel.device
        )  # half the rows get none
        level = (
            torch.where(level[:, :1] < 0.5, level[:, 1:], 0.0).view(-1, 1, 1, 1) * self.latent_noise
        )
        white = torch.randn(posterior.mean.shape, generator=generator, device=mel.device)
        z = posterior.sample(generator=generator) + level * scale * white
        error = self.vae.decode(z).sample - mel
        absolute = error.abs().mean(dim=(1, 2, 3))
        square = error.square().mean(dim=(1, 2, 3))
        kl = posterior.kl() / posterior.mean[0].numel()  # nats per latent value
        rows = absolute + 0.5 * square + self.kl_weight * kl
        return Loss(rows.mean(), {"l1": absolute, "l2": square, "kl": kl})

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """L1 of the round trip, with latent noise of 0, 0.15 and 0.3, and how many channels carry
        information.
        """
        mel = self.vae.mel(self.held_out)
        z = self.vae.encode(mel).latent_dist.mode()
        scale = z.std(dim=(0, 2, 3), keepdim=True)
        generator = torch.Generator().manual_seed(0)
        white = torch.randn(z.shape, generator=generator)
        report = {
            f"l1_noise_{level}": float(
                (self.vae.decode(z + level * scale * white).sample - mel).abs().mean()
            )
            for level in (0.0, 0.15, 0.3)
        }
        report["live_channels"] = float((scale > 0.3).sum())
        return report


def measure_latents(
    vae: AVAudioVAE, segments: Sequence[Tensor] | Dataset[Tensor], count: int, batch: int = 32
) -> None:
    """Set `latents_mean` and `latents_std` from `count` training segments (1, S)."""
    total, squares = vae.latents_mean.new_zeros(2, len(vae.latents_mean), dtype=torch.float64)
    values = 0
    with torch.no_grad():
        for first in range(0, count, batch):
            sound = torch.stack([segments[k] for k in range(first, min(first + batch, count))]).to(
                vae.device
            )
            z = vae.encode(vae.mel(sound)).latent_dist.mode().double()  # (B, C, L, 1)
            total = total + z.sum(dim=(0, 2, 3))
            squares = squares + z.square().sum(dim=(0, 2, 3))
            values += z.shape[0] * z.shape[2]
    mean = total / values
    vae.latents_mean.copy_(mean)
    vae.latents_std.copy_((squares / values - mean.square()).clamp_min(1e-8).sqrt())


class Voiced(NamedTuple):
    """Sound (B, 1, S) with its pitch per mel frame, (B, T) each; see
    `avdiff.train.codecs.pitch.PitchTrack`.
    """

    sound: Tensor
    phase: Tensor
    hertz: Tensor
    voiced: Tensor


class VoicedSegments(SeededDataset[Voiced]):
    """`SoundSegments` with pitch tracks: an item is one `Voiced` without the batch dimension, cut
    on the frame grid.
    """

    def __init__(
        self, segments: SoundSegments, pitches: PitchBank | Mapping[str, PitchTrack], hop: int = 240
    ) -> None:
        self.segments = segments
        self.pitches = pitches
        self.hop = hop
        self.frames = segments.samples // hop

    def __len__(self) -> int:
        return len(self.segments)

    def sample(self, index: int, seed: int) -> Voiced:
        rng = row_generator(seed)
        if rng.random() < self.segments.event_share and self.segments.events is not None:
            sound = self.segments.events(rng, self.segments.samples)
            pitch = track([sound], self.hop)[0]
        else:
            sound, pitch = self.speech(rng)
        varied = self.segments.vary(sound, rng)
        return Voiced(
            torch.from_numpy(varied)[None],
            torch.from_numpy(pitch.phase),
            torch.from_numpy(pitch.hertz),
            torch.from_numpy(pitch.voiced),
        )

    def speech(self, rng: np.random.Generator) -> tuple[np.ndarray, PitchTrack]:
        """A piece of an utterance from a random frame on, silence after its end."""
        utterance = self.segments.draw(rng)
        sound = self.segments.bank.audio(utterance)
        pitch = self.pitches[utterance.id]
        first = int(rng.integers(0, max(0, len(pitch.phase) - self.frames) + 1))
        piece = sound[first * self.hop : (first + self.frames) * self.hop]
        piece = np.pad(piece, (0, self.frames * self.hop - len(piece)))
        cut = PitchTrack(*(part[first : first + self.frames] for part in pitch))
        missing = self.frames - len(cut.phase)
        if missing:
            run = cut.phase[-1] + np.arange(1, missing + 1) * cut.hertz[-1] * (
                2 * np.pi * self.hop / 24000
            )
            cut = PitchTrack(
                np.concatenate([cut.phase, run]),
                np.pad(cut.hertz, (0, missing), mode="edge"),
                np.pad(cut.voiced, (0, missing)),
            )
        return piece, cut


class VocoderTask(Task):
    """Trains `AVVocoder` on true mels and on mels that went through the audio VAE.

    The source runs in phase with the target (pitch and phase from tracking, "teacher pitch"); the
    pitch reader learns to read the same pitch off the mel.

    Args:
        vocoder: model to train. dataset: `VoicedSegments`. held_out: sound (N, 1, S) for
            validation.
        vae: frozen audio VAE for decoded mels, or None. decoded_share: part of rows with decoded
            mels.
        latent_noise: largest noise on the latents of decoded rows, in deviations. refine_steps:
            Griffin-Lim iterations that are trained through. weights: of the loss terms.
    """

    def __init__(
        self,
        vocoder: AVVocoder,
        dataset: VoicedSegments,
        held_out: Tensor,
        vae: AVAudioVAE | None = None,
        decoded_share: float = 0.6,
        latent_noise: float = 0.15,
        refine_steps: int = 2,
        weights: dict[str, float] | None = None,
    ) -> None:
        self.vocoder = vocoder
        self.dataset = dataset
        self.held_out = held_out
        self.vae = vae
        self.decoded_share = decoded_share
        self.latent_noise = latent_noise
        self.refine_steps = refine_steps
        self.weights = {
            "log": 1.0,
            "convergence": 0.5,
            "mel": 0.5,
            "start_log": 0.6,
            "start_convergence": 0.3,
            "start_aligned": 0.3,
            "magnitude": 0.5,
            "pitch": 0.1,
            **(weights or {}),
        }
        self.start_loss = SpectralLoss(
            (128, 512), aligned_size=512
        )  # pulse shapes and low harmonics of the start
        self.spectral = SpectralLoss((256, 1024, 2048))
        self.modules = {"vocoder": vocoder}
        if vae is not None:
            vae.requires_grad_(False).eval()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "weights": self.weights}

    def collate(self, rows: list[Voiced]) -> Voiced:
        return Voiced(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def source_mel(self, sound: Tensor, generator: torch.Generator) -> Tensor:
        """(B, 1, S) -> log-mel (B, T, M), some rows as the VAE decodes them."""
        mel = self.vocoder.frames(sound)
        if self.vae is None:
            return mel[:, 0]
        rows = round(
            self.decoded_share * len(mel)
        )  # the dataset draws at random: which rows does not matter
        with torch.no_grad():
            z = self.vae.encode(mel[:rows]).latent_dist.mode()
            level = (
                torch.rand(rows, 1, 1, 1, generator=generator, device=z.device) * self.latent_noise
            )
            white = torch.randn(z.shape, generator=generator, device=z.device)
            z = z + level * self.vae.latents_std.view(1, -1, 1, 1) * white
            return torch.cat([self.vae.decode(z).sample, mel[rows:]])[:, 0].float()

    def loss(self, batch: Voiced, phase: str, generator: torch.Generator) -> Loss:
        mel = self.source_mel(batch.sound, generator)
        target = batch.sound[:, 0]
        start, magnitude = self.vocoder.predict(
            mel, Pitch(batch.phase, batch.hertz, batch.voiced), generator
        )
        parts = {
            f"start_{name}": value
            for name, value in self.start_loss(self.vocoder.overlap_add(start), target).items()
        }
        refined = self.vocoder.overlap_add(self.vocoder.refine(start, magnitude, self.refine_steps))
        parts |= self.spectral(refined, target)
        parts["mel"] = self.mel_distance(refined, target)
        floor = self.spectral.floor
        heard = self.vocoder.frames.magnitude(target)
        parts["magnitude"] = (
            ((magnitude + floor).log() - (heard + floor).log()).abs().mean(dim=(1, 2))
        )
        parts["pitch"] = self.pitch_loss(mel, batch)
        total = sum(self.weights[name] * value for name, value in parts.items())
        return Loss(total.mean(), parts)

    def mel_distance(self, wave: Tensor, target: Tensor) -> Tensor:
        """L1 between the log-mels of (B, S) and (B, S): (B,)."""
        return (self.vocoder.frames(wave) - self.vocoder.frames(target)).abs().mean(dim=(1, 2))

    def pitch_loss(self, mel: Tensor, batch: Voiced) -> Tensor:
        """Cross-entropy of pitch where voiced, and of voicing: (B,)."""
        logits, voicing = self.vocoder.pitch(mel)
        place = hertz_bin(batch.hertz)[..., None]
        target = torch.exp(
            -0.5 * (torch.arange(logits.shape[-1], device=place.device) - place).square()
        )
        target = target / target.sum(dim=-1, keepdim=True)
        tone = -(target * logits.log_softmax(dim=-1)).sum(dim=-1) * batch.voiced
        return (
            tone + F.binary_cross_entropy_with_logits(voicing, batch.voiced, reduction="none")
        ).mean(dim=1)

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Spectral terms on held-out sound with the pitch read off the mel; from true and from
        decoded mels.
        """
        true = self.vocoder.frames(self.held_out)
        report: dict[str, float] = {}
        kinds = (
            {"true": true} if self.vae is None else {"true": true, "decoded": self.vae(true).sample}
        )
        for name, mel in kinds.items():
            wave = self.vocoder(mel)[:, 0]
            target = self.held_out[:, 0]
            parts = {**self.spectral(wave, target), "mel": self.mel_distance(wave, target)}
            report |= {f"{name}_{term}": float(value.mean()) for term, value in parts.items()}
        return report
