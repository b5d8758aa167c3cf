"""Draws a presenter with skia: vector shapes on a canvas of 128 x 128 design units, at any size.

Order: background (cached: it never moves), back hair, body (recorded once), ears, face, mouth,
    nose, eyes, front
hair, glasses, hat. Parts shift by their depth when the head turns (parallax), which reads as a turn
without a 3-D model.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import skia

from avdiff.corpus.face.brush import between, blob, curves, fill, linear, oval, radial, stroke, tone
from avdiff.corpus.face.hair import COVERS_EARS, hair_of
from avdiff.corpus.face.identity import Identity
from avdiff.corpus.face.motion import Pose
from avdiff.corpus.face.mouth import (
    CANVAS,
    CAVITY,
    GAP,
    MOUTH,
    MOUTH_DEPTH,
    TEETH,
    Lips,
    head_matrix,
    lip_contours,
    parallax,
    tongue_color,
)
from avdiff.corpus.face.scenery import draw_background, draw_body
from avdiff.corpus.face.wardrobe import (
    draw_beard,
    draw_earrings,
    draw_freckles,
    draw_glasses,
    draw_hat,
)

_FACES = {  # half widths of cheek (y 12), jaw (y 24) and chin (y 33)
    "oval": (25.4, 19.0, 9.5),
    "round": (26.4, 21.8, 11.5),
    "square": (26.0, 22.6, 13.0),
    "heart": (25.2, 17.2, 8.0),
    "long": (24.6, 19.4, 10.5),
}
_NOSES = {
    "button": (4.3, 2.7),
    "straight": (3.5, 3.7),
    "wide": (5.8, 2.7),
    "pointed": (2.9, 4.5),
}  # half width, height
EYE_Y = -4.0


class Puppet:
    """Everything of one identity that can be made before a frame is known."""

    def __init__(self, who: Identity) -> None:
        self.who = who
        skin = who.skin_rgb
        hair = who.hair_rgb
        shapes = hair_of(who.hair_style, who.hair_seed, who.mirrored)
        self.back = [blob(points) for points in shapes.back]
        self.front = [blob(points) for points in shapes.front]
        self.back_circles = shapes.back_circles
        self.front_circles = shapes.front_circles
        self.back_paint = fill(
            tone(hair, 0.80),
            1,
            linear((0, -50), (0, 60), ((tone(hair, 0.86), 1), (tone(hair, 0.68), 1))),
        )
        self.front_paint = fill(
            hair,
            1,
            radial((-8, -40), 62, ((tone(hair, 1.16), 1), (hair, 1), (tone(hair, 0.84), 1))),
        )
        self.skin_paint = fill(
            skin,
            1,
            radial(
                (-7, -6),
                52,
                ((tone(skin, 1.10), 1), (skin, 1), (tone(skin, 0.86), 1)),
                (0, 0.55, 1),
            ),
        )
        self.ear_paint = fill(tone(skin, 0.92))
        self.lines = tone(hair if who.hair_style != "bald" else (70, 50, 40), 0.62)
        self.covers_ears = who.hair_style in COVERS_EARS
        self.sides = _FACES[who.face_shape]
        recorder = skia.PictureRecorder()
        draw_body(recorder.beginRecording(skia.Rect.MakeWH(CANVAS, CANVAS)), who)
        self.body = recorder.finishRecordingAsPicture()
        self.backdrop: dict[int, np.ndarray] = {}

    def static(self, size: int) -> np.ndarray:
        """Background alone, (S, S, 4) uint8, drawn once a size."""
        if size not in self.backdrop:
            pixels = np.zeros((size, size, 4), np.uint8)
            canvas = _surface(pixels).getCanvas()
            canvas.scale(size / CANVAS, size / CANVAS)
            draw_background(canvas, self.who)
            self.backdrop[size] = pixels
        return self.backdrop[size]

    def face_path(self, drop: float) -> skia.Path:
        """Outline of the face; `drop` lowers the chin when the jaw opens."""
        cheek, jaw, chin = self.sides
        right = [
            (0, -38),
            (15, -35.5),
            (24.5, -24),
            (27, -7),
            (cheek, 11),
            (jaw, 23.5 + 0.4 * drop),
            (chin, 33 + drop),
        ]
        return blob([*right, (0, 36 + drop), *((-x, y) for x, y in reversed(right) if x > 0)])


@lru_cache(maxsize=64)
def puppet_of(who: Identity) -> Puppet:
    """The prepared puppet of an identity."""
    return Puppet(who)


def _surface(pixels: np.ndarray) -> skia.Surface:
    """A surface that draws into an (S, S, 4) uint8 array."""
    size = pixels.shape[0]
    info = skia.ImageInfo.Make(size, size, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType)
    return skia.Surface.MakeRasterDirect(info, pixels)


def render_face(identity: Identity, mouth: np.ndarray, pose: Pose, size: int = 128) -> np.ndarray:
    """One frame.

    Args:
        identity: who.
        mouth: (6,) in [0, 1], columns as in `visemes.PARAMS`.
        pose: head and eyes.
        size: pixels a side.

    Returns:
        (size, size, 3) uint8 RGB. Background pixels are the same in every frame of an identity.

    Raises:
        ValueError: a size below 16.
    """
    if size < 16:
        raise ValueError(f"size={size}: a face needs at least 16 pixels a side")
    puppet = puppet_of(identity)
    pixels = puppet.static(size).copy()
    canvas = _surface(pixels).getCanvas()
    canvas.scale(size / CANVAS, size / CANVAS)
    matrix = head_matrix(identity, pose)
    head = skia.Matrix.MakeAll(*matrix[0].tolist(), *matrix[1].tolist(), 0, 0, 1)
    canvas.save()
    canvas.concat(head)
    _draw_back_hair(canvas, puppet, pose)
    canvas.restore()
    canvas.drawPicture(puppet.body)
    canvas.concat(head)
    _draw_head(canvas, puppet, np.asarray(mouth, np.float64), pose)
    return pixels[:, :, :3].copy()


def _shift(canvas: skia.Canvas, pose: Pose, depth: float) -> None:
    """Start a part at a depth; end it with canvas.restore()."""
    canvas.save()
    canvas.translate(*parallax(pose, depth))


def _draw_back_hair(canvas: skia.Canvas, puppet: Puppet, pose: Pose) -> None:
    _shift(canvas, pose, -0.35)
    for path in puppet.back:
        canvas.drawPath(path, puppet.back_paint)
    for x, y, r in puppet.back_circles:
        canvas.drawCircle(x, y, r, puppet.back_paint)
    canvas.restore()


def _draw_head(canvas: skia.Canvas, puppet: Puppet, mouth: np.ndarray, pose: Pose) -> None:
    who = puppet.who
    drop = 5.5 * float(mouth[0])
    if not puppet.covers_ears:
        _draw_ears(canvas, puppet, pose)
    canvas.drawPath(puppet.face_path(drop), puppet.skin_paint)
    _draw_cheeks(canvas, who, pose)
    if who.beard != "none":
        _shift(canvas, pose, 0.35)
        draw_beard(canvas, who, puppet.sides, drop, 0.24 * GAP * float(mouth[0]))
        canvas.restore()
    _draw_mouth(canvas, puppet, mouth, pose)
    _draw_nose(canvas, who, pose)
    _draw_eyes(canvas, puppet, pose)
    _shift(canvas, pose, 0.15)
    for path in puppet.front:
        canvas.drawPath(path, puppet.front_paint)
    for x, y, r in puppet.front_circles:
        canvas.drawCircle(x, y, r, puppet.front_paint)
    if who.hat != "none":
        draw_hat(canvas, who)
    canvas.restore()
    _draw_brows(canvas, puppet, pose)
    if who.earrings != "none":
        _shift(canvas, pose, -0.45)
        draw_earrings(canvas, who)
        canvas.restore()
    if who.glasses != "none":
        _shift(canvas, pose, 0.75)
        draw_glasses(canvas, who, EYE_Y)
        canvas.restore()


def _draw_ears(canvas: skia.Canvas, puppet: Puppet, pose: Pose) -> None:
    who = puppet.who
    for side in (-1, 1):
        _shift(canvas, pose, -0.45)
        size = who.ear_size
        canvas.drawOval(oval(side * 27.5, 1, 4.6 * size, 7.2 * size), puppet.ear_paint)
        canvas.drawOval(
            oval(side * 28, 1.5, 2.2 * size, 4.2 * size), fill(tone(who.skin_rgb, 0.78))
        )
        canvas.restore()


def _draw_cheeks(canvas: skia.Canvas, who: Identity, pose: Pose) -> None:
    red = tone(who.skin_rgb, 0.96, (230, 70, 70), 0.55)
    _shift(canvas, pose, 0.6)
    for side in (-1, 1):
        shader = radial((side * 16.5, 9), 8, ((red, who.blush), (red, 0)))
        canvas.drawCircle(side * 16.5, 9, 8, fill(red, 1, shader))
    if who.freckles:
        draw_freckles(canvas, who)
    canvas.restore()


def _draw_nose(canvas: skia.Canvas, who: Identity, pose: Pose) -> None:
    skin = who.skin_rgb
    size = who.nose_size
    wide, tall = (size * half for half in _NOSES[who.nose])
    _shift(canvas, pose, 1.0)
    canvas.drawOval(oval(0, 10.2 - tall, wide, tall), fill(tone(skin, 0.80)))
    canvas.drawOval(oval(-0.4, 8.8 - tall, wide * 0.92, tall), fill(tone(skin, 1.07)))
    canvas.restore()


def _draw_eyes(canvas: skia.Canvas, puppet: Puppet, pose: Pose) -> None:
    who = puppet.who
    _shift(canvas, pose, 0.7)
    for side in (-1, 1):
        canvas.save()
        canvas.translate(side * 11.2 * who.eye_gap, EYE_Y)
        canvas.scale(who.eye_size, who.eye_size)
        _draw_eye(canvas, puppet, pose, side)
        canvas.restore()
    canvas.restore()


def _draw_eye(canvas: skia.Canvas, puppet: Puppet, pose: Pose, side: int) -> None:
    who = puppet.who
    rx = 6.0
    ry = 4.8
    white = skia.Path()
    white.addOval(oval(0, 0, rx, ry))
    canvas.save()
    canvas.clipPath(white, True)
    canvas.drawOval(oval(0, 0, rx, ry), fill((250, 250, 250)))
    gx = 2.4 * pose.gaze_x + 0.6 * pose.yaw
    gy = 1.5 * pose.gaze_y
    canvas.drawCircle(gx, gy, 3.7, fill(who.eye_rgb))
    canvas.drawCircle(gx, gy, 1.9, fill((24, 18, 20)))
    canvas.drawCircle(gx - 1.2, gy - 1.3, 1.0, fill((255, 255, 255)))
    lid = -ry + 2 * ry * pose.blink
    canvas.drawRect(
        skia.Rect.MakeLTRB(-rx - 1, -ry - 2, rx + 1, lid), fill(tone(who.skin_rgb, 0.90))
    )
    canvas.restore()
    curve = -ry * (1 - 2 * pose.blink) * 1.3
    lash = skia.Path()
    lash.moveTo(-rx, -0.4)
    lash.quadTo(0, curve * 1.25 - 0.4, rx, -0.4)
    canvas.drawPath(lash, stroke(tone(puppet.lines, 0.6), 1.8 if who.gender == "female" else 1.5))
    if who.gender == "female":
        canvas.drawLine(
            side * rx, -0.6, side * (rx + 1.4), -2.0, stroke(tone(puppet.lines, 0.6), 1.5)
        )


def _draw_brows(canvas: skia.Canvas, puppet: Puppet, pose: Pose) -> None:
    who = puppet.who
    _shift(canvas, pose, 0.7)
    lift = -12.6 - 2.6 * pose.brow
    paint = stroke(puppet.lines, 2.5 * who.brow_weight)
    for side in (-1, 1):
        path = skia.Path()
        path.moveTo(side * 5.8 * who.eye_gap, lift + 0.5)
        path.quadTo(
            side * 12 * who.eye_gap, lift - 2.6 * who.brow_arch, side * 17 * who.eye_gap, lift + 1.9
        )
        canvas.drawPath(path, paint)
    canvas.restore()


def _draw_mouth(canvas: skia.Canvas, puppet: Puppet, mouth: np.ndarray, pose: Pose) -> None:
    who = puppet.who
    lips = lip_contours(who, mouth)
    _shift(canvas, pose, MOUTH_DEPTH)
    canvas.translate(*MOUTH)
    if who.beard not in ("full beard", "goatee"):
        canvas.drawOval(
            oval(0, 0.76 * lips.gap + 6.8, 7.5, 1.8), fill(tone(who.skin_rgb, 0.84), 0.7)
        )
    canvas.drawPath(between(lips.outer_upper, lips.outer_lower), fill(tone(who.lip_rgb, 0.91)))
    canvas.drawPath(between(lips.inner_lower, lips.outer_lower), fill(who.lip_rgb))
    seam = 1 - min(1.0, lips.gap / 2.2)
    if seam > 0:
        canvas.drawPath(
            curves(skia.Path(), lips.inner_upper, move=True),
            stroke(tone(who.lip_rgb, 0.62), 1.5, seam),
        )
    if lips.gap > 0.25:
        _draw_inside(canvas, who, lips, mouth)
    canvas.restore()


def _draw_inside(canvas: skia.Canvas, who: Identity, lips: Lips, mouth: np.ndarray) -> None:
    """Cavity, tongue and teeth, clipped to the opening."""
    teeth, tongue, tuck = (float(value) for value in mouth[3:6])
    bottom = lips.bottom
    half = -float(lips.inner_upper[0].points[0, 0])
    top = bottom - lips.gap
    canvas.save()
    canvas.clipPath(between(lips.inner_upper, lips.inner_lower), True)
    canvas.drawPaint(fill(CAVITY))
    tongue_rgb = tongue_color(who)
    rise = bottom - (0.28 + 0.50 * tongue) * min(lips.gap, 9.5)
    canvas.drawOval(oval(0, rise + 6, half * 0.70, 6), fill(tongue_rgb))
    low = 4.4 * max(0.0, teeth - 0.65) / 0.35 * (1 - tongue) * (1 - tuck)  # height of the lower row
    band = min(5.4 * teeth, lips.gap * (1 - 0.09 * low))
    if band > 0.3:
        wide = half * (0.94 - 0.18 * tuck)
        canvas.drawPath(
            blob(
                [
                    (-wide, top - 3),
                    (wide, top - 3),
                    (wide * 0.92, top + band * 0.8),
                    (0, top + band),
                    (-wide * 0.92, top + band * 0.8),
                ]
            ),
            fill(TEETH),
        )
    if low > 0.3:  # a shade darker, and never over the upper row
        edge = max(bottom - low, top + band)
        canvas.drawPath(
            blob(
                [
                    (-half * 0.8, bottom + 3),
                    (half * 0.8, bottom + 3),
                    (half * 0.78, edge),
                    (0, edge + 0.3),
                    (-half * 0.78, edge),
                ]
            ),
            fill(tone(TEETH, 0.86)),
        )
    if tongue > 0.75:
        tip = (tongue - 0.75) * 4
        canvas.drawOval(oval(0, bottom - 0.6, half * 0.60, 3.4 * tip), fill(tone(tongue_rgb, 1.12)))
    canvas.restore()
