"""Train an evaluator: what listens, what looks, and what compares lips with sound. They are frozen
before the joint model.

    avdiff train-evaluator phone_recognizer.toml --bank BANK --output_dir runs/recognizer
    avdiff train-evaluator --evaluator lip_network --output_dir runs/lips --max_train_steps 3000
    avdiff train-evaluator --evaluator face_reader --measure runs/face_reader --output_dir runs/face

Read it from the bottom: main -> setup -> fit. `--measure` trains nothing: it writes an evaluator's
metrics on the test splits.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.evaluators.load import EVALUATORS
from avdiff.files import write_text
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.lip_network import LipNetwork
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import inventory
from avdiff.phonetics.visemes import VISEMES
from avdiff.train.evaluators.faces import ATTRIBUTES, FaceReaderTask, FaceStore
from avdiff.train.evaluators.lips import LipNetworkTask, LipPairs, held_out_clips
from avdiff.train.evaluators.phones import RecognizerTask, SpokenSegments
from avdiff.train.loop.command import load_recipe, run_training
from avdiff.train.loop.fit import FitOptions, FitSummary, Task


@dataclass(frozen=True)
class EvaluatorOptions:
    """Which evaluator, and on what."""

    evaluator: Literal["recognizer", "face_reader", "lip_network"]
    """Which of the three evaluators to train."""
    bank: str | None = None
    """Folder of the speech bank; nothing means $AVDIFF_BANK, else the mini-bank."""
    start_from: str | None = None
    """Saved evaluator to go on from; nothing trains from scratch."""
    measure: str | None = None
    """Saved evaluator to measure on the test splits instead of training; writes
    output_dir/measured.json.
    """
    audio_vae: str | None = None
    """Recognizer only: audio VAE that a share of rows goes through."""
    vocoder: str | None = None
    """Recognizer only: vocoder that a third of those rows goes through as well."""
    video_vae: str | None = None
    """Face reader only: video VAE that a share of pictures goes through."""
    codec_share: float = 0.25
    """Share of rows that go through the codecs, if any are given."""
    segment_seconds: float = 4.0
    """Recognizer only: length of a training segment."""
    pictures: int = 36000
    """Face reader only: pictures drawn once into a store before training starts (49 kB each)."""
    cache: str | None = None
    """Folder of that store; nothing means ~/.cache/avdiff/evaluators."""
    held_out: int = 48
    """Lip network only: clips to validate on."""


@dataclass(frozen=True)
class EvaluatorRecipe:
    """Everything that decides an evaluator's training."""

    data: EvaluatorOptions
    training: FitOptions


def setup(recipe: EvaluatorRecipe) -> Task:
    """The task with its data; the store of drawn faces is made on first use.

    Raises:
        ValueError: an option out of range, or a folder that is not there.
    """
    o = recipe.data
    if not 0 <= o.codec_share <= 1:
        raise ValueError(f"codec_share={o.codec_share}: needs a share from 0 to 1")
    if o.segment_seconds < 0.5 or o.pictures < 64 or o.held_out < 2:
        raise ValueError(
            f"segment_seconds={o.segment_seconds}, pictures={o.pictures}, held_out={o.held_out}: "
            "needs at "
            "least 0.5 s, 64 pictures and 2 clips"
        )
    torch.manual_seed(recipe.training.seed)
    return {"recognizer": _recogniser, "face_reader": _face_reader, "lip_network": _lip_network}[
        o.evaluator
    ](o)


def _banks(o: EvaluatorOptions) -> tuple[SpeechCorpus, SpeechCorpus]:
    return SpeechCorpus(o.bank, "train", decoded=True), SpeechCorpus(o.bank, "val", decoded=True)


def _saved(kind: type[Any], folder: str | None) -> Any:
    """A saved model in eval mode, or None."""
    return kind.from_pretrained(folder, torch_dtype=torch.float32).eval() if folder else None


def _recogniser(o: EvaluatorOptions) -> Task:
    train, val = _banks(o)
    model = (
        PhoneRecognizer.from_pretrained(o.start_from)
        if o.start_from
        else PhoneRecognizer(inventory()[0])
    )
    return RecognizerTask(
        model,
        SpokenSegments(train, o.segment_seconds),
        val,
        _saved(AVAudioVAE, o.audio_vae),
        _saved(AVVocoder, o.vocoder),
        o.codec_share,
    )


def _face_reader(o: EvaluatorOptions) -> Task:
    cache = Path(o.cache) if o.cache else Path.home() / ".cache" / "avdiff" / "evaluators"
    stores = []
    for split, count, seed in (
        ("train", o.pictures, 0),
        ("val", max(64, min(1024, o.pictures // 20)), 1),
    ):
        folder = cache / f"faces-{split}-{count}"
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            FaceStore.build(folder, count, split, SpeechCorpus(o.bank, split, decoded=True), seed)
        stores.append(FaceStore(folder))
    model = (
        FaceReader.from_pretrained(o.start_from)
        if o.start_from
        else FaceReader(ATTRIBUTES, VISEMES)
    )
    return FaceReaderTask(
        model, stores[0], stores[1], _saved(AVVideoVAE, o.video_vae), o.codec_share
    )


def _lip_network(o: EvaluatorOptions) -> Task:
    train, val = _banks(o)
    model = LipNetwork.from_pretrained(o.start_from) if o.start_from else LipNetwork()
    return LipNetworkTask(model, LipPairs(train), held_out_clips(val, "val", o.held_out))


def measure(recipe: EvaluatorRecipe) -> dict[str, Any]:
    """Metrics of a saved evaluator on the test splits, written to output_dir/measured.json (see
    train/evaluators/report.py).
    """
    from avdiff.train.evaluators.report import measure_evaluator

    o = recipe.data
    codecs = (
        _saved(AVAudioVAE, o.audio_vae),
        _saved(AVVocoder, o.vocoder),
        _saved(AVVideoVAE, o.video_vae),
    )
    metrics = measure_evaluator(
        o.evaluator, _saved(EVALUATORS[o.evaluator], o.measure), o.bank, *codecs
    )
    folder = Path(recipe.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "measured.json", json.dumps(metrics, indent=1))
    return metrics


def main(argv: Sequence[str] | None = None) -> FitSummary | dict[str, Any] | None:
    """Command line: [RECIPE.toml] --evaluator recognizer|face_reader|lip_network --output_dir DIR
    [--option value]... | --list-recipes | --help; --measure FOLDER measures without training.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word.startswith("--measure") for word in words):
        metrics = measure(load_recipe(EvaluatorRecipe, words))
        print(json.dumps(metrics, indent=1))
        return metrics
    return run_training(EvaluatorRecipe, setup, words, str(main.__doc__))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
