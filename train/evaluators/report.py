"""A evaluator's marks on the test splits, which nobody trains on: what its model card prints.

python -m avdiff.train.evaluators.train_evaluator --evaluator recognizer --measure
avdiff/bundled/recognizer --output_dir runs/marks
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avdiff.clip import midpoints
from avdiff.corpus.augment import coloured_noise
from avdiff.corpus.dataset import split_utterances
from avdiff.corpus.face.presenter import lip_points, pose_track, render_face, sample_identity
from avdiff.corpus.speech.read import SAMPLE_RATE, SpeechCorpus, Utterance
from avdiff.evaluators.load import align, read_faces, sync_curve
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.evaluators.face_reader import SIDE, FaceReader, to_pictures
from avdiff.models.evaluators.lip_network import LipNetwork
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import SILENCE, encode_phones
from avdiff.phonetics.visemes import viseme_track
from avdiff.pixels import to_uint8
from avdiff.train.evaluators.faces import degraded, draw_event, draw_face, measure_reader
from avdiff.train.evaluators.lips import held_out_clips, measure_lip_network
from avdiff.train.evaluators.phones import measure_recogniser

SNRS = (20.0, 10.0, 5.0, 0.0)  # dB
SHARES = (0.5, 1.0, 1.5)  # strength of degradation
PICTURES = 900
CLIPS = 150


def measure_evaluator(
    name: str,
    evaluator: Any,
    bank: str | None,
    audio_vae: AVAudioVAE | None = None,
    vocoder: AVVocoder | None = None,
    video_vae: AVVideoVAE | None = None,
) -> dict[str, Any]:
    """Marks of one evaluator: nested dicts of numbers; rates and accuracies are shares."""
    if name == "recognizer":
        return recogniser_marks(evaluator, SpeechCorpus(bank, decoded=True), audio_vae, vocoder)
    if name == "face_reader":
        return reader_marks(evaluator, SpeechCorpus(bank, decoded=True), video_vae)
    return lip_marks(evaluator, SpeechCorpus(bank, "test", decoded=True))


class _Coded:
    """A bank whose audio went through the codecs; stands in for the bank of an utterance."""

    def __init__(self, bank: SpeechCorpus, vae: AVAudioVAE, vocoder: AVVocoder | None) -> None:
        self.bank = bank
        self.vae = vae
        self.vocoder = vocoder

    @torch.no_grad()
    def mel(self, utterance: Utterance) -> Tensor:
        """Log-mel (1, T, M) after the round trip."""
        wave = torch.from_numpy(self.bank.audio(utterance))[None, None]
        mel = self.vae(self.vae.mel(wave)).sample
        if self.vocoder is None:
            return mel[:, 0]
        return self.vae.mel(self.vocoder(mel))[:, 0]


def recogniser_marks(
    evaluator: PhoneRecognizer,
    bank: SpeechCorpus,
    vae: AVAudioVAE | None = None,
    vocoder: AVVocoder | None = None,
) -> dict[str, Any]:
    """Error rates on held-out sentences, on held-out voices, with noise, after the codecs; times;
    speed.
    """
    test, voices = (split_utterances(bank, split) for split in ("test", "test_voices"))
    metrics: dict[str, Any] = {
        "test": measure_recogniser(evaluator, test),
        "test_voices": measure_recogniser(evaluator, voices),
    }
    metrics["noise"] = {f"{snr:g} dB": measure_recogniser(evaluator, test, snr) for snr in SNRS}
    if vae is not None:
        coded = _Coded(bank, vae, None)
        metrics["audio_vae"] = measure_recogniser(evaluator, test, mels=coded.mel)
        if vocoder is not None:
            metrics["vocoder"] = measure_recogniser(
                evaluator, test, mels=_Coded(bank, vae, vocoder).mel
            )
    metrics["times"] = time_errors(evaluator, test)
    seconds = sum(u.duration for u in test[:100])
    sounds = [torch.from_numpy(bank.audio(u)) for u in test[:100]]
    began = time.perf_counter()
    for sound in sounds:
        evaluator.listen(sound)
    metrics["times_real_time"] = seconds / (time.perf_counter() - began)
    return metrics


@torch.no_grad()
def time_errors(evaluator: PhoneRecognizer, utterances: list[Utterance]) -> dict[str, float]:
    """Milliseconds between aligned and true starts of the phones of known sentences: median, 90th
    percentile, bias.
    """
    errors: list[float] = []
    for utterance in utterances:
        found = evaluator.listen(torch.from_numpy(utterance.bank.audio(utterance)))
        spoken = [phone for phone in utterance.phones if phone.symbol != SILENCE]
        spans = align(found, encode_phones(spoken)[0].tolist())
        errors += [
            (first / evaluator.frame_rate - phone.start) * 1000
            for (first, _), phone in zip(spans, spoken, strict=True)
        ]
    away = np.abs(errors)
    return {
        "median_ms": float(np.median(away)),
        "p90_ms": float(np.percentile(away, 90)),
        "bias_ms": float(np.median(errors)),
    }


def reader_marks(
    evaluator: FaceReader, bank: SpeechCorpus, vae: AVVideoVAE | None = None
) -> dict[str, Any]:
    """Held-out presenters: clean, degraded and after the codec; whole clips; speed."""
    rng = np.random.default_rng(2026)
    spoken = SpeechCorpus(bank.root, "test", decoded=True)
    rows = [
        draw_event(rng)
        if k % 16 == 15
        else draw_face(rng, spoken, sample_identity(rng, split="test"))
        for k in range(PICTURES)
    ]
    pictures = to_pictures(torch.from_numpy(np.stack([row.pop("picture") for row in rows])))
    truth = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    metrics: dict[str, Any] = {"clean": measure_reader(evaluator, pictures, truth)}
    for strength in SHARES:
        x = degraded(pictures, torch.Generator().manual_seed(1), strength)
        metrics[f"degraded {strength:g}"] = measure_reader(evaluator, x, truth)
    if vae is not None:
        with torch.no_grad():
            coded = torch.cat(
                [vae(x[:, :, None]).sample[:, :, 0].clamp(-1, 1) for x in pictures.split(32)]
            )
        metrics["video_vae"] = measure_reader(evaluator, coded, truth)
    metrics["clips"] = clip_marks(evaluator, spoken, vae)
    began = time.perf_counter()
    with torch.no_grad():
        evaluator(pictures[:256])
    metrics["pictures_a_second"] = 256 / (time.perf_counter() - began)
    return metrics


@torch.no_grad()
def clip_marks(
    evaluator: FaceReader,
    bank: SpeechCorpus,
    vae: AVVideoVAE | None,
    count: int = 24,
    frames: int = 49,
) -> dict[str, float]:
    """Clips of test presenters: correlation of the opening over time, attributes by vote of all
    pictures.

    Goes through the video VAE where one is given.
    """
    correlations = []
    right = 0
    asked = 0
    off = []
    for index in range(count):
        rng = np.random.default_rng([index, 5])
        utterance = bank[int(rng.integers(len(bank)))]
        identity = sample_identity(rng, utterance.gender, "test")
        times = midpoints(frames, 25)
        mouths = viseme_track(utterance.phones, times)
        poses = pose_track(rng, times, utterance.phones)
        video = np.stack(
            [render_face(identity, m, p, SIDE) for m, p in zip(mouths, poses, strict=True)]
        )
        if vae is not None:
            x = to_pictures(torch.from_numpy(video)).transpose(0, 1)[None]
            y = vae(x).sample.clamp(-1, 1)[0].permute(1, 2, 3, 0)
            video = to_uint8(y).numpy()
        reading = read_faces(video, evaluator)
        correlations.append(np.corrcoef(reading.mouth[:, 0], mouths[:, 0])[0, 1])
        truth = np.stack([lip_points(identity, m, p) for m, p in zip(mouths, poses, strict=True)])
        off.append(np.linalg.norm(reading.points - truth, axis=-1).mean() * SIDE)
        told = identity.attributes()
        for name, value in reading.attributes.items():
            if told.get(name, "none") != "none" or name in (
                "beard",
                "glasses",
                "hat",
                "earrings",
                "lipstick",
            ):
                asked = asked + 1
                right = right + (told[name] == value)
    return {
        "jaw_r": float(np.mean(correlations)),
        "point_error_px": float(np.mean(off)),
        "attributes": right / asked,
    }


def lip_marks(evaluator: LipNetwork, bank: SpeechCorpus) -> dict[str, Any]:
    """Clips of 2, 3 and 4 seconds of test sentences and presenters; other frame rates; noise;
    speed.
    """
    metrics: dict[str, Any] = {}
    for seconds in (2.0, 3.0, 4.0):
        metrics[f"{seconds:g} s"] = measure_lip_network(
            evaluator, held_out_clips(bank, "test", CLIPS, seconds)
        )
    for fps in (24.0, 30000 / 1001, 60.0):
        metrics[f"{fps:.5g} fps"] = measure_lip_network(
            evaluator, held_out_clips(bank, "test", CLIPS // 3, fps=fps)
        )
    rng = np.random.default_rng(3)
    clips = [
        clip._replace(
            sound=clip.sound
            + np.float32(0.1 * np.sqrt(np.mean(clip.sound**2)) * 10**0.5)
            * coloured_noise(rng, len(clip.sound), SAMPLE_RATE)
        )
        for clip in held_out_clips(bank, "test", CLIPS // 3)
    ]
    metrics["10 dB"] = measure_lip_network(evaluator, clips)
    began = time.perf_counter()
    for clip in clips:
        sync_curve(clip.points, clip.times, clip.sound, SAMPLE_RATE, network=evaluator)
    metrics["times_real_time"] = (
        sum(len(c.sound) for c in clips) / SAMPLE_RATE / (time.perf_counter() - began)
    )
    return metrics
