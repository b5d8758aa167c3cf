"""Train or fine-tune a codec of the embedded default on the presenter corpus, or on clips of one's
own.

    avdiff train-codec --codec video_vae --output_dir runs/video_vae
    avdiff train-codec vocoder.toml --start_from avdiff/bundled/vocoder
    avdiff train-codec --codec video_vae --data my_clips --start_from avdiff/bundled/vae
    --output_dir runs/mine

Read it from the bottom: main -> setup -> fit.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE, enlarge_decoder
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.pixels import to_model
from avdiff.train.codecs.audio_tasks import (
    AudioVAETask,
    SoundSegments,
    VocoderTask,
    VoicedSegments,
    held_out,
    measure_latents,
)
from avdiff.train.codecs.own_clips import OwnBank, OwnClips, own_frames, windows
from avdiff.train.codecs.pitch import PitchBank
from avdiff.train.codecs.video_task import FrameStore, VideoVAETask, corpus_clips
from avdiff.train.loop.command import run_training
from avdiff.train.loop.fit import FitOptions, FitSummary, Task

RATE = 24000


@dataclass(frozen=True)
class CodecOptions:
    """Which codec, and on what."""

    codec: Literal["video_vae", "audio_vae", "vocoder"]
    """Which of the three codecs to train."""
    data: str | None = None
    """Folder of media files to train on in place of the presenter corpus; every tenth file is
    measured on.
    """
    bank: str | None = None
    """Folder of the speech bank; nothing means $AVDIFF_BANK, else the mini-bank."""
    start_from: str | None = None
    """Saved codec to go on from; nothing trains from scratch."""
    audio_vae: str | None = None
    """Vocoder only: audio VAE whose decoded mels make up a share of the input, so that both fit
    together.
    """
    decoded_share: float = 0.6
    """Vocoder only: that share."""
    latent_noise: float = 0.3
    """Largest s.d. of the noise added to normalized latents in training: what makes the latent
    space smooth.
    """
    size: int = 128
    """Video only: pixels of the square picture."""
    clips: int = 4000
    """Video only: clips drawn once into a store before training starts."""
    clip_frames: int = 7
    """Video only: frames of a stored clip."""
    decoder_scale: int = 1
    """Video only: how many times larger than the encoder's the decoder's pictures are, 1, 2 or 4;
    `size` is what the decoder makes.
    """
    decoder_only: bool = False
    """Video only: train the decoder alone; latents, and models that were trained on them, stay
    good.
    """
    mouth_weight: float = 4.0
    """Video only: extra weight of the pixels around the mouth."""
    segment_seconds: float = 1.28
    """Audio only: length of a training segment."""
    event_share: float = 0.12
    """Share of clips or segments with sounding objects instead of speech."""


@dataclass(frozen=True)
class CodecRecipe:
    """Everything that decides a codec's training."""

    data: CodecOptions
    training: FitOptions


class PresenterVideoTask(VideoVAETask):
    """`VideoVAETask` whose export carries the latents' statistics, so that callers can
    normalize.
    """

    def save(self, directory: Path) -> None:
        """Measure on training clips, unless the latents are those of before, then export."""
        if next(self.model.encoder.parameters()).requires_grad:
            measure_video_latents(self.model, self.dataset, min(256, len(self.dataset)))
        super().save(directory)


class PresenterAudioTask(AudioVAETask):
    """`AudioVAETask` whose export carries the latents' statistics."""

    def save(self, directory: Path) -> None:
        """Measure on training segments, then export."""
        measure_latents(self.vae, self.dataset, 256)
        super().save(directory)


@torch.no_grad()
def measure_video_latents(vae: AVVideoVAE, store: FrameStore, count: int) -> None:
    """Set `latents_mean` and `latents_std` from the first `count` clips of a store."""
    latents = []
    for index in range(count):
        frames = to_model(np.array(store.clips[index])).permute(3, 0, 1, 2)[None]
        latents.append(vae.encode(frames.to(vae.device, vae.dtype)).latent_dist.mode().double())
    z = torch.cat(latents)
    vae.latents_mean.copy_(z.mean(dim=(0, 2, 3, 4)))
    vae.latents_std.copy_(z.std(dim=(0, 2, 3, 4)).clamp_min(1e-4))


