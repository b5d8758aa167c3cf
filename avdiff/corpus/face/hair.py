"""Hair, beards and hats as point lists in the head's frame (design units; face half width 27, skull
-38, chin 36).

Each hair style is (shapes behind the head, shapes in front of it); a shape is a list of points for
a smooth closed curve, or (x, y, r) circles of a cluster.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

Points = list[tuple[float, float]]
Circles = list[tuple[float, float, float]]

#: Styles that hang over the ears.
COVERS_EARS = frozenset(("long straight", "wavy", "bob", "bob with a fringe", "shoulder-length"))


class Hair(NamedTuple):
    """What to draw: closed curves and circles behind the head, then in front."""

    back: tuple[Points, ...] = ()
    front: tuple[Points, ...] = ()
    back_circles: Circles = []
    front_circles: Circles = []


def _mirror(right: Points) -> Points:
    """Right half from top to bottom -> whole closed outline."""
    return right + [(-x, y) for x, y in reversed(right) if x > 0.01]


_CROP: Points = [
    (-28.5, -1),
    (-30.5, -18),
    (-26, -36),
    (-11, -45),
    (10, -46),
    (26, -37),
    (31, -18),
    (28.5, -1),
    (25.8, -5),
    (24.5, -16),
    (15, -23),
    (0, -21.5),
    (-14, -25),
    (-23, -17),
    (-25.8, -5),
]
_SIDE_PART: Points = [
    (-28.5, 2),
    (-31, -16),
    (-29, -34),
    (-16, -45),
    (6, -48),
    (26, -40),
    (31.5, -20),
    (28.5, 2),
    (26, -4),
    (24.5, -13),
    (18, -19),
    (2, -21),
    (-10, -27),
    (-16, -34),
    (-20, -23),
    (-25, -13),
    (-26, -4),
]
_QUIFF: Points = [
    (-27.8, -3),
    (-29.5, -20),
    (-27, -32),
    (-22, -37),
    (-14, -43),
    (4, -50),
    (20, -51),
    (31, -43),
    (31, -30),
    (29.5, -18),
    (27.8, -3),
    (25.5, -8),
    (24, -18),
    (17, -24),
    (2, -29),
    (-14, -27),
    (-23, -18),
    (-25.5, -8),
]
_BUZZ: Points = [
    (-27.6, -2),
    (-28.8, -18),
    (-22.5, -34),
    (-9, -41.5),
    (9, -41.5),
    (22.5, -34),
    (28.8, -18),
    (27.6, -2),
    (26, -8),
    (24, -19),
    (14, -26.5),
    (0, -28),
    (-14, -26.5),
    (-24, -19),
    (-26, -8),
]
_SWEPT: Points = [
    (-28, 0),
    (-30.5, -18),
    (-25, -37),
    (-9, -47),
    (9, -47),
    (25, -37),
    (30.5, -18),
    (28, 0),
    (26, -6),
    (23.5, -18),
    (13, -27.5),
    (0, -30),
    (-13, -27.5),
    (-23.5, -18),
    (-26, -6),
]
_CAP_FRONT: Points = [
    (-29, 24),
    (-33, 4),
    (-32, -16),
    (-26, -36),
    (-10, -46),
    (10, -46),
    (26, -36),
    (32, -16),
    (33, 4),
    (29, 24),
    (26.6, 12),
    (25.5, -6),
    (21.5, -17),
    (11, -25),
    (1, -31),
    (-11, -25),
    (-21.5, -17),
    (-25.5, -6),
    (-26.6, 12),
]
_TIED_FRONT: Points = [
    (-28, 4),
    (-30, -14),
    (-25, -34),
    (-10, -43),
    (10, -43),
    (25, -34),
    (30, -14),
    (28, 4),
    (26, -5),
    (22.5, -17),
    (12, -25),
    (1, -30),
    (-12, -25),
    (-22.5, -17),
    (-26, -5),
]
_SIDE_FRONT: Points = [
    (-29, 22),
    (-33.5, 2),
    (-32.5, -16),
    (-28, -34),
    (-13, -46),
    (9, -47),
    (27, -36),
    (33, -14),
    (33.5, 4),
    (29, 22),
    (26.6, 12),
    (24.5, -10),
    (12, -19),
    (-4, -26),
    (-10, -33),
    (-15, -24),
    (-23, -12),
    (-26.6, 10),
]
_FRINGE: Points = [
    (-29, 24),
    (-33.5, 4),
    (-32.5, -14),
    (-28, -34),
    (-13, -46),
    (13, -46),
    (28, -34),
    (32.5, -14),
    (33.5, 4),
    (29, 24),
    (26.6, 12),
    (24.5, -9),
    (14, -13.5),
    (0, -14.5),
    (-14, -13.5),
    (-24.5, -9),
    (-26.6, 12),
]
_LONG_BACK = _mirror(
    [(0, -46), (22, -42), (33, -24), (36, 4), (37, 30), (36, 56), (30, 68), (14, 72), (0, 72)]
)
_BOB_BACK = _mirror(
    [(0, -46), (22, -42), (33.5, -22), (37, 2), (37.5, 20), (33, 33), (20, 36), (0, 34)]
)
_MANE_BACK = _mirror(
    [(0, -45), (21, -41), (32, -24), (34, 0), (35, 22), (34, 38), (26, 44), (0, 42)]
)
_SKULL_BACK = _mirror([(0, -44), (20, -40), (30, -22), (30, -2), (26, 14), (12, 22), (0, 22)])
_TAIL: Points = [
    (16, -40),
    (33, -40),
    (45, -24),
    (49, 2),
    (47, 28),
    (39, 46),
    (33, 32),
    (34, 8),
    (28, -16),
]


def _wavy_back() -> Points:
    right: Points = [
        (0, -47),
        (22, -44),
        (35, -26),
        (34, -8),
        (39, 8),
        (37, 22),
        (42, 38),
        (38, 52),
        (40, 64),
        (26, 72),
        (0, 70),
    ]
    return _mirror(right)


def _ring(
    rng: np.random.Generator,
    count: int,
    start: float,
    stop: float,
    radius: tuple[float, float],
    size: float,
    centre: tuple[float, float] = (0.0, -10.0),
) -> Circles:
    """Circles along an ellipse from `start` to `stop` degrees (0 = right, -90 = top), sizes
    slightly varied.
    """
    angles = np.deg2rad(np.linspace(start, stop, count))
    sizes = size * rng.uniform(0.88, 1.12, count)
    return [
        (
            float(centre[0] + radius[0] * np.cos(a)),
            float(centre[1] + radius[1] * np.sin(a)),
            float(s),
        )
        for a, s in zip(angles, sizes, strict=True)
    ]


def _curly(rng: np.random.Generator) -> Hair:
    back = _ring(rng, 17, -222, 42, (31, 33), 11.5, (0, -6)) + _ring(
        rng, 7, 20, 60, (33, 34), 10, (0, 2)
    )
    back += _ring(rng, 7, 120, 160, (33, 34), 10, (0, 2))
    front = _ring(rng, 9, -168, -12, (25, 26), 8.5, (0, -14))
    return Hair(back=(_BOB_BACK,), front_circles=front, back_circles=back)


def _short_curly(rng: np.random.Generator) -> Hair:
    back = _ring(rng, 13, -186, 6, (27, 30), 8.5, (0, -12))
    return Hair(
        back=(_SKULL_BACK,),
        back_circles=back,
        front_circles=_ring(rng, 10, -170, -10, (25.5, 25), 7.5, (0, -14)),
    )


def _afro(rng: np.random.Generator) -> Hair:
    back = _ring(rng, 19, -214, 34, (31, 29), 11, (0, -13))
    ball = _mirror([(0, -48), (22, -44), (36, -28), (39, -10), (33, 6), (20, 12), (0, 12)])
    return Hair(
        back=(ball,),
        back_circles=back,
        front_circles=_ring(rng, 11, -174, -6, (25.5, 21), 7.5, (0, -13)),
    )


def _braids() -> Hair:
    left = [(-30.0 - 1.2 * (k % 2), 16 + 8.5 * k, 6.6 - 0.25 * k) for k in range(7)]
    return Hair(
        back=(_SKULL_BACK,),
        front=(_TIED_FRONT,),
        front_circles=left + [(-x, y, r) for x, y, r in left],
    )


def hair_of(style: str, seed: int, mirrored: bool = False) -> Hair:
    """Shapes of a hair style; `seed` places the curls, `mirrored` swaps left and right.

    Raises:
        ValueError: an unknown style.
    """
    rng = np.random.default_rng(seed)
    styles = {
        "long straight": lambda: Hair((_LONG_BACK,), (_CAP_FRONT,)),
        "wavy": lambda: Hair((_wavy_back(),), (_SIDE_FRONT,)),
        "bob": lambda: Hair((_BOB_BACK,), (_SIDE_FRONT,)),
        "bob with a fringe": lambda: Hair((_BOB_BACK,), (_FRINGE,)),
        "curly": lambda: _curly(rng),
        "bun": lambda: Hair((_SKULL_BACK,), (_TIED_FRONT,), back_circles=[(0.0, -45.0, 10.5)]),
        "ponytail": lambda: Hair((_SKULL_BACK, _TAIL), (_SIDE_PART,)),
        "afro": lambda: _afro(rng),
        "pixie": lambda: Hair((_SKULL_BACK,), (_SIDE_PART,)),
        "braids": _braids,
        "short": lambda: Hair((), (_CROP,)),
        "side-parted": lambda: Hair((), (_SIDE_PART,)),
        "quiff": lambda: Hair((), (_QUIFF,)),
        "buzz cut": lambda: Hair((), (_BUZZ,)),
        "bald": lambda: Hair(),
        "short curly": lambda: _short_curly(rng),
        "swept-back": lambda: Hair((_SKULL_BACK,), (_SWEPT,)),
        "shoulder-length": lambda: Hair((_MANE_BACK,), (_CAP_FRONT,)),
    }
    if style not in styles:
        raise ValueError(f"style={style!r}: needs one of {', '.join(styles)}")
    hair = styles[style]()
    if not mirrored:
        return hair
    flip = [
        tuple([(-x, y) for x, y in reversed(points)] for points in side)
        for side in (hair.back, hair.front)
    ]
    turn = [[(-x, y, r) for x, y, r in side] for side in (hair.back_circles, hair.front_circles)]
    return Hair(flip[0], flip[1], turn[0], turn[1])
