"""Small helpers over skia: smooth closed curves, colours, soft shades. All in design units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import skia

from avdiff.corpus.face.identity import RGB
from avdiff.corpus.face.mouth import Curve


def tone(rgb: RGB, factor: float, tint: RGB | None = None, share: float = 0.0) -> RGB:
    """Lighter (> 1) or darker (< 1) colour, optionally mixed with `tint`."""
    value = np.asarray(rgb, float)
    value = value * factor if factor <= 1 else 255 - (255 - value) * (2 - factor)
    if tint is not None:
        value = value * (1 - share) + np.asarray(tint, float) * share
    red, green, blue = np.clip(np.round(value), 0, 255).astype(int)
    return int(red), int(green), int(blue)


def color(rgb: RGB, alpha: float = 1.0) -> int:
    """Packed skia colour."""
    return skia.Color(*rgb, round(255 * alpha))


def fill(rgb: RGB, alpha: float = 1.0, shader: skia.Shader | None = None) -> skia.Paint:
    """Anti-aliased fill."""
    return skia.Paint(Color=color(rgb, alpha), AntiAlias=True, Shader=shader)


def stroke(rgb: RGB, width: float, alpha: float = 1.0) -> skia.Paint:
    """Anti-aliased round stroke; `width` in design units."""
    return skia.Paint(
        Color=color(rgb, alpha),
        AntiAlias=True,
        Style=skia.Paint.kStroke_Style,
        StrokeWidth=width,
        StrokeCap=skia.Paint.kRound_Cap,
        StrokeJoin=skia.Paint.kRound_Join,
    )


def radial(
    centre: tuple[float, float],
    radius: float,
    stops: Sequence[tuple[RGB, float]],
    places: Sequence[float] | None = None,
) -> skia.Shader:
    """Radial gradient through (colour, alpha) stops."""
    return skia.GradientShader.MakeRadial(
        skia.Point(*centre),
        radius,
        [color(*stop) for stop in stops],
        None if places is None else list(places),
    )


def linear(
    start: tuple[float, float], end: tuple[float, float], stops: Sequence[tuple[RGB, float]]
) -> skia.Shader:
    """Linear gradient through (colour, alpha) stops."""
    return skia.GradientShader.MakeLinear(
        [skia.Point(*start), skia.Point(*end)], [color(*stop) for stop in stops]
    )


def blob(points: Sequence[tuple[float, float]]) -> skia.Path:
    """Smooth closed curve through the points (Catmull-Rom as cubic Beziers)."""
    p = np.asarray(points, float)
    before = np.roll(p, 1, 0)
    after = np.roll(p, -1, 0)
    second = np.roll(p, -2, 0)
    one = p + (after - before) / 6
    two = after - (second - p) / 6
    path = skia.Path()
    path.moveTo(*p[0].tolist())
    for a, b, c in zip(one.tolist(), two.tolist(), after.tolist(), strict=True):
        path.cubicTo(*a, *b, *c)
    path.close()
    return path


def curves(path: skia.Path, edge: Iterable[Curve], move: bool) -> skia.Path:
    """Append an edge made of cubic curves; `move` starts a new contour, else a line leads to its
    start.
    """
    for index, curve in enumerate(edge):
        p0, c1, c2, p3 = curve.points.tolist()
        if index == 0:
            (path.moveTo if move else path.lineTo)(*p0)
        path.cubicTo(*c1, *c2, *p3)
    return path


def backwards(edge: tuple[Curve, Curve]) -> tuple[Curve, Curve]:
    """The same edge from right to left."""
    return Curve(edge[1].points[::-1]), Curve(edge[0].points[::-1])


def between(upper: tuple[Curve, Curve], lower: tuple[Curve, Curve]) -> skia.Path:
    """Closed region between two edges."""
    path = curves(skia.Path(), upper, move=True)
    curves(path, backwards(lower), move=False)
    path.close()
    return path


def oval(x: float, y: float, rx: float, ry: float) -> skia.Rect:
    """Bounding box of an ellipse by its centre and radii."""
    return skia.Rect.MakeLTRB(x - rx, y - ry, x + rx, y + ry)