def event_sound(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A piece of an event's sound, float32 (samples,)."""
    seconds = max(2.0, samples / RATE + 0.5)
    whole = event_audio(sample_event(rng, seconds), round(seconds * RATE), RATE)
    start = int(rng.integers(0, len(whole) - samples + 1))
    return whole[start : start + samples]


def setup(recipe: CodecRecipe) -> Task:
    """The task with its data; stores of drawn clips and pitch tracks are made on first use.

    Raises:
        ValueError: an option out of range, or a folder that is not there.
    """
    o = recipe.data
    if not 0 <= o.decoded_share <= 1:
        raise ValueError(f"decoded_share={o.decoded_share}: needs a share from 0 to 1")
    if o.clips < 16 or o.clip_frames < 3 or o.clip_frames % 2 == 0:
        raise ValueError(
            f"clips={o.clips}, clip_frames={o.clip_frames}: needs at least 16 clips of an odd "
            "number of frames"
        )
    if o.data is not None and o.codec == "vocoder":
        raise ValueError(
            f"data={o.data!r}: the vocoder learns from the speech bank's pitch tracks; fine-tune "
            "video_vae or audio_vae on clips of your own"
        )
    if o.decoder_only and (o.codec != "video_vae" or o.start_from is None):
        raise ValueError(
            f"decoder_only=true: is for a video_vae with start_from, not codec={o.codec!r} with "
            f"start_from={o.start_from!r}"
        )
    if not o.mouth_weight >= 0:
        raise ValueError(f"mouth_weight={o.mouth_weight}: needs a number of at least 0")
    torch.manual_seed(recipe.training.seed)
    return {"video_vae": _video, "audio_vae": _audio, "vocoder": _vocoder}[o.codec](recipe)


def _video(recipe: CodecRecipe) -> Task:
    o = recipe.data
    cache = Path(recipe.training.output_dir) / "frames"
    stores = []
    if o.data is not None:
        return _video_task(o, *(_own_store(o, cache, split) for split in ("train", "val")))
    for split, count, seed in (("train", o.clips, 0), ("val", max(16, o.clips // 20), 10**6)):
        folder = cache / f"{split}-{o.size}-{o.clip_frames}-{count}"
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            bank = SpeechCorpus(o.bank, split)
            FrameStore.build(
                folder, corpus_clips(bank, seed, split, o.clip_frames, o.size, o.event_share), count
            )
        stores.append(FrameStore(folder))
    return _video_task(o, *stores)


def _video_task(o: CodecOptions, train: FrameStore, val: FrameStore) -> Task:
    vae = AVVideoVAE.from_pretrained(o.start_from) if o.start_from else AVVideoVAE()
    if o.decoder_scale > vae.config.decoder_scale:
        vae = enlarge_decoder(vae, o.decoder_scale // vae.config.decoder_scale)
    return PresenterVideoTask(
        vae, train, val, o.mouth_weight, latent_noise=o.latent_noise, decoder_only=o.decoder_only
    )


def _own_store(o: CodecOptions, cache: Path, split: str) -> FrameStore:
    """Pieces of the user's films, decoded once."""
    clips = _named(OwnClips(str(o.data), split, "video"), split)
    places = windows(clips, o.clip_frames)
    count = min(len(places), o.clips if split == "train" else max(16, o.clips // 20))
    folder = cache / f"own-{split}-{o.size}-{o.clip_frames}-{count}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        FrameStore.build(folder, own_frames(places, o.clip_frames, o.size, count), count)
    return FrameStore(folder)


def _named(clips: OwnClips, split: str) -> OwnClips:
    """The same clips, after the files that are left out were named on the console."""
    for name, reason in clips.refused.items() if split == "train" else ():
        print(f"left out: {name}: {reason}")
    return clips


def _segments(recipe: CodecRecipe) -> tuple[SoundSegments, torch.Tensor, Any]:
    """Training segments, held-out segments and the training bank; whole audio tokens."""
    o = recipe.data
    samples = max(960 * 8, round(o.segment_seconds * RATE / 960) * 960)
    banks: list[Any] = [
        SpeechCorpus(o.bank, split, decoded=True)
        if o.data is None
        else OwnBank(_named(OwnClips(o.data, split, "audio"), split))
        for split in ("train", "val")
    ]
    train, val = banks
    segments = SoundSegments(train, samples, None if o.data else event_sound, o.event_share)
    return segments, held_out(val, samples, 32), train


def _audio(recipe: CodecRecipe) -> Task:
    segments, held, _ = _segments(recipe)
    vae = (
        AVAudioVAE.from_pretrained(recipe.data.start_from)
        if recipe.data.start_from
        else AVAudioVAE()
    )
    return PresenterAudioTask(vae, segments, held)


def _vocoder(recipe: CodecRecipe) -> Task:
    segments, held, train = _segments(recipe)
    vocoder = (
        AVVocoder.from_pretrained(recipe.data.start_from) if recipe.data.start_from else AVVocoder()
    )
    vae = (
        AVAudioVAE.from_pretrained(recipe.data.audio_vae).eval() if recipe.data.audio_vae else None
    )
    return VocoderTask(
        vocoder,
        VoicedSegments(segments, PitchBank(train)),
        held,
        vae,
        latent_noise=recipe.data.latent_noise / 2,
        decoded_share=recipe.data.decoded_share if vae else 0.0,
    )


def main(argv: Sequence[str] | None = None) -> FitSummary | None:
    """Command line: [RECIPE.toml] --codec video_vae|audio_vae|vocoder --output_dir DIR [--option
    value]... | --list-recipes | --help.
    """
    return run_training(CodecRecipe, setup, argv, str(main.__doc__))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
