"""The three evaluators as measurements use them: phones that are heard, what a drawn face shows,
whether lips fit sound.

    phones = phone_times(audio, 24000)                     # tuple of timed phones, silence included
    reading = read_faces(frames)                           # face box, lip points, mouth shape,
    attributes curve = sync_curve(reading.points, times, audio, 24000)
    curve.offset                                           # seconds; positive: the audio is late

Weights are loaded once from `avdiff/bundled/<evaluator>`; an evaluator may also be given. Nothing
here knows a generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align, resample

from avdiff.files import BUNDLED
from avdiff.models.evaluators.face_reader import FaceReader, to_pictures
from avdiff.models.evaluators.lip_network import RATE, LipNetwork, lips_on_clock
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import SILENCE, Phone, inventory, phone_id

EVALUATORS: dict[str, type[Any]] = {
    "recognizer": PhoneRecognizer,
    "face_reader": FaceReader,
    "lip_network": LipNetwork,
}
SHORTEST_PAUSE = 0.06  # s; shorter gaps between phones are shared by their neighbours
REACH = 0.6  # s; 15 frames at 25 fps, as SyncNet's command line searches


# ------------------------------------------------------------------------------------------ weights
@cache
def load(name: str, folder: str | Path | None = None) -> Any:
    """An evaluator, ready to use, fp32 in eval mode; the same object at each call.

    Args:
        name: recognizer, face_reader or lip_network. folder: of other weights than the bundled
            ones.

    Raises:
        ValueError: an unknown evaluator, or no weights there.
    """
    if name not in EVALUATORS:
        raise ValueError(f"name={name!r}: needs one of {', '.join(EVALUATORS)}")
    place = Path(folder) if folder else BUNDLED / name
    if not (place / "config.json").is_file():
        raise ValueError(
            f"{name}: no weights in {place}; train them with "
            f"avdiff.train.evaluators.train_evaluator --evaluator {name}"
        )
    return (
        EVALUATORS[name]
        .from_pretrained(place, torch_dtype=torch.float32)
        .eval()
        .requires_grad_(False)
    )


def weight_hash(name: str, folder: str | Path | None = None) -> str:
    """First 12 hex digits of the SHA-256 of an evaluator's weights, for the header of a report."""
    place = Path(folder) if folder else BUNDLED / name
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{name}: no weights in {place}")
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


# ------------------------------------------------------------------------------------------- phones
def edit_distance(one: Sequence[Any], two: Sequence[Any]) -> int:
    """Fewest substitutions, insertions and deletions that turn one row into the other (Levenshtein
    1966).

    A whole row of the table at a time: an insertion costs 1 a step, so the best chain of insertions
    up to column j is the running minimum of (cost - column), plus j.
    """
    codes: dict[Any, int] = {}
    first, second = (
        np.array([codes.setdefault(item, len(codes)) for item in row], np.int64)
        for row in (one, two)
    )
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for number, item in enumerate(first, start=1):
        best = np.empty_like(row)
        best[0] = number
        best[1:] = np.minimum(row[1:] + 1, row[:-1] + (second != item))
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def phone_error_rate(pairs: Iterable[tuple[Sequence[Any], Sequence[Any]]]) -> float:
    """Edits over reference phones, summed over all (reference, heard) pairs; may exceed 1.

    Raises:
        ValueError: no reference phones.
    """
    rows = list(pairs)
    total = sum(len(reference) for reference, _ in rows)
    if not total:
        raise ValueError("pairs: needs at least one reference phone")
    return sum(edit_distance(reference, heard) for reference, heard in rows) / total


def best_phones(found: Tensor) -> list[int]:
    """Log probabilities (T, P) -> phone ids: the likeliest of each frame, runs as one, silence
    dropped.
    """
    return [label for label, _ in groupby(found.argmax(dim=-1).tolist()) if label]


