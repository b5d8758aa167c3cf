"""How like real clips a set of clips is: Fréchet and kernel distances in declared feature spaces.

    print_fidelity(fidelity(real_clips, made_clips))

Numbers of this kind depend on the features and on how many clips there are, so they are never given
alone: beside the distance of made to real stands that of real to real, with as many clips, and each
    has an interval. Too few clips are
refused. Feature spaces, all of frozen evaluators or plain statistics:

- looks: the face reader's deepest map, mean over the picture and over eight pictures of the clip.
- motion: mean and spread over time of the lip network's vectors of the lips.
- speech: mean and spread over time of the recognizer's last hidden layer.
- mel: mean and spread over time of 100 log-mel bands: no network.

Each is brought to 32 numbers by a fixed random projection (seed 0), so that a covariance can be
estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from avdiff.evaluation.metrics.visual_speech import frame_times
from avdiff.evaluation.suite import Evaluators
from avdiff.evaluators.load import as_waveform, read_faces
from avdiff.media.write import Clip
from avdiff.models.codecs.mel import LogMel
from avdiff.models.evaluators.face_reader import to_pictures, to_square
from avdiff.models.evaluators.lip_network import lips_on_clock

DIM = 32  # of the projected features
LEAST = {"frechet": 2 * DIM, "kernel": 16}  # clips on each side
PICTURES = 8
FOLDS = 10


# ----------------------------------------------------------------------------------------- features
def _over_time(values: Tensor) -> np.ndarray:
    """(T, D) -> mean and spread (2 D,)."""
    return torch.cat([values.mean(0), values.std(0, correction=0)]).cpu().numpy().astype(np.float64)


@torch.no_grad()
def looks(clip: Clip, by: Evaluators) -> np.ndarray:
    """Of the face reader."""
    assert clip.frames is not None
    chosen = clip.frames[np.linspace(0, len(clip.frames) - 1, PICTURES).round().astype(int)]
    reader = by.face_reader
    pictures = to_square(to_pictures(torch.from_numpy(np.ascontiguousarray(chosen))))
    return (
        reader.deep(reader.middle(reader.stem(pictures)))
        .mean(dim=(0, 2, 3))
        .numpy()
        .astype(np.float64)
    )


@torch.no_grad()
def motion(clip: Clip, by: Evaluators) -> np.ndarray:
    """Of the lip network."""
    assert clip.frames is not None and clip.fps is not None
    points = read_faces(clip.frames, by.face_reader).points
    lips, seen = lips_on_clock(points, frame_times(clip), len(clip.frames) / float(clip.fps))
    if seen.sum() < 2:
        raise ValueError("clip shows no face: its lips have no features")
    vectors = by.lip_network.see(torch.from_numpy(lips)[None], torch.from_numpy(seen)[None])[0]
    return _over_time(vectors[torch.from_numpy(seen)])


@torch.no_grad()
def speech(clip: Clip, by: Evaluators) -> np.ndarray:
    """Of the recognizer."""
    evaluator = by.recognizer
    assert clip.audio is not None and clip.sample_rate is not None
    kept: list[Tensor] = []
    hook = evaluator.fine_out.register_forward_hook(
        lambda _module, _inputs, output: kept.append(output)
    )
    try:
        evaluator.listen(as_waveform(clip.audio, clip.sample_rate, evaluator.config.sample_rate))
    finally:
        hook.remove()
    return _over_time(kept[0][0])


@torch.no_grad()
def mel(clip: Clip, by: Evaluators) -> np.ndarray:
    """Of no network."""
    assert clip.audio is not None and clip.sample_rate is not None
    wave = as_waveform(clip.audio, clip.sample_rate, 24000)
    whole = wave[: max(960, len(wave) // 240 * 240)]
    whole = torch.nn.functional.pad(whole, (0, -len(whole) % 240))
    return _over_time(LogMel(24000, 960, 240, 100)(whole[None])[0])


SPACES: dict[str, Callable[[Clip, Evaluators], np.ndarray]] = {
    "looks": looks,
    "motion": motion,
    "speech": speech,
    "mel": mel,
}


def features(
    clips: Iterable[Clip], by: Evaluators, spaces: Iterable[str] = tuple(SPACES)
) -> dict[str, np.ndarray]:
    """Features of each space: name -> (clips that have it, D). A clip without the modality, or a
    face, is left out.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in spaces}
    for clip in clips:
        for name, rows in found.items():
            needs = clip.frames if name in ("looks", "motion") else clip.audio
            if needs is None or not len(needs):
                continue
            try:
                rows.append(SPACES[name](clip, by))
            except ValueError:
                continue
    return {name: np.stack(rows) if rows else np.zeros((0, DIM)) for name, rows in found.items()}


