"""How well pictures are kept: PSNR, sharpness in the mouth box, and whether the mouth opens when it
should.

Frames are uint8 (F, H, W, 3); points and boxes are shares of the picture, x to the right and y
down. Nothing here knows a generating model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
MARGIN = (
    0.35  # of the lips' width and height, on each side: the box holds the skin that moves with them
)
PROBE_SIZE = (24, 20)  # rows, columns of the patch that the opening is read from


def mouth_boxes(points: np.ndarray, margin: float = MARGIN) -> np.ndarray:
    """Boxes around lip landmarks: (..., K, 2) in [0, 1] -> (..., 4) float32 as (left, top, right,
    bottom) in [0, 1].

    The height counts at least half of the width, so that a closed mouth keeps a box worth looking
    at.
    """
    low = points.min(axis=-2)
    high = points.max(axis=-2)
    centre = (low + high) / 2
    size = high - low
    size[..., 1] = np.maximum(size[..., 1], size[..., 0] / 2)
    half = size * (0.5 + margin)
    return np.clip(np.concatenate([centre - half, centre + half], axis=-1), 0.0, 1.0).astype(
        np.float32
    )


def box_mask(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centre is in the box: (F, 4) -> (F, H, W) bool."""
    x = (np.arange(width) + 0.5) / width
    y = (np.arange(height) + 0.5) / height
    left, top, right, bottom = (boxes[:, i, None] for i in range(4))
    return ((y >= top) & (y < bottom))[:, :, None] & ((x >= left) & (x < right))[:, None, :]


def psnr(reference: np.ndarray, other: np.ndarray, boxes: np.ndarray | None = None) -> float:
    """Peak signal-to-noise ratio of a clip in dB (peak 255), over all pixels or over those in the
    boxes (F, 4).

    Raises:
        ValueError: the shapes differ.
    """
    _same_shape(reference, other)
    error = np.square(reference.astype(np.float32) - other.astype(np.float32)).mean(
        axis=-1
    )  # (F, H, W)
    if boxes is not None:
        error = error[box_mask(boxes, *error.shape[1:])]
    return float(10 * np.log10(255.0**2 / max(float(error.mean()), 1e-10)))


def gradient_energy(frames: np.ndarray, boxes: np.ndarray | None = None) -> float:
    """Mean squared step of luma to the next pixel, right and down; in the boxes only if given. Blur
    lowers it.
    """
    luma = frames.astype(np.float32) @ LUMA  # (F, H, W)
    energy = np.zeros_like(luma)
    energy[:, :, :-1] += np.square(np.diff(luma, axis=2))
    energy[:, :-1] += np.square(np.diff(luma, axis=1))
    if boxes is not None:
        energy = energy[box_mask(boxes, *energy.shape[1:])]
    return float(energy.mean())


def correlation(
    one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray, lag: int = 0
) -> float:
    """Pearson correlation of one[i] with two[i + lag]; nan when either does not move or fewer than
    3 points overlap.
    """
    a = np.asarray(one, np.float64)
    b = np.asarray(two, np.float64)
    if len(a) != len(b):
        raise ValueError(f"two has {len(b)} values: needs {len(a)}, as many as one")
    a, b = (a[: len(a) - lag], b[lag:]) if lag >= 0 else (a[-lag:], b[:lag])
    if len(a) < 3 or a.std() < 1e-9 or b.std() < 1e-9:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def best_lag(
    one: Sequence[float] | np.ndarray, two: Sequence[float] | np.ndarray, reach: int = 5
) -> int:
    """Lag in [-reach, reach] at which `correlation` peaks; > 0: `two` is late."""
    scores = {lag: correlation(one, two, lag) for lag in range(-reach, reach + 1)}
    known = {lag: score for lag, score in scores.items() if score == score}
    return max(known, key=lambda lag: known[lag]) if known else 0


@dataclass(frozen=True)
class OpeningProbe:
    """Reads the mouth opening off pixels: kernel ridge regression on a small patch around the
    mouth.

    A probe is fitted to originals once and then shown originals (the ceiling) and round trips
    alike. The patch is placed by a box that is the same for a whole clip, so that the box itself
    does not tell the opening.
    """

    centre: np.ndarray  # (D,)
    scale: float
    anchors: np.ndarray  # (M, D) patches the kernel compares with
    weights: np.ndarray  # (M + 1,)

    @classmethod
    def fit(
        cls,
        clips: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]],
        anchors: int = 1500,
        ridge: float = 1e-3,
        seed: int = 0,
    ) -> OpeningProbe:
        """Fit to (frames (F, H, W, 3), lip points (F, K, 2), opening (F,)) of many clips.

        Raises:
            ValueError: no clips.
        """
        patches = []
        targets = []
        for frames, points, opening in clips:
            patches.append(mouth_patches(frames, points))
            targets.append(np.asarray(opening, np.float64))
        if not patches:
            raise ValueError("clips: needs at least one clip to fit the probe to")
        x = np.concatenate(patches)
        y = np.concatenate(targets)
        centre = x.mean(axis=0)
        scale = float(np.square(x - centre).sum(axis=1).mean()) * 2
        chosen = np.random.default_rng(seed).permutation(len(x))[:anchors]
        probe = cls(centre, scale, x[chosen] - centre, np.zeros(len(chosen) + 1))
        features = probe._features(x)
        gram = features.T @ features + ridge * len(x) * 1e-3 * np.eye(features.shape[1])
        return cls(centre, scale, probe.anchors, np.linalg.solve(gram, features.T @ y))

    def measure(self, frames: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Opening in each frame, (F,), in the unit of the targets."""
        return self._features(mouth_patches(frames, points)) @ self.weights

    def _features(self, patches: np.ndarray) -> np.ndarray:
        x = patches - self.centre
        distance = (
            np.square(x).sum(1)[:, None] - 2 * x @ self.anchors.T + np.square(self.anchors).sum(1)
        )
        return np.concatenate(
            [np.exp(-np.maximum(distance, 0) / self.scale), np.ones((len(x), 1))], axis=1
        )


def mouth_patches(frames: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Patches around the mouth, one box a clip, each made free of brightness and contrast: (F, rows
    * columns * 3).
    """
    boxes = mouth_boxes(points)
    box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
    height, width = frames.shape[1:3]
    rows = _samples(box[1] * height, box[3] * height, PROBE_SIZE[0], height)
    columns = _samples(box[0] * width, box[2] * width, PROBE_SIZE[1], width)
    patch = _interpolate(_interpolate(frames.astype(np.float64), rows, axis=1), columns, axis=2)
    flat = patch.reshape(len(frames), -1)
    centred = flat - flat.mean()  # over the clip: the mean of one frame tells the opening
    return centred / (centred.std() + 1e-6)


def _samples(start: float, stop: float, count: int, limit: int) -> np.ndarray:
    centres = start + (np.arange(count) + 0.5) * (stop - start) / count - 0.5
    return np.clip(centres, 0, limit - 1)


def _interpolate(x: np.ndarray, at: np.ndarray, axis: int) -> np.ndarray:
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, x.shape[axis] - 1)
    shape = [1] * x.ndim
    shape[axis] = -1
    share = (at - low).reshape(shape)
    return np.take(x, low, axis) * (1 - share) + np.take(x, high, axis) * share


def _same_shape(reference: np.ndarray, other: np.ndarray) -> None:
    if reference.shape != other.shape:
        raise ValueError(
            f"other has shape {other.shape}: needs {reference.shape}, as the reference"
        )
