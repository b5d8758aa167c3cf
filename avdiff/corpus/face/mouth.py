"""The mouth: contours of the lips from six parameters, and where they land in the picture.

Everything here is plain geometry, so that the drawing and the ground truth (`lip_points`) share it.
The design unit is 1/128 of the picture's side; the mouth has its own frame with the origin between
the corners and y down.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from avdiff.corpus.face.identity import RGB, Identity
from avdiff.corpus.face.motion import Pose

CANVAS = 128.0  # design units a side
HEAD = (64.0, 57.5)  # where the head's frame has its origin, in the picture
HEAD_SCALE = 1.09
MOUTH = (0.0, 20.0)  # where the mouth's frame has its origin, in the head
PIVOT_Y = 44.0  # the neck, about which the head tilts (head frame)
# shift of the foremost features at full yaw and pitch
DEPTH_X = 5.0
DEPTH_Y = 3.0
MOUTH_DEPTH = 0.85
GAP = 16.0  # opening of the lips at jaw 1
CAVITY: RGB = (72, 14, 26)
TEETH: RGB = (252, 250, 244)
TONGUES: tuple[RGB, RGB] = ((222, 96, 104), (250, 152, 160))
# points in `lip_points`
OUTER = 12
INNER = 8


class Curve(NamedTuple):
    """Cubic Bezier: rows p0 c1 c2 p3 in a (4, 2) array."""

    points: np.ndarray

    def at(self, t: np.ndarray) -> np.ndarray:
        """Points at t (K,) in [0, 1] -> (K, 2)."""
        t = np.asarray(t, float)[:, None]
        p0, c1, c2, p3 = self.points
        return (1 - t) ** 3 * p0 + 3 * (1 - t) ** 2 * t * c1 + 3 * (1 - t) * t**2 * c2 + t**3 * p3


class Lips(NamedTuple):
    """Contours, each from left corner to right corner, two curves an edge.

    `gap` is the inner height at the centre, `bottom` its lower end.
    """

    outer_upper: tuple[Curve, Curve]
    inner_upper: tuple[Curve, Curve]
    inner_lower: tuple[Curve, Curve]
    outer_lower: tuple[Curve, Curve]
    gap: float
    bottom: float


def _mix(low: float, high: float, share: float) -> float:
    return low + (high - low) * share


def _edge(
    half: float, corner: float, middle: float, fullness: float, peak: float = 0.0, dip: float = 0.0
) -> tuple[Curve, Curve]:
    """One edge of a lip: from (-half, corner) through the middle to (half, corner).

    `fullness` 0 gives a lens, 1 an ellipse. `peak` > 0 makes a Cupid's bow: peaks at that share of
    the half width, with the middle lower by `dip`.
    """
    rise = middle - corner
    near = -half * _mix(0.74, 1.0, fullness)
    start = (-half, corner)
    first = (near, corner + rise * _mix(0.62, 0.56, fullness))
    if peak:
        left = (start, first, (-half * peak, middle - dip * 1.1), (0.0, middle + dip))
    else:
        left = (start, first, (-half * 0.56, middle), (0.0, middle))
    one = np.array(left, float)
    two = one[::-1] * (-1.0, 1.0)
    return Curve(one), Curve(two)


def lip_contours(identity: Identity, mouth: np.ndarray) -> Lips:
    """Contours in the mouth's frame for `mouth` (6,), columns as in `visemes.PARAMS`."""
    jaw, width, rounding, _, _, tuck = (float(value) for value in mouth)
    gap = GAP * jaw
    inner = _mix(11.8, 15.6, width) * (1 - 0.40 * rounding) * (1 - 0.08 * jaw) * identity.mouth_size
    corner_lip = _mix(1.1, 3.2, rounding)
    outer = inner + corner_lip
    upper = -0.24 * gap - 1.6 * tuck  # f and v bare the upper teeth
    lower = upper + gap
    corner = 0.22 * gap - 2.3 * max(0.0, 1 - 2.5 * jaw) * (1 - rounding)
    fullness = max(rounding, 0.25 + 0.6 * jaw)
    weight = identity.lip_weight
    above = (2.8 + 1.4 * rounding) * weight
    below = (4.3 + 1.2 * rounding) * weight * (1 - 0.50 * tuck)
    return Lips(
        outer_upper=_edge(
            outer,
            corner,
            upper - above,
            fullness * 0.8,
            peak=_mix(0.36, 0.46, rounding),
            dip=0.9 * weight,
        ),
        inner_upper=_edge(inner, corner, upper, fullness),
        inner_lower=_edge(inner, corner, lower, fullness),
        outer_lower=_edge(outer, corner, lower + below, max(fullness, 0.45)),
        gap=gap,
        bottom=lower,
    )


def tongue_color(identity: Identity) -> RGB:
    """The tongue that differs more from the lips."""
    one, two = TONGUES
    return one if np.linalg.norm(np.subtract(one, identity.lip_rgb)) > 60 else two