def align(found: Tensor, phones: Sequence[int]) -> list[tuple[int, int]]:
    """First and last-but-one frame of each phone on the likeliest CTC path that spells `phones`.

    Args:
        found: log probabilities (T, P), class 0 the blank. phones: ids above 0, in order.

    Raises:
        ValueError: more phones than fit in T frames (equal neighbours need a frame between them).
    """
    if not phones:
        return []
    least = len(phones) + sum(a == b for a, b in pairwise(phones))
    if least > len(found):
        raise ValueError(
            f"phones: {len(phones)} of them need {least} frames, the audio has {len(found)}"
        )
    path, _ = forced_align(found[None].contiguous(), torch.tensor([list(phones)]), blank=0)
    spans: list[tuple[int, int]] = []
    start = 0
    for label, run in groupby(path[0].tolist()):
        length = len(list(run))
        if label:
            spans.append((start, start + length))
        start += length
    return spans


def as_waveform(audio: np.ndarray, sample_rate: int, wanted: int) -> Tensor:
    """Audio (S,) or (channels, S) in [-1, 1] -> mono (S',) at the wanted rate.

    Raises:
        ValueError: another shape, no samples, or a sample rate that is not positive.
    """
    samples = torch.as_tensor(np.ascontiguousarray(audio), dtype=torch.float32)
    if samples.ndim not in (1, 2) or not samples.numel() or sample_rate <= 0:
        raise ValueError(
            f"audio has shape {tuple(samples.shape)} at {sample_rate} Hz: needs (samples,) or "
            "(channels, samples), and a sample rate in Hz"
        )
    mono = samples if samples.ndim == 1 else samples.mean(dim=0)
    return mono if sample_rate == wanted else resample(mono, sample_rate, wanted)


def recognise(
    audio: np.ndarray, sample_rate: int, recognizer: PhoneRecognizer | None = None
) -> list[str]:
    """Phones heard in audio (S,) or (channels, S): base symbols without stress, tone, length or
    silence.
    """
    evaluator = recognizer or load("recognizer")
    found = evaluator.listen(as_waveform(audio, sample_rate, evaluator.config.sample_rate))
    return [evaluator.config.phones[label] for label in best_phones(found)]


def spoken_symbols(phones: Iterable[Phone]) -> list[str]:
    """Timed phones -> what the recognizer should hear: symbols of the inventory, silence
    dropped.
    """
    names = inventory()[0]
    return [names[label] for label in (phone_id(phone.symbol) for phone in phones) if label]


def phone_times(
    audio: np.ndarray,
    sample_rate: int,
    phones: Sequence[str] | None = None,
    recognizer: PhoneRecognizer | None = None,
) -> tuple[Phone, ...]:
    """When each phone sounds.

    Args:
        audio: (S,) or (channels, S). phones: symbols that are known to be spoken; None takes those
            recognised.

    Returns:
        Phones that tile the audio; gaps shorter than `SHORTEST_PAUSE` are shared by their
        neighbours, others silence.

    Raises:
        ValueError: a symbol that the recognizer does not know, or more phones than the audio can
            hold.
    """
    evaluator = recognizer or load("recognizer")
    names = list(evaluator.config.phones)
    wave = as_waveform(audio, sample_rate, evaluator.config.sample_rate)
    found = evaluator.listen(wave)
    for symbol in phones or ():
        if symbol not in names:
            raise ValueError(f"phones: {symbol!r} is not in the recognizer's inventory")
    ids = best_phones(found) if phones is None else [i for i in map(names.index, phones) if i]
    spans = [
        (first / evaluator.frame_rate, last / evaluator.frame_rate)
        for first, last in align(found, ids)
    ]
    return _tile([names[i] for i in ids], spans, len(wave) / evaluator.config.sample_rate)


