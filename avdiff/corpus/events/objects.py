"""Things that are struck: drum, bell and glass, and the hand that strikes them, in design units
(128 x 128).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import skia

from avdiff.corpus.events.scene import Event, since_contact, strike_distance
from avdiff.corpus.face.brush import blob, fill, linear, oval, radial, stroke, tone
from avdiff.corpus.face.identity import RGB

CANVAS = 128.0
METAL: dict[str, RGB] = {"brass": (222, 178, 76), "silver": (200, 206, 214)}
WOOD = (176, 118, 70)
STEEL = (176, 184, 194)
DARK = (44, 44, 52)


def ground(canvas: skia.Canvas, rgb: RGB, top: float) -> None:
    """A floor or table with a lighter front."""
    canvas.drawRect(
        skia.Rect.MakeLTRB(0, top, CANVAS, CANVAS),
        fill(rgb, 1, linear((0, top), (0, CANVAS), ((tone(rgb, 0.86), 1), (tone(rgb, 1.14), 1)))),
    )
    canvas.drawRect(skia.Rect.MakeLTRB(0, top, CANVAS, top + 0.8), fill(tone(rgb, 0.66)))


def shadow(canvas: skia.Canvas, x: float, y: float, width: float, alpha: float) -> None:
    shader = radial(
        (0, 0), 1, (((0, 0, 0), alpha), ((0, 0, 0), alpha * 0.7), ((0, 0, 0), 0.0)), (0, 0.5, 1)
    )
    canvas.save()
    canvas.translate(x, y)
    canvas.scale(width, width * 0.24)
    canvas.drawCircle(0, 0, 1, fill((0, 0, 0), 1, shader))
    canvas.restore()


def flash(
    canvas: skia.Canvas,
    x: float,
    y: float,
    near: float,
    since: float,
    away: tuple[float, float] = (0, 360),
) -> None:
    """Little rays for a tenth of a second after a contact."""
    strength = 1 - since / 0.12
    if strength <= 0:
        return
    for angle in np.deg2rad(np.linspace(*away, 8, endpoint=away[1] - away[0] < 360)):
        unit = np.array([np.cos(angle), np.sin(angle)])
        start = near * unit
        end = (near + 7) * unit
        canvas.drawLine(
            x + start[0],
            y + start[1],
            x + end[0],
            y + end[1],
            stroke((255, 255, 255), 1.3, 0.85 * strength),
        )


def _swing(
    canvas: skia.Canvas,
    pivot: np.ndarray,
    contact: np.ndarray,
    degrees: float,
    draw: Callable[[skia.Canvas, float], None],
) -> None:
    """Draw something long from the pivot towards its contact point, turned away by `degrees`."""
    away = contact - pivot
    canvas.save()
    canvas.translate(float(pivot[0]), float(pivot[1]))
    canvas.rotate(float(np.rad2deg(np.arctan2(away[1], away[0]))) - degrees)
    draw(canvas, float(np.hypot(*away)))
    canvas.restore()


def _stick(canvas: skia.Canvas, length: float) -> None:
    canvas.drawLine(-8, 0, length - 2, 0, stroke(tone(WOOD, 0.8), 3.4))
    canvas.drawLine(-8, -0.5, length - 2, -0.5, stroke(tone(WOOD, 1.3), 2.0))
    canvas.drawOval(oval(length - 2, -1.2, 3.6, 2.6), fill(tone(WOOD, 1.25)))


def _hand_at(canvas: skia.Canvas, hand: np.ndarray, event: Event) -> None:
    """A fist that holds something, with a sleeve that leaves the picture."""
    x = float(hand[0])
    y = float(hand[1])
    canvas.drawLine(x + 6, y + 3, x + 34, y + 16, stroke(event.sleeve_rgb, 15))
    canvas.drawOval(oval(x + 1, y + 0.5, 7.6, 6.4), fill(event.skin_rgb))
    for k in range(3):
        canvas.drawLine(
            x - 4.2 + 3 * k,
            y - 2.5,
            x - 4.4 + 3 * k,
            y + 2.6,
            stroke(tone(event.skin_rgb, 0.74), 0.8),
        )


def still_drum(canvas: skia.Canvas, event: Event) -> None:
    ground(canvas, tone(event.background_rgb, 0.72), 98)
    rx = 27 * event.scale
    ry = 0.30 * rx
    height = 26 * event.scale
    top = 113 - height - ry
    shadow(canvas, 58, 113 + ry * 0.6, rx * 1.25, 0.35)
    body = skia.Path()
    body.moveTo(58 - rx, top)
    body.lineTo(58 - rx, top + height)
    body.arcTo(oval(58, top + height, rx, ry), 180, -180, False)
    body.lineTo(58 + rx, top)
    body.close()
    sheen = linear(
        (58 - rx, 0),
        (58 + rx, 0),
        ((tone(event.rgb, 0.6), 1), (tone(event.rgb, 1.3), 1), (tone(event.rgb, 0.55), 1)),
    )
    canvas.drawPath(body, fill(event.rgb, 1, sheen))
    for part in (-0.8, -0.4, 0.0, 0.4, 0.8):
        y = top + ry * np.sqrt(1 - part**2)
        canvas.drawLine(58 + rx * part, y + 3, 58 + rx * part, y + height - 3, stroke(STEEL, 1.1))
    for y in (top, top + height):
        rim = skia.Path()
        rim.addArc(oval(58, y, rx, ry), 0, 180)
        canvas.drawPath(rim, stroke(STEEL, 3))


def moving_drum(canvas: skia.Canvas, event: Event, time: float) -> None:
    rx = 27 * event.scale
    ry = 0.30 * rx
    height = 26 * event.scale
    top = 113 - height - ry
    since = since_contact(event, time)
    wave = float(np.exp(-since / 0.09)) if since < 1 else 0.0
    skin = radial((58, top), rx, (((255, 252, 240), 1), ((236, 226, 204), 1)))
    canvas.drawOval(oval(58, top, rx, ry), fill((246, 240, 224), 1, skin))
    for part in (0.3, 0.62):
        canvas.drawOval(
            oval(58, top, rx * part * (1 + 0.4 * (1 - wave)), ry * part * (1 + 0.4 * (1 - wave))),
            stroke((150, 130, 96), 1.0, 0.8 * wave),
        )
    canvas.drawOval(oval(58, top, rx, ry), stroke(STEEL, 2.2))
    tip = np.array([58.0, top])
    hand = np.array([112.0, top - 22.0])
    _swing(canvas, hand, tip, -42 * strike_distance(event, time), _stick)
    _hand_at(canvas, hand, event)
    flash(canvas, 58, top, 7, since, (200, 340))


def still_bell(canvas: skia.Canvas, event: Event) -> None:
    canvas.drawRoundRect(
        skia.Rect.MakeLTRB(8, 8, 120, 15),
        3,
        3,
        fill(WOOD, 1, linear((0, 8), (0, 15), ((tone(WOOD, 1.2), 1), (tone(WOOD, 0.75), 1)))),
    )
    for x in (12, 110):
        canvas.drawRect(skia.Rect.MakeXYWH(x, 15, 6, 113), fill(tone(WOOD, 0.84)))


def moving_bell(canvas: skia.Canvas, event: Event, time: float) -> None:
    rgb = METAL[event.material]
    s = event.scale
    since = since_contact(event, time)
    sway = (
        -3.2 * float(np.exp(-since / 0.35) * np.sin(2 * np.pi * since / 0.55)) if since < 3 else 0.0
    )
    contact = np.array([57 + 21.0 * s, 22 + 46.0 * s])
    canvas.save()
    canvas.translate(57, 15)
    canvas.rotate(-sway)
    canvas.drawLine(0, 0, 0, 8, stroke(DARK, 2.4))
    canvas.translate(0, 7)
    canvas.scale(s, s)
    right = [(4, 0), (10, 3), (13, 12), (15, 28), (18, 40), (23, 49)]
    shape = skia.Path()
    shape.moveTo(-4, 0)
    shape.lineTo(4, 0)
    shape.cubicTo(14, 3, 12, 20, 16, 33)
    shape.cubicTo(18, 41, 22, 44, 23, 50)
    shape.lineTo(-23, 50)
    shape.cubicTo(-22, 44, -18, 41, -16, 33)
    shape.cubicTo(-12, 20, -14, 3, -4, 0)
    shape.close()
    canvas.drawCircle(0, 51, 4.2, fill(tone(rgb, 0.55)))
    sheen = linear(
        (-23, 0),
        (23, 0),
        ((tone(rgb, 0.62), 1), (tone(rgb, 1.5), 1), (rgb, 1), (tone(rgb, 0.55), 1)),
    )
    canvas.drawPath(shape, fill(rgb, 1, sheen))
    canvas.drawLine(-right[4][0], 41, right[4][0], 41, stroke(tone(rgb, 0.6), 1.2))
    canvas.drawOval(oval(0, 50, 23, 3.4), fill(tone(rgb, 0.7)))
    canvas.restore()
    hand = np.array([114.0, 34.0 + 46.0 * s])
    _swing(canvas, hand, contact, -36 * strike_distance(event, time), _mallet)
    _hand_at(canvas, hand, event)
    flash(canvas, float(contact[0]), float(contact[1]), 5, since, (-80, 40))


def _mallet(canvas: skia.Canvas, length: float) -> None:
    canvas.drawLine(-6, 0, length - 4, 0, stroke(tone(WOOD, 0.8), 2.6))
    canvas.drawRoundRect(skia.Rect.MakeLTRB(length - 9, -6, length, 6), 3, 3, fill((92, 60, 44)))


def still_glass(canvas: skia.Canvas, event: Event) -> None:
    ground(canvas, tone(WOOD, 0.95), 104)
    shadow(canvas, 54, 114, 20, 0.3)


def moving_glass(canvas: skia.Canvas, event: Event, time: float) -> None:
    s = 0.75 + 0.3 * event.scale
    since = since_contact(event, time)
    shake = (
        0.5 * float(np.exp(-since / 0.06) * np.sin(2 * np.pi * since / 0.05))
        if since < 0.5
        else 0.0
    )
    canvas.save()
    canvas.translate(54 + shake, 114)
    canvas.scale(s, s)
    white = (244, 250, 255)
    bowl = blob(
        [
            (-15, -66),
            (-18, -52),
            (-15, -38),
            (-6, -30),
            (0, -28.5),
            (6, -30),
            (15, -38),
            (18, -52),
            (15, -66),
            (0, -68),
        ]
    )
    canvas.save()
    canvas.clipPath(bowl, True)
    level = -30 - 34 * event.fill
    wave = 0.9 * float(np.exp(-since / 0.18)) if since < 2 else 0.0
    canvas.drawRect(skia.Rect.MakeLTRB(-20, level, 20, -26), fill(event.rgb, 0.88))
    canvas.drawOval(oval(0, level, 17.5, 2.6 + wave), fill(tone(event.rgb, 1.3)))
    canvas.restore()
    canvas.drawPath(bowl, fill(white, 0.26))
    canvas.drawPath(bowl, stroke(white, 1.2, 0.9))
    canvas.drawOval(oval(0, -66, 15, 2.8), stroke(white, 1.2, 0.95))
    canvas.drawLine(0, -28, 0, -4, stroke(white, 2.6, 0.8))
    canvas.drawOval(oval(0, -2, 14, 3), fill(white, 0.55))
    canvas.drawOval(oval(0, -2, 14, 3), stroke(white, 1.0, 0.9))
    canvas.drawLine(-12.5, -58, -13.5, -47, stroke((255, 255, 255), 1.8, 0.9))
    canvas.restore()
    contact = np.array([54 + 16.2 * s, 114 - 63 * s])
    hand = np.array([112.0, 114 - 63 * s + 16])
    _swing(canvas, hand, contact, -30 * strike_distance(event, time), _spoon)
    _hand_at(canvas, hand, event)
    flash(canvas, float(contact[0]), float(contact[1]), 4, since, (-130, 10))


def _spoon(canvas: skia.Canvas, length: float) -> None:
    canvas.drawLine(-4, 0, length - 10, 0, stroke(STEEL, 2.2))
    canvas.drawOval(
        oval(length - 7, 0, 7, 4.2),
        fill(
            tone(STEEL, 1.2),
            1,
            linear((0, -4), (0, 4), ((tone(STEEL, 1.6), 1), (tone(STEEL, 0.7), 1))),
        ),
    )
