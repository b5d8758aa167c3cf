"""What does not move: background and clothes, in the picture's design units (0..128)."""

from __future__ import annotations

import skia

from avdiff.corpus.face.brush import blob, fill, linear, oval, radial, stroke, tone
from avdiff.corpus.face.identity import RGB, Identity
from avdiff.corpus.face.mouth import CANVAS

_SHOULDERS = [
    (64, 101),
    (78, 102),
    (92, 107),
    (108, 111),
    (119, 119),
    (125, 136),
    (64, 150),
    (3, 136),
    (9, 119),
    (20, 111),
    (36, 107),
    (50, 102),
]
# x, y, width, height, which colour
_BOOKS = (
    (3, 14, 6, 20, 0),
    (9, 11, 7, 23, 1),
    (16, 16, 5, 18, 2),
    (104, 12, 7, 22, 2),
    (111, 15, 6, 19, 0),
    (2, 56, 8, 20, 2),
    (10, 60, 6, 16, 0),
    (116, 57, 8, 19, 1),
)
_FLAPS = ((18, 98), (29, 105), (27, 117), (20, 120), (8, 136), (5, 136))  # of a blazer


def draw_background(canvas: skia.Canvas, who: Identity) -> None:
    """Plain, gradient, studio light, shelf or window, all in large smooth shapes."""
    base = who.background_rgb
    canvas.drawPaint(fill(base))
    kinds = {"gradient": _gradient, "studio": _studio, "shelf": _shelf, "window": _window}
    if who.background in kinds:
        kinds[who.background](canvas, who)


def _gradient(canvas: skia.Canvas, who: Identity) -> None:
    base = who.background_rgb
    canvas.drawPaint(
        fill(base, 1, linear((0, 0), (30, CANVAS), ((tone(base, 1.22), 1), (tone(base, 0.80), 1))))
    )


def _studio(canvas: skia.Canvas, who: Identity) -> None:
    base = who.background_rgb
    shader = radial(
        (64, 44), 100, ((tone(base, 1.35), 1), (base, 1), (tone(base, 0.58), 1)), (0, 0.45, 1)
    )
    canvas.drawPaint(fill(base, 1, shader))


def _shelf(canvas: skia.Canvas, who: Identity) -> None:
    """Two boards with books and a plant, at the sides of the head."""
    base = who.background_rgb
    wood = tone(who.background_rgb, 0.66, (120, 84, 56), 0.45)
    canvas.drawPaint(
        fill(base, 1, linear((0, 0), (0, CANVAS), ((tone(base, 1.08), 1), (tone(base, 0.9), 1))))
    )
    for x, y, w, h, index in _BOOKS:
        canvas.drawRoundRect(skia.Rect.MakeXYWH(x, y, w, h), 1, 1, fill(who.decor_rgb[index]))
    canvas.drawOval(oval(108, 67, 6, 6.5), fill((86, 148, 96)))
    canvas.drawRoundRect(skia.Rect.MakeXYWH(104, 69, 8.5, 7), 1.5, 1.5, fill((206, 140, 98)))
    for y in (34, 76):
        canvas.drawRect(skia.Rect.MakeXYWH(0, y, CANVAS, 3.5), fill(wood))


def _window(canvas: skia.Canvas, who: Identity) -> None:
    """A window with sky and hills behind one shoulder."""
    base = who.background_rgb
    x = 72.0 if who.mirrored else 6.0
    frame = skia.Rect.MakeXYWH(x, 8, 50, 62)
    canvas.drawRoundRect(frame, 2, 2, fill(tone(base, 1.5)))
    pane = skia.Rect.MakeXYWH(x + 3.5, 11.5, 43, 55)
    canvas.save()
    canvas.clipRect(pane, True)
    canvas.drawPaint(
        fill(
            (170, 212, 240),
            1,
            linear((0, 10), (0, 66), (((142, 196, 238), 1), ((224, 240, 246), 1))),
        )
    )
    canvas.drawOval(oval(x + 14, 70, 26, 18), fill((128, 182, 118)))
    canvas.drawOval(oval(x + 40, 72, 26, 16), fill((104, 164, 108)))
    canvas.restore()
    canvas.drawRect(skia.Rect.MakeXYWH(x + 23.5, 10, 3, 58), fill(tone(base, 1.5)))
    canvas.drawRect(skia.Rect.MakeXYWH(x, 36, 50, 3), fill(tone(base, 1.5)))