# ---------------------------------------------------------------------------------------- distances
def project(real: np.ndarray, *others: np.ndarray) -> list[np.ndarray]:
    """All sets in the same 32 numbers: each feature to unit variance over `real`, then a fixed
    random projection.
    """
    centre = real.mean(0)
    spread = real.std(0) + 1e-6
    width = real.shape[1]
    away = np.random.default_rng(0).normal(size=(width, min(DIM, width)))
    basis = np.linalg.qr(away)[0] if width > DIM else np.eye(width)
    return [(x - centre) / spread @ basis for x in (real, *others)]


def frechet(one: np.ndarray, two: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of sets (n, D), (m, D) (Dowson and Landau
    1982).
    """
    mean = one.mean(0) - two.mean(0)
    first = np.cov(one, rowvar=False)
    second = np.cov(two, rowvar=False)
    # tr (C1 C2)^(1/2) = sum of the roots of the eigenvalues of C1 C2, which are real and not
    # negative
    roots = np.sqrt(np.clip(np.linalg.eigvals(first @ second).real, 0, None)).sum()
    return float(mean @ mean + np.trace(first) + np.trace(second) - 2 * roots)


def kernel(one: np.ndarray, two: np.ndarray) -> float:
    """Unbiased squared MMD with the kernel (x y / D + 1)^3 (Binkowski et al. 2018, KID); may be
    below 0.
    """
    width = one.shape[1]

    def k(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / width + 1) ** 3

    n = len(one)
    m = len(two)
    own = (k(one, one).sum() - np.trace(k(one, one))) / (n * (n - 1))
    other = (k(two, two).sum() - np.trace(k(two, two))) / (m * (m - 1))
    return float(own + other - 2 * k(one, two).mean())


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "frechet": frechet,
    "kernel": kernel,
}


@dataclass(frozen=True)
class Distance:
    """One distance with its 95 % interval, over `n` clips on each side."""

    value: float
    low: float
    high: float
    n: int


def measured(name: str, one: np.ndarray, two: np.ndarray) -> Distance:
    """A distance of two sets and its jackknife interval (ten folds left out in turn, Efron and
    Stein 1981).

    Not the bootstrap: repeated clips make a set look narrower than it is, and both distances read
    that as far.

    Raises:
        ValueError: too few clips.
    """
    least = LEAST[name]
    if min(len(one), len(two)) < least:
        raise ValueError(
            f"{name}: {len(one)} and {len(two)} clips; needs at least {least} on each side"
        )
    value = DISTANCES[name](one, two)
    parts = [
        DISTANCES[name](np.delete(one, np.s_[f::FOLDS], 0), np.delete(two, np.s_[f::FOLDS], 0))
        for f in range(FOLDS)
    ]
    half = 1.96 * math.sqrt(
        (FOLDS - 1) / FOLDS * float(np.square(np.array(parts) - np.mean(parts)).sum())
    )
    return Distance(value, value - half, value + half, min(len(one), len(two)))


@dataclass(frozen=True)
class Fidelity:
    """One space and distance: made against real, and real against real with as many clips; or why
    there is none.
    """

    space: str
    name: str
    made: Distance | None
    real: Distance | None
    refused: str = ""


def fidelity(
    real: Mapping[str, np.ndarray], made: Mapping[str, np.ndarray], seed: int = 0
) -> list[Fidelity]:
    """Distances in every space, on sets of one size.

    Args:
        real, made: of `features`. The real clips are split into two halves at random: one stands
            for the real ones, the other shows what distance 0 looks like; as many of the made ones
            are compared.
    """
    found: list[Fidelity] = []
    for space in made:
        if space not in real:
            continue
        order = np.random.default_rng(seed).permutation(len(real[space]))
        size = min(len(order) // 2, len(made[space]))
        chosen = np.random.default_rng(seed + 1).permutation(len(made[space]))[:size]
        for name in DISTANCES:
            if size < LEAST[name]:
                why = (
                    f"{len(real[space])} real and {len(made[space])} made clips: needs "
                    f"{2 * LEAST[name]} and "
                    f"{LEAST[name]}"
                )
                found.append(Fidelity(space, name, None, None, why))
                continue
            first, second, other = project(
                real[space][order[:size]], real[space][order[size : 2 * size]], made[space][chosen]
            )
            found.append(
                Fidelity(space, name, measured(name, first, other), measured(name, first, second))
            )
    return found


def print_fidelity(rows: Iterable[Fidelity]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("space", "distance", "made to real", "real to real", "clips")
    for row in rows:
        if row.made is None or row.real is None:
            table.add_row(row.space, row.name, row.refused, "", "")
            continue
        made, real = (f"{d.value:.4f} \\[{d.low:.4f}, {d.high:.4f}]" for d in (row.made, row.real))
        table.add_row(row.space, row.name, made, real, str(row.made.n))
    Console(highlight=False).print(table)
