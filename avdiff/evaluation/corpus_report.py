"""How exact the corpus is: `python -m avdiff.evaluation.corpus_report --count 300 --bank BANK`.

Mouths and contacts are read off the pixels, onsets and phone times off the sound: never from the
truth they are compared with.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.face.presenter import (
    Identity,
    identity_key,
    mouth_opening,
    mouth_opening_from_pixels,
    sample_identity,
)
from avdiff.corpus.speech.read import SPLITS, SpeechCorpus
from avdiff.corpus.speech.subset import is_digit_string
from avdiff.corpus.speech.timing import best_shift
from avdiff.phonetics.visemes import viseme_of

CLOSED = 1.5 / 128  # opening as a share of the picture: a pixel and a half of antialiasing at 128
LAGS = range(-3, 4)  # frames
# of a voice, for the shift of its labels
LEAST_SENTENCES = 20
MOST_SENTENCES = 60
ONSET = 0.005  # seconds


@dataclass
class CorpusReport:
    """What was measured. Shifts and errors in milliseconds; None is "not measured"."""

    clips: int = 0
    speech_clips: int = 0
    frames: int = 0
    mouth_r: float | None = None
    mouth_r_lowest: float | None = None
    mouth_best_lag: int | None = None
    bilabials: int = 0
    bilabials_closed: float | None = None
    contacts: int = 0
    onset_within_5ms: float | None = None
    onset_worst_ms: float | None = None
    contacts_seen: float | None = None
    clips_per_cpu_second: float | None = None
    seconds_of_clips: float = 0.0
    voices: dict[str, float] = field(default_factory=dict)
    digit_strings: int = 0
    digit_wer: float | None = None


def measure_corpus(
    bank: SpeechCorpus,
    count: int,
    split: str = "train",
    seed: int = 0,
    languages: Sequence[str] | None = None,
    size: int = 128,
    digits: int = 100,
) -> CorpusReport:
    """Make `count` clips and measure them; then the phone times of every voice, and digit strings
    where one can.

    Raises:
        ValueError: as `PresenterCorpus`.
    """
    corpus = PresenterCorpus(bank, split, languages, count, seed, size=size)
    report = CorpusReport(clips=count)
    _measure_clips(corpus, report)
    report.voices = voice_shifts(bank, languages)
    if digits:
        _measure_digits(bank, digits, report)
    return report


def _measure_clips(corpus: PresenterCorpus, report: CorpusReport) -> None:
    """Mouths, events and speed."""
    mouths = _Mouths()
    errors = []
    spent = 0.0
    seen: list[bool] = []
    for index in range(len(corpus)):
        start = time.process_time()
        item = corpus[index]
        spent += time.process_time() - start
        report.seconds_of_clips += len(item["video"]) / float(item["fps"])
        if item["kind"] == "speech":
            mouths.add(presenter(corpus, item), item)
        else:
            errors += _onset_errors(item)
            seen += _contacts_seen(item)
    report.clips_per_cpu_second = len(corpus) / spent
    report.speech_clips = len(mouths.by_clip)
    report.bilabials = len(mouths.closed)
    if mouths.by_clip:
        shown, truth = (np.concatenate(part) for part in zip(*mouths.by_clip, strict=True))
        report.frames = len(shown)
        report.mouth_r = float(np.corrcoef(shown, truth)[0, 1])
        report.mouth_r_lowest = min(float(np.corrcoef(a, b)[0, 1]) for a, b in mouths.by_clip)
        report.mouth_best_lag = int(
            LAGS[int(np.argmax([_lagged(mouths.by_clip, lag) for lag in LAGS]))]
        )
    if mouths.closed:
        report.bilabials_closed = float(np.mean(mouths.closed))
    if errors:
        report.contacts = len(errors)
        report.onset_within_5ms = float(np.mean(np.abs(errors) <= ONSET))
        report.onset_worst_ms = 1000 * float(np.abs(errors).max())
    if seen:
        report.contacts_seen = float(np.mean(seen))


class _Mouths:
    """Openings (F,) in pixels and truth of each clip, and whether the lips were seen closed on each
    bilabial.
    """

    def __init__(self) -> None:
        self.by_clip: list[tuple[np.ndarray, np.ndarray]] = []
        self.closed: list[bool] = []

    def add(self, identity: Identity, item: dict[str, Any]) -> None:
        frames = item["video"].numpy()
        fps = float(item["fps"])
        points = item["lip_points"]
        seen = np.array(
            [mouth_opening_from_pixels(f, identity, p) for f, p in zip(frames, points, strict=True)]
        )
        self.by_clip.append((seen, mouth_opening(identity, item["mouth"])))
        for phone in item["phones"]:
            frame = int((phone.start + phone.end) / 2 * fps)
            if viseme_of(phone.symbol) == ("PP",) and frame < len(frames):
                self.closed.append(bool(seen[frame] < CLOSED))


def _lagged(clips: list[tuple[np.ndarray, np.ndarray]], lag: int) -> float:
    """Correlation with the truth `lag` frames later, edges left out."""
    edge = max(LAGS)
    seen = np.concatenate([a[edge:-edge] for a, _ in clips])
    truth = np.concatenate([np.roll(b, lag)[edge:-edge] for _, b in clips])
    return float(np.corrcoef(seen, truth)[0, 1])


def presenter(corpus: PresenterCorpus, item: dict[str, Any]) -> Identity:
    """The presenter of a speech clip, drawn again from the clip's own random numbers."""
    rng = np.random.default_rng([corpus.seed, SPLITS.index(corpus.split), item["index"]])
    rng.random()
    face = rng.spawn(5)[1]
    split = "test" if corpus.split == "test_voices" else corpus.split
    identity = sample_identity(face, item["attributes"]["gender"], split)
    assert identity_key(identity) == item["attributes"]["identity"], (
        "the corpus draws presenters in another way now"
    )
    return identity