def head_matrix(identity: Identity, pose: Pose) -> np.ndarray:
    """Head frame -> picture in design units, as a (2, 3) affine matrix: scale, tilt about the neck,
    translate.
    """
    angle = np.deg2rad(pose.tilt)
    turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    scale = HEAD_SCALE * np.diag((identity.face_width, identity.face_height))
    pivot = np.array((0.0, PIVOT_Y))
    shift = np.array((HEAD[0] + pose.dx, HEAD[1] + pose.dy)) + pivot - turn @ pivot
    return np.concatenate((turn @ scale, shift[:, None]), axis=1)


def parallax(pose: Pose, depth: float) -> tuple[float, float]:
    """Shift (x, y) in the head's frame of something `depth` (0 outline, 1 nose tip, < 0 behind) at
    this pose.
    """
    return DEPTH_X * depth * pose.yaw, DEPTH_Y * depth * pose.pitch


def lip_points(identity: Identity, mouth: np.ndarray, pose: Pose) -> np.ndarray:
    """Lip landmarks in the picture.

    Returns:
        (20, 2) float32 (x, y) in [0, 1] of the picture. 0-11 outer contour clockwise from the left
        corner (as seen), 6 the right corner; 12-19 inner contour likewise, 16 the right corner.
    """
    lips = lip_contours(identity, mouth)
    points = np.concatenate(
        (
            _around(lips.outer_upper, lips.outer_lower, OUTER),
            _around(lips.inner_upper, lips.inner_lower, INNER),
        )
    )
    points = points + MOUTH + np.array(parallax(pose, MOUTH_DEPTH))
    matrix = head_matrix(identity, pose)
    return ((points @ matrix[:, :2].T + matrix[:, 2]) / CANVAS).astype(np.float32)


def _around(upper: tuple[Curve, Curve], lower: tuple[Curve, Curve], count: int) -> np.ndarray:
    """`count` points clockwise: left corner, along the upper edge, right corner, back along the
    lower edge.
    """
    half = count // 2
    along = np.linspace(0.0, 2.0, half + 1)
    one = _along(upper, along)
    two = _along(lower, along)[::-1]
    return np.concatenate((one[:-1], two[:-1]))


def _along(edge: tuple[Curve, Curve], along: np.ndarray) -> np.ndarray:
    """Points of a two-curve edge at `along` (K,) in [0, 2]."""
    left = edge[0].at(np.clip(along, 0, 1))
    right = edge[1].at(np.clip(along - 1, 0, 1))
    return np.where(along[:, None] <= 1, left, right)


def mouth_opening(identity: Identity, mouth: np.ndarray) -> np.ndarray:
    """True height of the opening between the lips as a share of the picture's side; `mouth` (...,
    6) -> (...).
    """
    jaw = np.asarray(mouth, np.float64)[..., 0]
    return jaw * GAP * HEAD_SCALE * identity.face_height / CANVAS


def mouth_opening_from_pixels(frame: np.ndarray, identity: Identity, points: np.ndarray) -> float:
    """Height of the opening between the lips as seen in a frame, a share of its side.

    Counts, in the middle columns of the mouth's box, the pixels that look like teeth, tongue or
    cavity rather than lip, skin or beard. Only the place of the mouth comes from `points`; what is
    open there comes from the pixels.

    Args:
        frame: (S, S, 3) uint8.
        identity: whose colours to expect.
        points: (K, 2) lip points in [0, 1].
    """
    size = frame.shape[0]
    (left, top), (right, bottom) = points.min(0) * size, points.max(0) * size
    middle = (left + right) / 2
    reach = 0.035 * size
    columns = slice(max(int(middle - reach), 0), int(np.ceil(middle + reach)))
    box = frame[max(int(top), 0) : int(np.ceil(bottom)), columns].astype(np.float32)
    lip = np.array(identity.lip_rgb, np.float32)
    skin = np.array(identity.skin_rgb, np.float32)
    inside = np.array(
        (CAVITY, TEETH, tuple(0.86 * c for c in TEETH), tongue_color(identity)), np.float32
    )
    outside = np.stack(
        (lip, 0.91 * lip, 0.73 * lip, 0.62 * lip, skin, 0.84 * skin, (lip + skin) / 2)
    )
    if identity.beard not in ("none", "stubble"):
        hair = np.array(identity.hair_rgb, np.float32)
        outside = np.concatenate((outside, np.stack((hair, 0.85 * hair, (hair + lip) / 2))))
    near, far = (
        np.linalg.norm(box[:, :, None] - palette, axis=-1).min(-1) for palette in (inside, outside)
    )
    share = np.clip(
        (far / (near + far + 1e-6) - 0.2) / 0.6, 0.0, 1.0
    )  # pixels on an edge count in part
    return float(share.sum(0).mean() / size)
