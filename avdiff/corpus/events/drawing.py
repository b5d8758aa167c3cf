"""Pictures of events, drawn with skia at any size: nothing but the event and the time enters."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import skia

from avdiff.corpus.events.objects import (
    CANVAS,
    METAL,
    STEEL,
    WOOD,
    flash,
    ground,
    moving_bell,
    moving_drum,
    moving_glass,
    shadow,
    still_bell,
    still_drum,
    still_glass,
)
from avdiff.corpus.events.scene import Event, ball_height, since_contact, strike_distance
from avdiff.corpus.face.brush import blob, fill, linear, oval, radial, stroke, tone
from avdiff.corpus.face.identity import RGB

FLOOR_RGB: dict[str, RGB] = {
    "wooden": (178, 124, 78),
    "stone": (150, 150, 152),
    "metal": (132, 144, 158),
}


def render_event(event: Event, time: float, size: int = 128) -> np.ndarray:
    """One frame at `time` seconds -> (size, size, 3) uint8 RGB.

    Raises:
        ValueError: a size below 16.
    """
    if size < 16:
        raise ValueError(f"size={size}: needs at least 16 pixels a side")
    pixels = _still(event, size).copy()
    canvas = _canvas(pixels, event)
    _MOVING[event.kind](canvas, event, time)
    return pixels[:, :, :3].copy()


def _canvas(pixels: np.ndarray, event: Event) -> skia.Canvas:
    """Draw into an (S, S, 4) array, in design units; a mirrored scene is drawn through a mirror."""
    size = pixels.shape[0]
    info = skia.ImageInfo.Make(size, size, skia.kRGBA_8888_ColorType, skia.kPremul_AlphaType)
    surface = skia.Surface.MakeRasterDirect(info, pixels)
    canvas = surface.getCanvas()
    canvas.scale(size / CANVAS, size / CANVAS)
    if event.mirrored and event.kind != "ball":
        canvas.translate(CANVAS, 0)
        canvas.scale(-1, 1)
    return canvas


@lru_cache(maxsize=8)
def _still(event: Event, size: int) -> np.ndarray:
    """Everything that does not move: (size, size, 4) uint8."""
    pixels = np.zeros((size, size, 4), np.uint8)
    canvas = _canvas(pixels, event)
    base = event.background_rgb
    canvas.drawPaint(
        fill(base, 1, linear((0, 0), (0, CANVAS), ((tone(base, 1.12), 1), (tone(base, 0.9), 1))))
    )
    _STILL[event.kind](canvas, event)
    return pixels


def _still_ball(canvas: skia.Canvas, event: Event) -> None:
    rgb = FLOOR_RGB[event.floor]
    ground(canvas, rgb, 92)
    if event.floor == "wooden":
        for y in (98.5, 106.5, 116.5):
            canvas.drawLine(0, y, CANVAS, y, stroke(tone(rgb, 0.74), 0.7))
        for x, top, bottom in (
            (24, 92.5, 98.5),
            (90, 92.5, 98.5),
            (58, 98.5, 106.5),
            (18, 106.5, 116.5),
            (104, 106.5, 116.5),
        ):
            canvas.drawLine(x, top, x - (64 - x) * 0.04, bottom, stroke(tone(rgb, 0.74), 0.7))
    elif event.floor == "stone":
        for x in range(-64, 200, 26):
            canvas.drawLine(
                64 + (x - 64) * 0.8, 92, 64 + (x - 64) * 1.5, CANVAS, stroke(tone(rgb, 0.78), 0.8)
            )
        for y in (99, 111):
            canvas.drawLine(0, y, CANVAS, y, stroke(tone(rgb, 0.78), 0.8))
    else:
        for x in (10, 46, 82, 118):
            canvas.drawCircle(x, 99, 1.1, fill(tone(rgb, 0.7)))
            canvas.drawCircle(x * 1.1 - 6, 120, 1.5, fill(tone(rgb, 0.7)))
        canvas.drawRect(skia.Rect.MakeLTRB(0, 104, CANVAS, 108), fill((255, 255, 255), 0.14))


def _moving_ball(canvas: skia.Canvas, event: Event, time: float) -> None:
    radius = 9.5 * event.scale
    floor = 108.0
    height = ball_height(event, time)
    start = event.contacts[0] - 0.4
    end = event.contacts[-1] + 0.25
    share = float(np.clip((time - start) / (end - start), 0, 1))
    x = event.drift[0] + (event.drift[1] - event.drift[0]) * share
    lift = height * (floor - 2 * radius - 6)
    shadow(canvas, x, floor + 0.5, radius * (1.1 + 0.5 * height), 0.42 * (1 - 0.65 * height))
    since = min(abs(time - t) for t in event.contacts)
    squash = {"rubber": 0.20, "plastic": 0.05}.get(event.material, 0.0) * max(
        0.0, 1 - since / 0.045
    )
    ry = radius * (1 - squash)
    rx = radius * (1 + 0.6 * squash)
    y = floor - lift - ry
    rgb = {"metal": STEEL, "wood": WOOD}.get(event.material, event.rgb)
    alpha = 0.72 if event.material == "glass" else 1.0
    dark = 0.42 if event.material == "metal" else 0.62
    shader = radial(
        (x - 0.35 * rx, y - 0.4 * ry),
        1.6 * radius,
        ((tone(rgb, 1.5), alpha), (rgb, alpha), (tone(rgb, dark), alpha)),
        (0, 0.45, 1),
    )
    canvas.drawOval(oval(x, y, rx, ry), fill(rgb, 1, shader))
    if event.material == "rubber":
        canvas.save()
        canvas.clipPath(skia.Path().addOval(oval(x, y, rx, ry)), True)
        canvas.translate(x, y)
        canvas.rotate((x - event.drift[0]) / radius * 57.3)
        canvas.drawRect(
            skia.Rect.MakeLTRB(-rx * 1.2, -2.2, rx * 1.2, 2.2), fill((255, 255, 255), 0.75)
        )
        canvas.restore()
    if event.material == "wood":
        for part in (0.35, 0.7):
            canvas.drawOval(oval(x, y, rx * part, ry * 0.96), stroke(tone(rgb, 0.7), 0.7))
    if event.material in ("metal", "glass", "plastic"):
        canvas.drawOval(
            oval(x - 0.38 * rx, y - 0.42 * ry, 0.24 * rx, 0.17 * ry), fill((255, 255, 255), 0.85)
        )


def _still_clap(canvas: skia.Canvas, event: Event) -> None:
    shader = radial(
        (64, 58), 88, ((tone(event.background_rgb, 1.3), 1), (tone(event.background_rgb, 0.84), 1))
    )
    canvas.drawPaint(fill(event.background_rgb, 1, shader))


def _moving_clap(canvas: skia.Canvas, event: Event, time: float) -> None:
    gap = 30 * strike_distance(event, time)
    s = 0.8 + 0.25 * event.scale
    skin = event.skin_rgb
    for side in (-1, 1):
        canvas.save()
        canvas.translate(64 + side * gap, 62 + 0.12 * gap)
        canvas.scale(side * s, s)
        canvas.rotate(14 + 0.5 * gap)
        canvas.drawLine(13, 38, 40, 92, stroke(event.sleeve_rgb, 24))
        canvas.drawLine(9, 20, 17, 42, stroke(skin, 15))
        palm = blob([(0, -4), (0.2, 12), (4, 26), (15, 28), (19, 14), (17, -2), (9, -10)])
        for k, (x, length) in enumerate(((1.5, 26), (5.6, 30), (10, 28), (14.2, 22))):
            canvas.drawLine(
                x + 1.4, 0, x + 1.2 + 0.6 * k, -length, stroke(tone(skin, 1.0 - 0.05 * k), 5.0)
            )
        canvas.drawPath(
            palm,
            fill(skin, 1, linear((0, 0), (20, 10), ((tone(skin, 1.12), 1), (tone(skin, 0.84), 1)))),
        )
        canvas.drawLine(14, 16, 21, 2, stroke(tone(skin, 0.9), 5.2))
        canvas.restore()
    flash(canvas, 64, 50, 24, since_contact(event, time), (190, 350))


def _still_knock(canvas: skia.Canvas, event: Event) -> None:
    ground(canvas, tone(event.background_rgb, 0.66), 118)
    rgb = event.rgb if event.material == "metal" else tone(WOOD, 0.9, event.rgb, 0.18)
    canvas.drawRect(skia.Rect.MakeLTRB(17, 3, 111, 120), fill(tone(rgb, 0.62)))
    door = linear((21, 0), (107, 0), ((tone(rgb, 1.12), 1), (tone(rgb, 0.92), 1)))
    canvas.drawRect(skia.Rect.MakeLTRB(21, 7, 107, 120), fill(rgb, 1, door))
    if event.material == "wood":
        for left, right in ((29, 60), (68, 99)):
            for top, bottom in ((14, 48), (76, 112)):
                canvas.drawRoundRect(
                    skia.Rect.MakeLTRB(left, top, right, bottom), 2, 2, fill(tone(rgb, 0.82))
                )
                canvas.drawRoundRect(
                    skia.Rect.MakeLTRB(left + 2.5, top + 2.5, right - 2.5, bottom - 2.5),
                    2,
                    2,
                    fill(tone(rgb, 1.06)),
                )
    else:
        for y in (12, 115):
            for x in range(27, 106, 13):
                canvas.drawCircle(x, y, 1.2, fill(tone(rgb, 0.6)))
        canvas.drawRect(skia.Rect.MakeLTRB(21, 7, 50, 120), fill((255, 255, 255), 0.10))
    canvas.drawRoundRect(skia.Rect.MakeLTRB(26, 58, 30, 72), 2, 2, fill(tone(METAL["brass"], 0.8)))
    canvas.drawLine(28, 64, 38, 64, stroke(METAL["brass"], 3.2))


def _moving_knock(canvas: skia.Canvas, event: Event, time: float) -> None:
    away = strike_distance(event, time)
    x = 66 + 15 * away
    y = 62 + 7 * away
    canvas.save()
    canvas.translate(x - 9 * away - 1, y + 5 + 6 * away)
    canvas.drawOval(oval(0, 0, 15, 12), fill((0, 0, 0), 0.34 - 0.2 * away))
    canvas.restore()
    canvas.save()
    canvas.translate(x, y)
    canvas.scale(1 + 0.10 * away, 1 + 0.10 * away)
    skin = event.skin_rgb
    canvas.drawLine(15, 12, 58, 52, stroke(event.sleeve_rgb, 24))
    canvas.drawLine(6, 4, 17, 14, stroke(tone(skin, 0.92), 15))
    canvas.drawRoundRect(
        skia.Rect.MakeLTRB(-14, -12, 12, 12),
        8,
        8,
        fill(skin, 1, radial((-4, -5), 24, ((tone(skin, 1.15), 1), (tone(skin, 0.86), 1)))),
    )
    for k in range(4):
        canvas.drawRoundRect(
            skia.Rect.MakeXYWH(-15 + 0.7 * k, -11.5 + 5.6 * k, 12, 5.2),
            2.6,
            2.6,
            fill(tone(skin, 1.08)),
        )
        canvas.drawLine(
            -12 + 0.7 * k,
            -6.1 + 5.6 * k,
            -4 + 0.7 * k,
            -6.1 + 5.6 * k,
            stroke(tone(skin, 0.72), 0.8),
        )
    canvas.drawLine(-2, -9, 8, -4, stroke(tone(skin, 0.95), 5.4))
    canvas.restore()
    flash(canvas, x - 4, y, 16, since_contact(event, time), (130, 290))


_STILL: dict[str, Callable[[skia.Canvas, Event], None]] = {
    "ball": _still_ball,
    "drum": still_drum,
    "bell": still_bell,
    "glass": still_glass,
    "clap": _still_clap,
    "knock": _still_knock,
}
_MOVING: dict[str, Callable[[skia.Canvas, Event, float], None]] = {
    "ball": _moving_ball,
    "drum": moving_drum,
    "bell": moving_bell,
    "glass": moving_glass,
    "clap": _moving_clap,
    "knock": _moving_knock,
}