def _onset_errors(item: dict[str, Any]) -> list[float]:
    """Heard minus true time of each contact, in seconds."""
    from avdiff.evaluation.metrics.audio import onset_seconds

    sound = item["audio"][0].numpy()
    rate = item["sample_rate"]
    return [onset_seconds(sound, time, rate) - time for time in item["contacts"]]


def _contacts_seen(item: dict[str, Any]) -> list[bool]:
    """Whether each contact is seen in the pixels within half a frame; [] without weights of the
    contact detector.
    """
    from avdiff.evaluation.metrics.events import load_reader, match, visual_contacts

    fps = float(item["fps"])
    try:
        reader = load_reader()
    except ValueError:
        return []
    found = visual_contacts(item["video"].numpy(), fps, reader)
    met = {i for i, _ in match(np.array(item["contacts"]), found, 0.5 / fps)}
    return [i in met for i in range(len(item["contacts"]))]


def voice_shifts(bank: SpeechCorpus, languages: Sequence[str] | None = None) -> dict[str, float]:
    """ "language voice" -> milliseconds by which its labels should come later; a blend counts as
    its first voice.
    """
    groups: dict[str, list[Any]] = defaultdict(list)
    for utterance in bank:
        if not languages or utterance.lang in languages:
            groups[f"{utterance.lang} {utterance.voice.split('*')[0].split('+')[0]}"].append(
                utterance
            )
    return {
        voice: 1000 * best_shift((bank.audio(u), u.phones) for u in members[:MOST_SENTENCES])[0]
        for voice, members in sorted(groups.items())
        if len(members) >= LEAST_SENTENCES
    }


def _measure_digits(bank: SpeechCorpus, most: int, report: CorpusReport) -> None:
    """Words that a recognizer with a digit grammar gets wrong; left out where pocketsphinx is not
    installed.
    """
    from avdiff.evaluation.metrics.audio import DigitReader, word_errors

    strings = [u for u in bank if is_digit_string(u)][:most]
    try:
        reader = DigitReader()
    except ValueError:
        return
    wrong = sum(word_errors(u.text.split(), reader.words(bank.audio(u))) for u in strings)
    report.digit_strings = len(strings)
    report.digit_wer = wrong / sum(len(u.text.split()) for u in strings) if strings else None


def rows(report: CorpusReport) -> list[tuple[str, str, str]]:
    """(what, measured, wanted) for a table."""
    shifts = np.array(list(report.voices.values()) or [np.nan])
    worst = max(report.voices, key=lambda v: abs(report.voices[v]), default="none")

    def cell(value: float | None, form: str = ".4f") -> str:
        return "-" if value is None else format(value, form)

    return [
        (
            "clips (speech)",
            f"{report.clips} ({report.speech_clips}), {report.seconds_of_clips:.0f} s",
            "",
        ),
        ("mouth in the pixels against truth, r", cell(report.mouth_r), "0.98"),
        ("  worst clip", cell(report.mouth_r_lowest), ""),
        ("  best lag, frames", cell(report.mouth_best_lag, "d"), "0"),
        (f"bilabials closed, of {report.bilabials}", cell(report.bilabials_closed), "0.98"),
        (f"event onsets within 5 ms, of {report.contacts}", cell(report.onset_within_5ms), "1.0"),
        ("  worst, ms", cell(report.onset_worst_ms, ".1f"), "5"),
        ("  contacts seen within half a frame", cell(report.contacts_seen), "0.98"),
        (
            f"phone labels against sound, {len(report.voices)} voices, mean shift, ms",
            f"{shifts.mean():+.1f}",
            "",
        ),
        (f"  worst voice ({worst}), ms", f"{shifts[np.abs(shifts).argmax()]:+.1f}", "10"),
        (
            f"digit word errors, {report.digit_strings} strings",
            cell(report.digit_wer, ".3f"),
            "0.05",
        ),
        ("clips a CPU second", cell(report.clips_per_cpu_second, ".1f"), "8 (2.5 s clips)"),
    ]


def print_report(report: CorpusReport) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measure", "here", "wanted")
    for row in rows(report):
        table.add_row(*row)
    Console().print(table)


def save_report(report: CorpusReport, path: str | os.PathLike[str]) -> None:
    """Write the JSON, aside first."""
    target = Path(path)
    temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
    temporary_path.write_text(
        json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n", encoding="utf8"
    )
    os.replace(temporary_path, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="clips to make and measure")
    parser.add_argument(
        "--bank", help="speech bank folder; default $AVDIFF_BANK, else the mini-bank"
    )
    parser.add_argument("--split", default="train", choices=SPLITS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=128, help="pixels on a side")
    parser.add_argument("--json", help="file to write")
    options = parser.parse_args(arguments)
    report = measure_corpus(
        SpeechCorpus(options.bank, decoded=True),
        options.count,
        options.split,
        options.seed,
        size=options.size,
    )
    print_report(report)
    if options.json:
        save_report(report, options.json)


if __name__ == "__main__":
    main()