def draw_body(canvas: skia.Canvas, who: Identity) -> None:
    """Shoulders, neck and clothes."""
    cloth = who.clothes_rgb
    canvas.save()
    if who.gender == "female":  # narrower shoulders
        canvas.translate(64, 0)
        canvas.scale(0.92, 1)
        canvas.translate(-64, 0)
    shade = linear((20, 104), (108, 128), ((tone(cloth, 1.10), 1), (tone(cloth, 0.82), 1)))
    canvas.drawPath(blob(_SHOULDERS), fill(cloth, 1, shade))
    kinds = {
        "T-shirt": _tshirt,
        "shirt": _shirt,
        "blazer": _blazer,
        "sweater": _sweater,
        "hoodie": _hoodie,
    }
    kinds[who.clothes](canvas, who)
    canvas.restore()


def _neck(canvas: skia.Canvas, who: Identity, depth: float = 112.0, width: float = 12.5) -> None:
    """Neck with the soft shadow of the chin; `depth` is where the neckline ends."""
    skin = who.skin_rgb
    path = blob(
        [
            (64 - width, 84),
            (64 - width, 98),
            (64 - width - 5, 104),
            (64, depth),
            (64 + width + 5, 104),
            (64 + width, 98),
            (64 + width, 84),
        ]
    )
    canvas.drawPath(
        path,
        fill(skin, 1, linear((0, 88), (0, 110), ((tone(skin, 0.74), 1), (tone(skin, 0.93), 1)))),
    )


def _round_collar(
    canvas: skia.Canvas, who: Identity, front: RGB, rx: float, ry: float, width: float
) -> None:
    """Neck in a round neckline `ry` deep: the far edge behind the neck, the near edge before it."""
    canvas.drawOval(oval(64, 101.5, rx, 4.5), fill(tone(who.clothes_rgb, 0.62)))
    canvas.drawOval(oval(64, 101.5, rx, 4.5), stroke(tone(front, 0.80), width * 0.8))
    _neck(canvas, who, 101.5 + ry, rx - 6)
    near = skia.Path()
    near.addArc(oval(64, 101.5, rx, ry), -4, 188)
    canvas.drawPath(near, stroke(front, width))


def _tshirt(canvas: skia.Canvas, who: Identity) -> None:
    _round_collar(canvas, who, tone(who.clothes_rgb, 0.80), 19.5, 12.5, 3)


def _sweater(canvas: skia.Canvas, who: Identity) -> None:
    _round_collar(canvas, who, tone(who.clothes_rgb, 0.86), 17.5, 7.0, 7)


def _hoodie(canvas: skia.Canvas, who: Identity) -> None:
    cloth = who.clothes_rgb
    canvas.drawPath(
        blob([(64, 92), (84, 94), (93, 103), (84, 114), (64, 120), (44, 114), (35, 103), (44, 94)]),
        fill(tone(cloth, 0.78)),
    )
    _round_collar(canvas, who, tone(cloth, 1.08), 18.5, 12, 5)
    for x in (57, 71):
        canvas.drawLine(
            x, 116, x - (64 - x) * 0.15, 126, stroke(tone(cloth, 1.5, (255, 255, 255), 0.4), 2)
        )


def _shirt(canvas: skia.Canvas, who: Identity) -> None:
    cloth = who.clothes_rgb
    _neck(canvas, who, 117)
    canvas.drawLine(64, 117, 64, 130, stroke(tone(cloth, 0.76), 1.8))
    for side in (-1, 1):
        canvas.drawPath(
            _flap(side, 17.5, 98, 3, 121), fill(tone(cloth, 1.16 if side < 0 else 1.06))
        )
    canvas.drawCircle(67.5, 124, 1.3, fill(tone(cloth, 0.6)))


def _blazer(canvas: skia.Canvas, who: Identity) -> None:
    shirt = who.shirt_rgb
    cloth = who.clothes_rgb
    inner = skia.Path()
    inner.addPoly(
        [skia.Point(46, 101), skia.Point(82, 101), skia.Point(70, 134), skia.Point(58, 134)], True
    )
    canvas.drawPath(inner, fill(shirt))
    _neck(canvas, who, 113)
    if who.gender == "male":
        for side in (-1, 1):
            canvas.drawPath(
                _flap(side, 15.5, 98, 2, 118), fill(tone(shirt, 1.15 if side < 0 else 1.0))
            )
    else:
        near = skia.Path()
        near.addArc(oval(64, 101, 17.5, 13), 10, 160)
        canvas.drawPath(near, stroke(tone(shirt, 0.85), 2))
    for side in (-1, 1):
        path = skia.Path()
        path.addPoly([skia.Point(64 + side * x, y) for x, y in _FLAPS], True)
        canvas.drawPath(path, fill(tone(cloth, 1.14 if side < 0 else 0.9)))


def _flap(side: int, out: float, top: float, gap: float, bottom: float) -> skia.Path:
    """One half of a collar."""
    corners = ((out - 3, top), (out + 2, top + 6), (gap + 8, bottom), (gap - 2, 112))
    path = skia.Path()
    path.addPoly([skia.Point(64 + side * x, y) for x, y in corners], True)
    return path
