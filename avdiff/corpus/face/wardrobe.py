"""What sits on the head: beards, glasses, hats, earrings, freckles. In the head's frame (design
units).
"""

from __future__ import annotations

import skia

from avdiff.corpus.face.brush import blob, fill, linear, oval, radial, stroke, tone
from avdiff.corpus.face.identity import RGB, Identity
from avdiff.corpus.face.mouth import MOUTH

GOLD: RGB = (232, 186, 84)


def beard_path(who: Identity, sides: tuple[float, float, float], drop: float) -> skia.Path:
    """Full beard along the jaw: `sides` are the half widths of cheek, jaw and chin, `drop` how far
    the chin sank.
    """
    cheek, jaw, chin = sides
    outside = [
        (27.6, -4.0),
        (cheek + 1.2, 11),
        (jaw + 1.6, 24.5 + 0.4 * drop),
        (chin + 1.5, 35 + drop),
    ]
    inside = [(25.0, -4.0), (22.5, 6.0), (16.5, 12.5), (8.0, 13.0)]
    right = [(0.0, 14.0), *reversed(inside), *outside, (0.0, 38.5 + drop)]
    return blob(right + [(-x, y) for x, y in reversed(right[1:-1])])


def draw_beard(
    canvas: skia.Canvas, who: Identity, sides: tuple[float, float, float], drop: float, lift: float
) -> None:
    """Beard under the mouth; `lift` is how far the upper lip rose (moustaches ride on it)."""
    hair = who.hair_rgb if who.hair_style != "bald" else tone(who.hair_rgb, 0.95)
    shade = fill(hair, 1, linear((0, 5), (0, 40), ((hair, 1), (tone(hair, 0.80), 1))))
    if who.beard == "stubble":
        dark = tone(hair, 0.8, who.skin_rgb, 0.35)
        canvas.drawPath(
            beard_path(who, (sides[0] - 1.6, sides[1] - 2.0, sides[2] - 2.0), drop - 2.6),
            fill(dark, 0.34),
        )
    elif who.beard == "full beard":
        canvas.drawPath(beard_path(who, sides, drop), shade)
    elif who.beard == "goatee":
        right = [
            (0.0, 13.5 - lift),
            (8.5, 14.5 - lift),
            (16.5, 20.0),
            (15.0, 29 + 0.5 * drop),
            (9, 37 + drop),
            (0, 39.5 + drop),
        ]
        canvas.drawPath(blob(right + [(-x, y) for x, y in reversed(right[1:-1])]), shade)
    elif who.beard == "moustache":
        top = MOUTH[1] - 8.0 - lift
        right = [
            (0.0, top + 0.8),
            (5.5, top),
            (13.0, top + 3.2),
            (18.0, top + 7.8),
            (12.0, top + 7.2),
            (4, top + 6.0),
        ]
        canvas.drawPath(
            blob([*right, (0.0, top + 5.4), *((-x, y) for x, y in reversed(right[1:]))]), shade
        )


def draw_freckles(canvas: skia.Canvas, who: Identity) -> None:
    """Six soft spots, large enough to survive small pictures."""
    paint = fill(tone(who.skin_rgb, 0.80, (176, 92, 50), 0.3), 0.75)
    for side in (-1, 1):
        for x, y in ((13.5, 6.5), (17.5, 8.6), (12.4, 10.4)):
            canvas.drawCircle(side * x, y, 1.0, paint)


def draw_glasses(canvas: skia.Canvas, who: Identity, eye_y: float) -> None:
    """Frames around the eyes with a hint of glass."""
    gap = 11.2 * who.eye_gap
    frame = stroke(who.glasses_rgb, 2.0)
    glass = fill((255, 255, 255), 0.08)
    for side in (-1, 1):
        box = oval(side * gap, eye_y + 0.4, 9.0, 8.0)
        if who.glasses == "round glasses":
            canvas.drawOval(box, glass)
            canvas.drawOval(box, frame)
        elif who.glasses == "square glasses":
            box = oval(side * gap, eye_y + 0.6, 9.2, 7.0)
            canvas.drawRoundRect(box, 2.6, 2.6, glass)
            canvas.drawRoundRect(box, 2.6, 2.6, frame)
        else:
            path = skia.Path()
            path.moveTo(side * gap - 9, eye_y - 2.5)
            path.quadTo(side * gap - 8.5, eye_y - 7, side * gap, eye_y - 6.6)
            path.quadTo(side * gap + 8.5, eye_y - 7, side * gap + 9, eye_y - 2.5)
            canvas.drawOval(oval(side * gap, eye_y + 0.4, 8.6, 7.2), glass)
            canvas.drawPath(path, stroke(who.glasses_rgb, 2.8))
        canvas.drawLine(side * (gap + 9.1), eye_y - 1.5, side * 27.5, eye_y - 2.5, frame)
    bridge = skia.Path()
    bridge.moveTo(-(gap - 9.0), eye_y - 0.5)
    bridge.quadTo(0, eye_y - 3.4, gap - 9.0, eye_y - 0.5)
    canvas.drawPath(bridge, frame)


def draw_earrings(canvas: skia.Canvas, who: Identity) -> None:
    """Studs or hoops at the lobes."""
    for side in (-1, 1):
        if who.earrings == "studs":
            canvas.drawCircle(side * 28.6, 9.2, 1.9, fill(GOLD))
        else:
            canvas.drawCircle(side * 29.2, 13.2, 4.4, stroke(GOLD, 1.7))


def draw_hat(canvas: skia.Canvas, who: Identity) -> None:
    """Beanie, cap or sun hat over the hair."""
    cloth = who.hat_rgb
    shade = fill(
        cloth,
        1,
        radial((-10, -44), 60, ((tone(cloth, 1.18), 1), (cloth, 1), (tone(cloth, 0.76), 1))),
    )
    dome = blob(
        [
            (-33, -19),
            (-32.5, -32),
            (-22, -46),
            (0, -51),
            (22, -46),
            (32.5, -32),
            (33, -19),
            (0, -21),
        ]
    )
    if who.hat == "sun hat":
        crown = blob(
            [
                (-27, -22),
                (-26, -36),
                (-16, -47),
                (0, -50),
                (16, -47),
                (26, -36),
                (27, -22),
                (0, -20),
            ]
        )
        canvas.drawPath(crown, shade)
        canvas.drawOval(oval(0, -23, 47, 8.5), shade)
        canvas.drawPath(
            blob([(-27, -31), (0, -28.5), (27, -31), (27.5, -25.5), (0, -22), (-27.5, -25.5)]),
            fill(tone(cloth, 0.66)),
        )
        return
    canvas.drawPath(dome, shade)
    if who.hat == "beanie":
        band = blob(
            [
                (-33, -26),
                (-18, -28),
                (0, -29),
                (18, -28),
                (33, -26),
                (34, -20),
                (32.5, -15.5),
                (17, -18),
                (0, -19),
                (-17, -18),
                (-32.5, -15.5),
                (-34, -20),
            ]
        )
        canvas.drawPath(band, fill(tone(cloth, 0.80)))
        canvas.drawCircle(0, -51, 5, fill(tone(cloth, 1.3)))
    else:
        brim = blob(
            [
                (-30, -20),
                (0, -27),
                (30, -20),
                (33, -14.5),
                (18, -17.5),
                (0, -18.8),
                (-18, -17.5),
                (-33, -14.5),
            ]
        )
        canvas.drawPath(brim, fill(tone(cloth, 0.70)))
