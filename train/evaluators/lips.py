"""Training of the lip network: speech with the lips that the drawing gives it, seen through bad
landmarks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avdiff.corpus.augment import add_room
from avdiff.corpus.face.mouth import GAP
from avdiff.corpus.face.presenter import Identity, sample_identity
from avdiff.corpus.speech.concatenate import Concatenation, cut_piece, join_pieces
from avdiff.corpus.speech.read import SAMPLE_RATE, SpeechCorpus, Utterance
from avdiff.evaluators.load import lag_curve
from avdiff.models.evaluators.lip_network import RATE, LipNetwork, lag_scores, lips_on_clock
from avdiff.phonetics.visemes import viseme_track
from avdiff.train.evaluators.phones import some_noise
from avdiff.train.loop.dataloader import SeededDataset, row_generator
from avdiff.train.loop.task import Loss, Task

FRAME_RATES = (24000 / 1001, 24.0, 25.0, 30000 / 1001, 30.0, 50.0, 60.0)
PAUSES = (0.15, 0.6)  # s between sentences
STEP = SAMPLE_RATE // RATE  # samples a frame
MOUTH_WIDTH = 32.0  # of a drawn mouth, in units of the drawing


# ----------------------------------------------------------------------------------------- the lips
def _bernstein(t: np.ndarray) -> np.ndarray:
    """Weights of four control points at t (N,): (N, 4)."""
    return np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3], axis=1)


def _contour(
    half: np.ndarray,
    corner: np.ndarray,
    middle: np.ndarray,
    fullness: np.ndarray,
    steps: int,
    peak: np.ndarray | None = None,
    dip: float = 0.0,
) -> np.ndarray:
    """One edge of a lip in every picture, from corner to corner: (F, 2 steps + 1, 2)."""
    rise = middle - corner
    near = -half * (0.74 + 0.26 * fullness)
    third = (-half * 0.56, middle) if peak is None else (-half * peak, middle - dip * 1.1)
    top = middle if peak is None else middle + dip
    x = np.stack([-half, near, third[0], np.zeros_like(half)], axis=1)
    y = np.stack([corner, corner + rise * (0.62 - 0.06 * fullness), third[1], top], axis=1)
    weights = _bernstein(np.arange(steps + 1) / steps)
    left = np.stack([x, y], axis=2).transpose(0, 2, 1) @ weights.T  # (F, 2, steps + 1)
    right = left[:, :, -2::-1] * np.array((-1.0, 1.0))[:, None]
    return np.concatenate([left, right], axis=2).transpose(0, 2, 1)


def lip_tracks(identity: Identity, mouths: np.ndarray) -> np.ndarray:
    """The drawing's `lip_points` of many pictures at once, in the mouth's frame: mouths (F, 6) ->
    (F, 20, 2).
    """
    jaw, width, rounding, _, _, tuck = mouths.astype(np.float64).T
    gap = GAP * jaw
    inner = (11.8 + 3.8 * width) * (1 - 0.40 * rounding) * (1 - 0.08 * jaw) * identity.mouth_size
    outer = inner + 1.1 + 2.1 * rounding
    upper = -0.24 * gap - 1.6 * tuck
    lower = upper + gap
    corner = 0.22 * gap - 2.3 * np.maximum(0.0, 1 - 2.5 * jaw) * (1 - rounding)
    fullness = np.maximum(rounding, 0.25 + 0.6 * jaw)
    weight = identity.lip_weight
    above = (2.8 + 1.4 * rounding) * weight
    below = (4.3 + 1.2 * rounding) * weight * (1 - 0.50 * tuck)
    edges = [
        (
            _contour(
                outer,
                corner,
                upper - above,
                fullness * 0.8,
                3,
                0.36 + 0.10 * rounding,
                0.9 * weight,
            ),
            _contour(outer, corner, lower + below, np.maximum(fullness, 0.45), 3),
        ),
        (_contour(inner, corner, upper, fullness, 2), _contour(inner, corner, lower, fullness, 2)),
    ]
    return np.concatenate(
        [part for up, low in edges for part in (up[:, :-1], low[:, :0:-1])], axis=1
    )


def waves(
    rng: np.random.Generator,
    times: np.ndarray,
    deviation: float,
    periods: tuple[float, float] = (0.7, 4.0),
) -> np.ndarray:
    """A slow random function of time: (F,)."""
    rates = 2 * np.pi / rng.uniform(*periods, 3)
    phases = rng.uniform(0, 2 * np.pi, 3)
    return np.sin(rates[:, None] * times + phases[:, None]).sum(0) * deviation * (2 / 3) ** 0.5


def seen_badly(rng: np.random.Generator, points: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Lip points (F, 20, 2) in the mouth's frame as a tracker sees them on another face: NaN where
    it lost them.

    Another face opens its mouth less or more and has other lips; the head turns, so one side comes
    nearer and the mouth gets narrower; the expression drifts; each landmark is off by a little, for
    a while or from picture to picture.
    """
    mean = points.mean(axis=0)
    points = mean + (points - mean) * np.exp(rng.uniform(-0.9, 0.3)) * np.exp(
        rng.normal(0, 0.15, 2)
    )
    if (
        rng.random() < 0.4
    ):  # trackers that draw the inner contour too near to the outer one, or too far
        points = points + rng.uniform(-0.15, 0.3) * _towards_outer(points)
    across = points[..., 0] / MOUTH_WIDTH  # (F, 20), about -0.5 to 0.5
    yaw = waves(rng, times, rng.uniform(0, 0.35))
    pitch = waves(rng, times, rng.uniform(0, 0.2))
    smile = waves(rng, times, rng.uniform(0, 1.5))
    wide = waves(rng, times, rng.uniform(0, 0.05))
    x = (
        points[..., 0]
        * (np.cos(yaw + rng.normal(0, 0.25)) * (1 + wide))[:, None]
        * (1 + 0.3 * yaw[:, None] * across)
    )
    y = (
        points[..., 1] * np.cos(pitch)[:, None]
        + (4 * pitch[:, None] - 4 * smile[:, None]) * across**2
    )
    turned = np.stack([x + rng.uniform(-0.15, 0.15) * y, y], axis=-1) + rng.normal(
        0, 0.4, (1, *points.shape[1:])
    )
    white = rng.uniform(0, 0.035) * MOUTH_WIDTH * rng.random()
    turned += rng.normal(0, white, turned.shape) if white else 0.0
    slow = np.stack(
        [waves(rng, times, rng.uniform(0, 0.3), (0.3, 2.0)) for _ in range(8)], axis=1
    )  # (F, 8)
    turned += np.einsum("fk,kpc->fpc", slow, rng.normal(0, 0.35, (8, *turned.shape[1:])))
    if rng.random() < 0.25 and len(times) > 4:  # a tracker that smooths, without delay
        turned[1:-1] = (turned[:-2] + 2 * turned[1:-1] + turned[2:]) / 4
    for _ in range(
        int(rng.integers(0, 3)) if rng.random() < 0.3 else 0
    ):  # a hand, a turn too far, a cut
        start = int(rng.integers(len(times)))
        turned[start : start + int(rng.integers(1, 14))] = np.nan
    return turned