def _tile(
    symbols: Sequence[str], spans: Sequence[tuple[float, float]], seconds: float
) -> tuple[Phone, ...]:
    """Phones with gaps -> phones that tile [0, seconds]."""
    edges = [[start, min(end, seconds)] for start, end in spans]
    for left, right in pairwise(edges):
        if right[0] - left[1] < SHORTEST_PAUSE:
            left[1] = right[0] = (left[1] + right[0]) / 2
    row = []
    now = 0.0
    for symbol, (start, end) in zip(symbols, edges, strict=True):
        if start > now:
            row.append(Phone(SILENCE, now, start))
        row.append(Phone(symbol, start, end))
        now = end
    return (*row, Phone(SILENCE, now, seconds)) if now < seconds else tuple(row)


# -------------------------------------------------------------------------------------------- faces
@dataclass(frozen=True)
class FaceReading:
    """What a clip of one drawn presenter shows. Coordinates are shares of the longer side of the
    picture.

    Args:
        face: probability that there is a face (F,). box: left top right bottom (F, 4).
        points: lip points (F, 20, 2). mouth: jaw, width, round in [0, 1] (F, 3). All NaN where
            there is no face.
        viseme: class of each picture (F,), "" without a face.
        attributes: name -> value for the clip. certainty: name -> probability of that value.
    """

    face: np.ndarray
    box: np.ndarray
    points: np.ndarray
    mouth: np.ndarray
    viseme: tuple[str, ...]
    attributes: dict[str, str]
    certainty: dict[str, float]


