"""Training of the phone recognizer: augmented speech with the phone of every frame, and
`RecognizerTask`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avdiff.corpus.augment import SNR_DB, add_room, coloured_noise, draw_plan, shift_pitch
from avdiff.corpus.speech.read import SAMPLE_RATE, SpeechCorpus, Utterance
from avdiff.evaluators.load import best_phones, phone_error_rate
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import encode_phones, phones_on_frames
from avdiff.train.loop.dataloader import SeededDataset, row_generator
from avdiff.train.loop.task import Loss, Task

RATE = 50  # frames a second
GAP_SECONDS = (0.0, 0.5)  # silence before each sentence
NOISES = 32
NOISE_SECONDS = 8.0
QUIET_DB = (-75.0, -50.0)  # level of the room's noise behind clean speech


class Heard(NamedTuple):
    """Sound float32 (S,) and the phone of each frame (T,) int64, S = 480 T; collated they get a
    batch dimension.
    """

    sound: Tensor
    phones: Tensor


def frame_labels(utterance: Utterance, frames: int, factor: float = 1.0) -> np.ndarray:
    """Phone id of each of `frames` frames at 50 Hz; 0 from the end of the audio on.

    Two equal phones in a row get a frame of silence between them, as CTC's paths have it.

    Args:
        factor: the audio was sped up by it.
    """
    phones = utterance.phones
    ids, _ = encode_phones(phones)
    which = phones_on_frames(phones, frames, RATE / factor)
    labels = ids[which]
    border = (which[1:] != which[:-1]) & (labels[1:] == labels[:-1]) & (labels[1:] != 0)
    labels[1:][border] = 0
    labels[round(utterance.duration / factor * RATE) :] = 0
    return labels


def sequence(labels: Iterable[int]) -> list[int]:
    """Frame labels -> phones in order: runs become one, silence goes (CTC's collapse)."""
    return [label for label, _ in groupby(labels) if label]


@cache
def _noises(seed: int = 0) -> np.ndarray:
    """Coloured noises with RMS 1, (N, S): drawing them afresh for each row costs more than training
    on it.
    """
    rng = np.random.default_rng(seed)
    length = round(NOISE_SECONDS * SAMPLE_RATE)
    return np.stack([coloured_noise(rng, length, SAMPLE_RATE) for _ in range(NOISES)])


def some_noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """One of the stored noises from anywhere on, repeated if it is too short: (samples,) float32
    with RMS about 1.
    """
    store = _noises()
    whole = store[int(rng.integers(NOISES))]
    return np.resize(np.roll(whole, -int(rng.integers(len(whole)))), samples)


class SpokenSegments(SeededDataset[Heard]):
    """Segments of one length, filled with sentences one after the other, each with its own voice
    and augmentation.

    Languages are drawn by the square root of their share, so that small ones are not left behind.

    Args:
        bank: source. seconds: length. augment_share: part of sentences that are degraded. size:
            nominal length.
    """

    def __init__(
        self, bank: SpeechCorpus, seconds: float = 4.0, augment_share: float = 0.6, size: int = 4096
    ) -> None:
        self.bank = bank
        self.frames = 2 * round(seconds * RATE / 2)
        self.augment_share = augment_share
        self.size = size
        languages = [utterance.lang for utterance in bank]
        counts = {language: languages.count(language) for language in set(languages)}
        weights = np.array([counts[language] ** -0.5 for language in languages])
        self.cumulative = np.cumsum(weights) / weights.sum()

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, seed: int) -> Heard:
        rng = row_generator(seed)
        samples = self.frames * SAMPLE_RATE // RATE
        sound = np.zeros(samples, np.float32)
        labels = np.zeros(self.frames, np.int64)
        clock = -round(
            float(rng.uniform(0, 1.0)) * RATE
        )  # the first sentence may have begun already
        while clock < self.frames:
            piece, named = self.sentence(rng)
            skipped = max(0, -clock)
            if skipped < len(named):
                first = max(clock, 0)
                part = named[skipped : skipped + self.frames - first]
                heard = piece[skipped * 480 : (skipped + len(part)) * 480]
                labels[first : first + len(part)] = part
                sound[first * 480 : first * 480 + len(heard)] = heard
            clock += len(named) + round(float(rng.uniform(*GAP_SECONDS)) * RATE)
        level = 10 ** (rng.uniform(*QUIET_DB) / 20)
        return Heard(
            torch.from_numpy(sound + some_noise(rng, samples) * np.float32(level)),
            torch.from_numpy(labels),
        )

    def sentence(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """One sentence, perhaps degraded: samples (480 T,) and labels (T,)."""
        place = int(np.searchsorted(self.cumulative, rng.random()))
        utterance = self.bank[min(place, len(self.bank) - 1)]
        plan = draw_plan(rng, self.augment_share)
        sound = self.bank.audio(utterance)
        factor = float(plan.pitch)
        if plan.pitch != 1:
            sound = shift_pitch(sound, plan.pitch)
        frames = len(sound) // 480
        sound = sound[: frames * 480]
        loudness = float(np.sqrt(np.mean(sound**2)) + 1e-6)
        if "room" in plan.kinds:
            sound = add_room(rng, sound, SAMPLE_RATE)
        if "noise" in plan.kinds:
            ratio = 10 ** (-rng.uniform(SNR_DB[0] - 6, SNR_DB[1]) / 20)
            sound = sound + some_noise(rng, len(sound)) * np.float32(loudness * ratio)
        gain = rng.uniform(-14, 6) if "level" in plan.kinds else rng.uniform(-5, 3)
        return np.clip(sound * np.float32(10 ** (gain / 20)), -1, 1), frame_labels(
            utterance, frames, factor
        )


class RecognizerTask(Task):
    """Trains `PhoneRecognizer`: cross-entropy on every frame and CTC on the row of phones.

    Args:
        recognizer: model. dataset: segments. held_out: bank whose sentences validate.
        vae, vocoder: frozen codecs that a share of rows goes through (the vocoder in a third of
            those), or None.
        codec_share: that share. ctc_weight: weight of CTC, which is a mean over phones. mask: most
            mel frames, and bands, that are blanked out in one place (SpecAugment,
            arXiv:1904.08779).
    """

    def __init__(
        self,
        recognizer: PhoneRecognizer,
        dataset: SpokenSegments,
        held_out: SpeechCorpus,
        vae: AVAudioVAE | None = None,
        vocoder: AVVocoder | None = None,
        codec_share: float = 0.25,
        ctc_weight: float = 0.5,
        mask: tuple[int, int] = (16, 14),
    ) -> None:
        self.recognizer = recognizer
        self.dataset = dataset
        self.held_out = held_out
        self.vae = vae
        self.vocoder = vocoder
        self.ctc_weight = ctc_weight
        self.mask = mask
        self.codec_share = codec_share if vae is not None else 0.0
        self.modules = {"recognizer": recognizer}
        for codec in (vae, vocoder):
            if codec is not None:
                codec.requires_grad_(False).eval()

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "ctc_weight": self.ctc_weight,
            "codec_share": self.codec_share,
        }

    def collate(self, rows: list[Heard]) -> Heard:
        return Heard(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def loss(self, batch: Heard, phase: str, generator: torch.Generator) -> Loss:
        with torch.no_grad():
            mel = self.vary(self.coded(self.recognizer.mel(batch.sound), generator), generator)
        found = self.recognizer(mel)  # (B, T, P)
        frame = F.nll_loss(found.transpose(1, 2), batch.phones, reduction="none").mean(dim=1)
        rows = [sequence(labels.tolist()) for labels in batch.phones]
        lengths = torch.tensor([len(row) for row in rows])
        spoken = torch.tensor([label for row in rows for label in row], dtype=torch.long)
        with torch.autocast(found.device.type, enabled=False):
            ctc = F.ctc_loss(
                found.transpose(0, 1),
                spoken.to(found.device),
                torch.full_like(lengths, found.shape[1]),
                lengths,
                blank=0,
                reduction="none",
                zero_infinity=True,
            ) / lengths.clamp_min(1).to(found)
        right = (found.argmax(dim=-1) == batch.phones).float().mean(dim=1)
        return Loss(
            (frame + self.ctc_weight * ctc).mean(), {"frame": frame, "ctc": ctc}, {"right": right}
        )

    def coded(self, mel: Tensor, generator: torch.Generator) -> Tensor:
        """The first rows as the audio VAE decodes them, with noise on their latents; some as the
        vocoder sounds.
        """
        through = round(self.codec_share * len(mel))  # rows come in random order
        if not through or self.vae is None:
            return mel
        with torch.autocast(mel.device.type, enabled=False):
            z = self.vae.encode(mel[:through, None]).latent_dist.mode()
            level = torch.rand(through, 1, 1, 1, generator=generator, device=z.device) * 0.3
            white = torch.randn(z.shape, generator=generator, device=z.device)
            decoded = self.vae.decode(
                z + level * self.vae.latents_std.view(1, -1, 1, 1) * white
            ).sample  # (B, 1, T, M)
            voiced = through // 3
            if voiced and self.vocoder is not None:
                sound = self.vocoder(decoded[:voiced])[:, 0]
                decoded = torch.cat(
                    [self.recognizer.mel_frontend(sound)[:, None], decoded[voiced:]]
                )
        return torch.cat([decoded[:, 0].float(), mel[through:]])

    def vary(self, mel: Tensor, generator: torch.Generator) -> Tensor:
        """Another microphone (a smooth curve over the bands), some noise on the values, and
        blanked-out places.
        """
        batch, frames, bands = mel.shape
        draw = torch.randn(batch, 3, generator=generator, device=mel.device) * 0.15
        along = torch.linspace(-1, 1, bands, device=mel.device)
        curve = (
            draw[:, :1] * along
            + draw[:, 1:2] * (along.square() - 0.33)
            + draw[:, 2:] * (np.pi * 2 * along).sin()
        )
        rough = (torch.rand(batch, 1, 1, generator=generator, device=mel.device) - 0.5).clamp_min(
            0
        ) * 0.8
        mel = (
            mel
            + curve[:, None]
            + rough * torch.randn(mel.shape, generator=generator, device=mel.device)
        )
        for axis, (size, most) in enumerate(
            ((frames, self.mask[0]), (bands, self.mask[1])), start=1
        ):
            for _ in range(2):
                start, width = torch.rand(2, batch, 1, generator=generator, device=mel.device)
                at = torch.arange(size, device=mel.device) - start * size
                hidden = (at >= 0) & (at < width * most)
                mel = mel.masked_fill(hidden[:, :, None] if axis == 1 else hidden[:, None], 0.0)
        return mel

    def validate(self) -> dict[str, float]:
        """Phone error rates on the held-out bank, per language."""
        chosen = [
            u for k, u in enumerate(self.held_out) if k % max(1, len(self.held_out) // 160) == 0
        ]
        return measure_recogniser(self.recognizer, chosen)


@torch.no_grad()
def measure_recogniser(
    recognizer: PhoneRecognizer,
    utterances: Sequence[Utterance],
    snr: float | None = None,
    seed: int = 0,
    mels: Callable[[Utterance], Tensor] | None = None,
) -> dict[str, float]:
    """Phone error rates on utterances: `per_LANG`, their mean `per`, and `per_worst`.

    Args:
        snr: dB of white-to-brown noise, None for none. mels: makes the log-mel (1, T, M) in place
            of the audio's own.
    """
    rows: dict[str, list[tuple[list[int], list[int]]]] = {}
    rng = np.random.default_rng(seed)
    for utterance in utterances:
        sound = utterance.bank.audio(utterance)
        if snr is not None:
            power = float(np.sqrt(np.mean(sound**2))) * 10 ** (-snr / 20)
            sound = sound + coloured_noise(rng, len(sound), SAMPLE_RATE) * np.float32(power)
        if mels is None:
            found = recognizer.listen(torch.from_numpy(sound).to(recognizer.device))
        else:
            found = recognizer(mels(utterance))[0, : len(sound) // recognizer.samples_per_frame]
        wanted = [i for i in encode_phones(utterance.phones)[0].tolist() if i]
        rows.setdefault(utterance.lang, []).append((wanted, best_phones(found)))
    rates = {f"per_{language}": phone_error_rate(pairs) for language, pairs in sorted(rows.items())}
    return {"per": float(np.mean(list(rates.values()))), "per_worst": max(rates.values()), **rates}