def _towards_outer(points: np.ndarray) -> np.ndarray:
    """For each inner point the way to the outer one next to it, 0 for outer points: (F, 20, 2)."""
    way = np.zeros_like(points)
    way[:, 12:] = points[:, [0, 2, 3, 4, 6, 8, 9, 10]] - points[:, 12:]
    return way


# ----------------------------------------------------------------------------------------- the data
class Pair(NamedTuple):
    """Sound (S,) with `reach` frames more than the lips on either side; lips (T, 40), seen (T,);
    lag in frames: what the lips say in frame t sounds in frame t + reach + lag of the sound.
    """

    sound: Tensor
    lips: Tensor
    seen: Tensor
    lag: Tensor


class LipPairs(SeededDataset[Pair]):
    """Passages of speech with badly seen lips; an item draws from torch's global generator.

    Args:
        bank: source. frames: T at 50 Hz. reach: R, largest lag in frames. split: of the identities.
        size: nominal number of items.
    """

    def __init__(
        self,
        bank: SpeechCorpus,
        frames: int = 100,
        reach: int = 40,
        split: str = "train",
        size: int = 4096,
    ) -> None:
        self.bank = bank
        self.frames = frames
        self.reach = reach
        self.split = split
        self.size = size
        self.by_voice: dict[tuple[str, str], list[Utterance]] = defaultdict(list)
        for utterance in bank:
            self.by_voice[utterance.lang, utterance.voice].append(utterance)

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, seed: int) -> Pair:
        rng = row_generator(seed)
        lag = int(rng.integers(-self.reach // 2, self.reach // 2 + 1))
        wide = self.frames + 2 * self.reach
        passage = self.passage(rng, wide / RATE)
        start = (self.reach + lag) / RATE
        fps = float(rng.choice(FRAME_RATES))
        times = start + (np.arange(int(self.frames / RATE * fps) + 2) - rng.random()) / fps
        times = times + rng.uniform(-0.15, 0.15, len(times)) / fps if rng.random() < 0.15 else times
        identity = sample_identity(rng, passage.utterances[0].gender, self.split)
        lips = seen_badly(rng, lip_tracks(identity, viseme_track(passage.phones, times)), times)
        features, seen = lips_on_clock(lips, times - start, self.frames / RATE)
        sound = torch.from_numpy(self.heard(rng, passage.audio))
        return Pair(sound, torch.from_numpy(features), torch.from_numpy(seen), torch.tensor(lag))

    def passage(self, rng: np.random.Generator, seconds: float) -> Concatenation:
        """Sentences of one voice that fill `seconds`; the first may have begun before."""
        first = self.bank[int(rng.integers(len(self.bank)))]
        others = self.by_voice[first.lang, first.voice]
        lead = float(rng.uniform(0, 0.6))
        pieces = [cut_piece(first)]
        pauses = [0.0]
        filled = lead
        filled += pieces[0].seconds
        while filled < seconds:
            pauses.append(float(rng.uniform(*PAUSES)))
            pieces.append(cut_piece(others[int(rng.integers(len(others)))]))
            filled += pauses[-1] + pieces[-1].seconds
        return join_pieces(pieces, pauses, lead, round(seconds * SAMPLE_RATE))

    def heard(self, rng: np.random.Generator, audio: np.ndarray) -> np.ndarray:
        """Another level and microphone noise; a room for a fifth, clear noise for a third."""
        loudness = float(np.sqrt(np.mean(audio**2)) + 1e-6)
        if rng.random() < 0.2:
            audio = add_room(rng, audio, SAMPLE_RATE)
        ratio = rng.uniform(0, 25) if rng.random() < 0.35 else rng.uniform(30, 60)
        audio = audio + some_noise(rng, len(audio)) * np.float32(loudness * 10 ** (-ratio / 20))
        return np.clip(audio * np.float32(10 ** (rng.uniform(-18, 4) / 20)), -1, 1)


# ----------------------------------------------------------------------------------------- the task
class LipNetworkTask(Task):
    """Trains `LipNetwork`: of all lags the true one, and of all clips the own one (InfoNCE,
    arXiv:1807.03748).

    Args:
        network: model. dataset: pairs. held_out: clips to measure on. windows: frames of the rows
            that are compared.
        swap_weight: weight of telling clips apart. softness: deviation of the target, frames.
    """

    def __init__(
        self,
        network: LipNetwork,
        dataset: LipPairs,
        held_out: Sequence[HeldOut],
        windows: Sequence[int] = (40, 70, 100),
        swap_weight: float = 0.5,
        softness: float = 1.0,
    ) -> None:
        self.network = network
        self.dataset = dataset
        self.held_out = held_out
        self.windows = tuple(windows)
        self.swap_weight = swap_weight
        self.softness = softness
        self.modules = {"lip_network": network}

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "windows": list(self.windows),
            "swap_weight": self.swap_weight,
        }

    def collate(self, rows: list[Pair]) -> Pair:
        return Pair(*(torch.stack(parts) for parts in zip(*rows, strict=True)))

    def loss(self, batch: Pair, phase: str, generator: torch.Generator) -> Loss:
        reach = self.dataset.reach
        frames = self.dataset.frames
        lips = self.network.see(batch.lips, batch.seen)  # (B, T, E)
        sound = self.network.hear(self.network.mel_frontend(batch.sound))  # (B, T + 2R, E)
        with torch.autocast(lips.device.type, enabled=False):
            own = lips.square().sum(dim=-1)
            mask = batch.seen.float()
            product, power = lag_scores(lips, sound, reach)
            power = power * mask[..., None]
            place = torch.arange(2 * reach + 1, device=lips.device) - reach - batch.lag[:, None]
            target = torch.exp(-0.5 * (place / self.softness) ** 2)
            target = target / target.sum(dim=1, keepdim=True)
            at = torch.arange(frames, device=lips.device) + reach + batch.lag[:, None]  # (B, T)
            aligned = sound.gather(1, at[..., None].expand(-1, -1, sound.shape[-1]))
            lag = []
            swap = []
            near = []
            for window in self.windows:
                first = int(
                    torch.randint(frames - window + 1, (), generator=generator, device=lips.device)
                )
                part = slice(first, first + window)
                energy = own[:, part].sum(dim=1)
                scores = product[:, part].sum(dim=1) * _inverse(
                    energy[:, None], power[:, part].sum(dim=1)
                )  # (B, L)
                logits = scores * self.network.sharpness.exp()
                lag.append(-(target * logits.log_softmax(dim=1)).sum(dim=1))
                near.append(
                    (place.gather(1, scores.argmax(dim=1)[:, None])[:, 0].abs() <= 2).float()
                )
                swap.append(self.swapped(lips[:, part], aligned[:, part], mask[:, part], energy))
        parts = {"lag": torch.stack(lag).mean(dim=0), "swap": torch.stack(swap).mean(dim=0)}
        return Loss(
            (parts["lag"] + self.swap_weight * parts["swap"]).mean(),
            parts,
            {f"within_frame_{w}": value for w, value in zip(self.windows, near, strict=True)},
        )

    def swapped(self, lips: Tensor, sound: Tensor, mask: Tensor, energy: Tensor) -> Tensor:
        """Cross-entropy of the own sound among those of all clips, and of the own lips: (B,)."""
        product = torch.einsum("bte,cte->bc", lips, sound)
        power = torch.einsum("bt,ct->bc", mask, sound.square().sum(dim=-1))
        logits = product * _inverse(energy[:, None], power) * self.network.sharpness.exp()
        own = torch.arange(len(logits), device=logits.device)
        return (
            F.cross_entropy(logits, own, reduction="none")
            + F.cross_entropy(logits.T, own, reduction="none")
        ) / 2

    def validate(self) -> dict[str, float]:
        """Offsets found and swaps told apart on held-out clips."""
        return measure_lip_network(self.network, self.held_out)


def _inverse(one: Tensor, two: Tensor) -> Tensor:
    """1 / sqrt(one * two), bounded where a window is empty."""
    return (one * two + 1e-6).rsqrt()


class HeldOut(NamedTuple):
    """A clip to measure on: sound (S,), lip points (F, 20, 2) and the times of the pictures
    (F,).
    """

    sound: np.ndarray
    points: np.ndarray
    times: np.ndarray


def held_out_clips(
    bank: SpeechCorpus,
    split: str,
    count: int,
    seconds: float = 3.0,
    fps: float = 25.0,
    seed: int = 0,
    noise: float = 0.004,
) -> list[HeldOut]:
    """Clips of speech with the drawing's lips, in sync, as the face reader sees them: off by
    `noise` of the picture.
    """
    source = LipPairs(bank, split=split)
    clips = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        passage = source.passage(rng, seconds)
        identity = sample_identity(rng, passage.utterances[0].gender, split)
        times = (np.arange(int(seconds * fps)) + 0.5) / fps
        points = lip_tracks(identity, viseme_track(passage.phones, times))
        clips.append(
            HeldOut(passage.audio, points + rng.normal(0, noise * 128, points.shape), times)
        )
    return clips


SHIFTS = (-10, -5, -3, 0, 3, 5, 10)  # frames of 40 ms


@torch.no_grad()
def measure_lip_network(
    network: LipNetwork,
    clips: Sequence[HeldOut],
    shifts: Sequence[int] = SHIFTS,
    reach: int = 30,
    most_swaps: int = 60,
) -> dict[str, float]:
    """Audio delayed by frames of 40 ms: share found within one frame; and true against swapped
    audio.

    Returns:
        within_frame (all shifts), within_frame_0, mean_error (ms), auc of the best score and
        auc_zero of the score at lag 0: true audio against that of the other clips (of the first
        `most_swaps`).
    """
    seconds = min(len(clip.sound) for clip in clips) / SAMPLE_RATE
    prepared = [lips_on_clock(clip.points, clip.times, seconds) for clip in clips]
    seen = np.stack([mask for _, mask in prepared])
    lips = network.see(
        torch.from_numpy(np.stack([rows for rows, _ in prepared])), torch.from_numpy(seen)
    ).numpy()
    sound = torch.from_numpy(np.stack([clip.sound[: int(seconds * RATE) * STEP] for clip in clips]))

    def hear(shift: int) -> np.ndarray:
        late = F.pad(
            sound, (2 * shift * STEP, -2 * shift * STEP)
        )  # the end, or the beginning, is lost
        return network.hear(network.mel_frontend(late)).numpy()

    errors = np.array(
        [
            [
                np.argmax(lag_curve(*row, reach)) - reach - 2 * shift
                for row in zip(lips, seen, hear(shift), strict=True)
            ]
            for shift in shifts
        ]
    )  # (shifts, N)
    heard = hear(0)
    some = slice(most_swaps)
    scores = np.stack(
        [
            [lag_curve(one, mask, two, reach) for two in heard[some]]
            for one, mask in zip(lips[some], seen[some], strict=True)
        ]
    )  # (N, N, L)
    own = np.eye(len(scores), dtype=bool)
    best = scores.max(axis=2)
    zero = scores[:, :, reach]
    report = {
        "within_frame": float((np.abs(errors) <= 2).mean()),
        "mean_error": float(np.abs(errors).mean() * 20),
        "auc": rank_auc(best[own], best[~own]),
        "auc_zero": rank_auc(zero[own], zero[~own]),
    }
    if 0 in shifts:
        report["within_frame_0"] = float((np.abs(errors[list(shifts).index(0)]) <= 2).mean())
    return report


def rank_auc(high: np.ndarray, low: np.ndarray) -> float:
    """Chance that a value of `high` is above one of `low`, ties count half."""
    wins = (high[:, None] > low[None]).mean() + 0.5 * (high[:, None] == low[None]).mean()
    return float(wins)