@torch.no_grad()
def read_faces(
    frames: np.ndarray, reader: FaceReader | None = None, batch: int = 32
) -> FaceReading:
    """Read the drawn presenter in a clip, uint8 (F, H, W, 3).

    Raises:
        ValueError: another shape or type.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise ValueError(
            f"frames has shape {frames.shape} and type {frames.dtype}: needs uint8 (F, H, W, 3)"
        )
    evaluator = reader or load("face_reader")
    parts = [
        evaluator(
            to_pictures(
                torch.from_numpy(np.ascontiguousarray(frames[i : i + batch])).to(evaluator.device)
            )
        )
        for i in range(0, len(frames), batch)
    ]
    face = torch.cat([place.face for place, _ in parts]).sigmoid().cpu().numpy()
    seen = face > 0.5
    box, points, shape, viseme = (
        torch.cat(rows).cpu().numpy()
        for rows in zip(
            *(
                (place.box, mouth.points, mouth.shape, mouth.viseme.argmax(-1))
                for place, mouth in parts
            ),
            strict=True,
        )
    )
    for values in (box, points, shape):
        values[~seen] = np.nan
    attributes = {}
    certainty = {}
    for name, values in evaluator.config.attributes.items():
        logits = torch.cat([place.attributes[name] for place, _ in parts])[torch.from_numpy(seen)]
        if len(logits):  # pictures vote with their log probabilities
            likely = logits.log_softmax(-1).mean(0).softmax(-1)
            attributes[name], certainty[name] = values[int(likely.argmax())], float(likely.max())
    names = evaluator.config.visemes
    shown = tuple(names[int(v)] if s else "" for v, s in zip(viseme, seen, strict=True))
    return FaceReading(face, box, points, shape, shown, attributes, certainty)


# --------------------------------------------------------------------------------------------- sync
@dataclass(frozen=True)
class SyncCurve:
    """Agreement of lips and sound at each lag.

    A positive lag means that the audio is late: what the lips say at t is heard at t + lag.

    Args:
        lags: seconds (L,), 20 ms apart, 0 in the middle. scores: cosine of lips and sound over the
            overlap (L,).
        overlap: seconds of seen lips that the score at lag 0 is taken over.
    """

    lags: np.ndarray
    scores: np.ndarray
    overlap: float

    @property
    def offset(self) -> float:
        """Lag of the best score, seconds, refined between the steps by a parabola; positive: audio
        late.
        """
        best = int(np.argmax(self.scores))
        if not 0 < best < len(self.scores) - 1:
            return float(self.lags[best])
        before, peak, after = self.scores[best - 1 : best + 2]
        bend = before - 2 * peak + after
        step = 0.5 * (before - after) / bend if bend < 0 else 0.0
        return float(self.lags[best] + step * (self.lags[1] - self.lags[0]))

    @property
    def score(self) -> float:
        """Best score over all lags, -1 to 1."""
        return float(self.scores.max())

    @property
    def score_at_zero(self) -> float:
        """Score of the clip as it is."""
        return float(self.scores[len(self.scores) // 2])

    @property
    def confidence(self) -> float:
        """Best score over the median of all, as SyncNet's confidence; says little about a single
        clip.
        """
        return float(self.scores.max() - np.median(self.scores))


def lag_curve(lips: np.ndarray, seen: np.ndarray, sound: np.ndarray, reach: int) -> np.ndarray:
    """Cosine of the rows lips[t] and sound[t + lag] over all t that both have, for lags
    -reach..reach: (2 reach + 1,).

    Args:
        lips, sound: vectors (T, E). seen: (T,) bool, frames whose lips count.
    """
    frames = min(len(lips), len(sound))
    lips = np.where(seen[:frames, None], lips[:frames], 0.0).astype(np.float64)
    sound = sound[:frames].astype(np.float64)
    own = (lips**2).sum(1)
    other = (sound**2).sum(1)
    mask = seen[:frames].astype(np.float64)
    table = lips @ sound.T  # (T, T)
    scores = np.zeros(2 * reach + 1)
    for place, lag in enumerate(range(-reach, reach + 1)):
        first = max(0, -lag)
        last = min(frames, frames - lag)
        if last - first < 2:
            continue
        power = own[first:last].sum() * (mask[first:last] * other[first + lag : last + lag]).sum()
        scores[place] = np.trace(table, offset=lag) / np.sqrt(power + 1e-12)
    return scores


def sync_curve(
    points: np.ndarray,
    times: np.ndarray,
    audio: np.ndarray,
    sample_rate: int,
    reach: float = REACH,
    network: LipNetwork | None = None,
) -> SyncCurve:
    """Agreement of lip points with audio over lags.

    Args:
        points: (F, 20, 2) in one unit for x and y, NaN where no face was found; see
            `avdiff.models.evaluators.lip_network.lips_of_mesh` for real faces.
        times: (F,) seconds on the audio's clock, any frame rate: the moment that each picture
            shows, in general the middle of its interval, `pts + 0.5 / fps`.
        audio: (S,) or (channels, S); its first sample is at time 0. sample_rate: Hz. reach: largest
            lag in seconds.

    Raises:
        ValueError: shapes that do not fit, lips seen for less than 0.4 s, or a reach that the clip
            is too short for.
    """
    evaluator = network or load("lip_network")
    wave = as_waveform(audio, sample_rate, evaluator.config.sample_rate)
    step = evaluator.config.sample_rate // RATE
    frames = len(wave) // step
    steps = round(reach * RATE)
    lips, seen = lips_on_clock(points, times, frames / RATE)
    if seen.sum() < 0.4 * RATE or frames < 2 * steps:
        raise ValueError(
            f"lips are seen for {seen.sum() / RATE:.2f} s of {frames / RATE:.2f} s: needs at "
            "least 0.4 s, "
            f"and twice the reach of {reach} s in all"
        )
    with torch.no_grad():
        mask = torch.from_numpy(seen)[None].to(evaluator.device)
        shown = (
            evaluator.see(torch.from_numpy(lips)[None].to(evaluator.device), mask)[0].cpu().numpy()
        )
        heard = (
            evaluator.hear(
                evaluator.mel_frontend(wave[None, : frames * step].to(evaluator.device))
            )[0]
            .cpu()
            .numpy()
        )
    scores = lag_curve(shown, seen, heard, steps)
    return SyncCurve(np.arange(-steps, steps + 1) / RATE, scores, cast(float, seen.sum() / RATE))
