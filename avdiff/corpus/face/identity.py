"""Who the presenter is: every attribute of a drawn face, sampled from one generator, and the split
by identity.

Colours are continuous but each comes from a class with a name, so captions can speak of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

RGB = tuple[int, int, int]

SKINS: dict[str, RGB] = {
    "fair": (250, 216, 192),
    "light": (240, 194, 162),
    "tan": (217, 163, 120),
    "brown": (172, 114, 76),
    "dark": (122, 78, 54),
}
HAIRS: dict[str, RGB] = {
    "black": (38, 34, 40),
    "brown": (98, 62, 40),
    "blonde": (228, 186, 104),
    "red": (190, 84, 40),
    "grey": (150, 152, 158),
    "white": (232, 232, 236),
    "blue": (62, 112, 190),
    "pink": (232, 130, 172),
}
IRISES: dict[str, RGB] = {
    "brown": (104, 66, 38),
    "blue": (66, 124, 190),
    "green": (86, 140, 82),
    "grey": (118, 132, 146),
}
COLORS: dict[str, RGB] = {
    "red": (204, 62, 58),
    "orange": (236, 138, 58),
    "yellow": (240, 200, 82),
    "green": (74, 152, 94),
    "teal": (52, 146, 148),
    "blue": (62, 110, 186),
    "navy": (44, 58, 102),
    "purple": (130, 88, 168),
    "pink": (234, 138, 164),
    "white": (238, 238, 234),
    "grey": (134, 140, 148),
    "black": (50, 50, 58),
    "brown": (138, 96, 64),
}
BACKDROPS: dict[str, RGB] = {
    "sky blue": (160, 204, 232),
    "blue": (96, 142, 202),
    "mint": (168, 218, 196),
    "green": (126, 180, 134),
    "cream": (240, 226, 196),
    "peach": (246, 200, 170),
    "pink": (240, 190, 204),
    "lavender": (200, 186, 228),
    "purple": (142, 116, 180),
    "grey": (186, 192, 198),
    "dark grey": (92, 98, 110),
    "navy": (58, 72, 110),
    "yellow": (244, 214, 118),
    "teal": (94, 170, 172),
}
LIPSTICKS: dict[str, RGB] = {
    "red": (204, 50, 62),
    "rose": (206, 88, 106),
    "plum": (150, 62, 96),
    "coral": (224, 100, 86),
}
FRAME_COLORS: dict[str, RGB] = {
    "black": (40, 40, 46),
    "brown": (110, 62, 40),
    "red": (170, 50, 58),
    "navy": (52, 76, 124),
}
INNER_COLORS: dict[str, RGB] = {
    name: COLORS[name] for name in ("white", "grey", "blue", "pink", "black")
}  # of a shirt under a blazer

FACE_SHAPES = ("oval", "round", "square", "heart", "long")
NOSES = ("button", "straight", "wide", "pointed")
HAIR_STYLES: dict[str, tuple[str, ...]] = {
    "female": (
        "long straight",
        "wavy",
        "bob",
        "bob with a fringe",
        "curly",
        "bun",
        "ponytail",
        "afro",
        "pixie",
        "braids",
    ),
    "male": (
        "short",
        "side-parted",
        "quiff",
        "buzz cut",
        "bald",
        "short curly",
        "afro",
        "swept-back",
        "shoulder-length",
    ),
}
BEARDS = ("none", "stubble", "full beard", "goatee", "moustache")
GLASSES = ("none", "round glasses", "square glasses", "half-rim glasses")
HATS = ("none", "beanie", "cap", "sun hat")
EARRINGS = ("none", "studs", "hoops")
CLOTHES = ("T-shirt", "shirt", "blazer", "sweater", "hoodie")
BACKGROUNDS = ("plain", "gradient", "studio", "shelf", "window")
# How often each value of a table is drawn, in the table's order
HAIR_WEIGHTS = {
    "female": (22, 24, 18, 12, 9, 6, 2, 3),
    "male": (26, 26, 15, 11, 12, 8, 1, 0),
}
HAT_WEIGHTS = {"female": (84, 6, 6, 4), "male": (84, 6, 6, 2)}
HATLESS_STYLES = ("afro", "bun", "quiff")  # no hat fits over them
BEARD_WEIGHTS = (46, 14, 16, 12, 12)
GLASSES_WEIGHTS = (66, 14, 14, 6)
EARRING_WEIGHTS = {"female": (55, 25, 20), "male": (94, 5, 1)}
BACKGROUND_WEIGHTS = (30, 25, 15, 15, 15)
LIPSTICK_SHARE = 0.45  # of women
FRECKLES_SHARE = 0.12
BACKDROP_GAP = 70.0  # least distance of a background from hair, skin and clothes


def eye_weights(skin: str) -> tuple[int, ...]:
    """How often each colour of eyes is drawn with a skin."""
    return (8, 1, 1, 1) if skin in ("brown", "dark") else (4, 3, 2, 1)


SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Identity:
    """All attributes of one presenter. Colours are 8-bit RGB; sizes are factors around 1.

    `*_color` are names from the tables of this module, `*_rgb` the sampled colours drawn.
    """

    gender: str
    skin: str
    skin_rgb: RGB
    face_shape: str
    face_width: float
    face_height: float
    nose: str
    nose_size: float
    eye_size: float
    eye_gap: float
    eye_color: str
    eye_rgb: RGB
    brow_weight: float
    brow_arch: float
    ear_size: float
    mouth_size: float
    lip_weight: float
    lip_rgb: RGB
    lipstick: str
    blush: float
    freckles: bool
    hair_style: str
    hair_color: str
    hair_rgb: RGB
    hair_seed: int
    mirrored: bool
    beard: str
    glasses: str
    glasses_rgb: RGB
    hat: str
    hat_color: str
    hat_rgb: RGB
    earrings: str
    clothes: str
    clothes_color: str
    clothes_rgb: RGB
    shirt_rgb: RGB
    background: str
    background_color: str
    background_rgb: RGB
    decor_rgb: tuple[RGB, RGB, RGB]

    def attributes(self) -> dict[str, str]:
        """What a caption may say: plain words, "none" for what is not there."""
        names = (
            "gender",
            "hair_color",
            "hair_style",
            "skin",
            "eye_color",
            "beard",
            "glasses",
            "hat",
            "hat_color",
            "earrings",
            "lipstick",
            "clothes",
            "clothes_color",
            "background",
            "background_color",
            "face_shape",
        )
        told = {name: str(getattr(self, name)) for name in names}
        if self.hair_style == "bald":
            told["hair_color"] = "none"
        if self.hat == "none":
            told["hat_color"] = "none"
        return told


def _near(rng: np.random.Generator, base: RGB, spread: float = 9.0) -> RGB:
    """A colour near `base`: common change of lightness, small change of hue."""
    value = np.asarray(base, float) * (1 + rng.normal(0, spread / 160)) + rng.normal(
        0, spread / 3, 3
    )
    red, green, blue = np.clip(np.round(value), 12, 252).astype(int)
    return int(red), int(green), int(blue)


def _pick(
    rng: np.random.Generator,
    names: dict[str, RGB] | tuple[str, ...],
    weights: Sequence[float] | None = None,
) -> str:
    probability = None if weights is None else np.asarray(weights) / np.sum(weights)
    return str(rng.choice(list(names), p=probability))


def color_distance(one: RGB, two: RGB) -> float:
    """Euclidean, of 8-bit RGB."""
    return float(np.linalg.norm(np.subtract(one, two)))


def _backdrop(rng: np.random.Generator, avoid: tuple[RGB, ...]) -> tuple[str, RGB]:
    """A background colour that the hair, skin and clothes stand out from."""
    best = ("grey", BACKDROPS["grey"])
    score = -1.0
    for _ in range(12):
        name = _pick(rng, BACKDROPS)
        rgb = _near(rng, BACKDROPS[name])
        gap = min(color_distance(rgb, other) for other in avoid)
        if gap > BACKDROP_GAP:
            return name, rgb
        if gap > score:
            best = (name, rgb)
            score = gap
    return best


def _lips(rng: np.random.Generator, skin_rgb: RGB, gender: str) -> tuple[str, RGB]:
    """Lip colour: natural lips are a redder, deeper skin; a lipstick is drawn for some women."""
    share = (
        0.62 if gender == "female" else 0.75
    )  # of the skin; the rest is a lip red that also lightens dark lips
    red, green, blue = (
        int(share * c + (1 - share) * lip) for c, lip in zip(skin_rgb, (214, 64, 78), strict=True)
    )
    natural = (red, int(green * 0.86), int(blue * 0.88))
    if gender == "male":
        return "none", natural
    if rng.random() < LIPSTICK_SHARE:
        name = _pick(rng, LIPSTICKS)
        return name, _near(rng, LIPSTICKS[name], 6)
    return "none", natural


def _hair(rng: np.random.Generator, gender: str) -> tuple[str, str, RGB, str]:
    """Style, colour name, colour, hat (a hat only over styles that show beneath it)."""
    style = _pick(rng, HAIR_STYLES[gender])
    color = _pick(rng, HAIRS, HAIR_WEIGHTS[gender])
    hat = _pick(rng, HATS, HAT_WEIGHTS[gender])
    if style in HATLESS_STYLES:
        hat = "none"
    return style, color, _near(rng, HAIRS[color], 7), hat


def sample_identity(
    rng: np.random.Generator, gender: str | None = None, split: str | None = None
) -> Identity:
    """Draw a presenter.

    Args:
        rng: source of all randomness.
        gender: "female", "male" or None for either.
        split: draw until `identity_split` gives this split; None takes any.

    Raises:
        ValueError: an unknown gender or split.
    """
    if gender not in (None, "female", "male"):
        raise ValueError(f"gender={gender!r}: needs 'female', 'male' or None")
    if split not in (None, *SPLITS):
        raise ValueError(f"split={split!r}: needs one of {', '.join(SPLITS)}, or None")
    while True:
        identity = _sample(rng, gender)
        if split is None or identity_split(identity) == split:
            return identity


def _sample(rng: np.random.Generator, gender: str | None) -> Identity:
    gender = gender or _pick(rng, ("female", "male"))
    woman = gender == "female"
    skin = _pick(rng, SKINS)
    skin_rgb = _near(rng, SKINS[skin], 6)
    style, hair_color, hair_rgb, hat = _hair(rng, gender)
    lipstick, lip_rgb = _lips(rng, skin_rgb, gender)
    clothes = _pick(rng, CLOTHES)
    clothes_color = _pick(rng, COLORS)
    hat_color = _pick(rng, COLORS)
    clothes_rgb = _near(rng, COLORS[clothes_color])
    iris = _pick(rng, IRISES, eye_weights(skin))
    background_color, background_rgb = _backdrop(rng, (hair_rgb, skin_rgb, clothes_rgb))
    decor = tuple(_near(rng, COLORS[_pick(rng, COLORS)]) for _ in range(3))
    return Identity(
        gender=gender,
        skin=skin,
        skin_rgb=skin_rgb,
        face_shape=_pick(rng, FACE_SHAPES),
        face_width=float(rng.uniform(0.94, 1.05) * (0.98 if woman else 1.02)),
        face_height=float(rng.uniform(0.96, 1.04)),
        nose=_pick(rng, NOSES),
        nose_size=float(rng.uniform(0.85, 1.15) * (0.92 if woman else 1.08)),
        eye_size=float(rng.uniform(0.9, 1.12) * (1.06 if woman else 0.94)),
        eye_gap=float(rng.uniform(0.94, 1.08)),
        eye_color=iris,
        eye_rgb=_near(rng, IRISES[iris], 8),
        brow_weight=float(rng.uniform(0.8, 1.2) * (0.82 if woman else 1.15)),
        brow_arch=float(rng.uniform(0.65, 1.3)),
        ear_size=float(rng.uniform(0.9, 1.15)),
        mouth_size=float(rng.uniform(0.94, 1.06)),
        lip_weight=float(rng.uniform(0.9, 1.15) * (1.08 if woman else 0.9)),
        lip_rgb=lip_rgb,
        lipstick=lipstick,
        blush=float(rng.uniform(0.1, 0.5) * (1.0 if woman else 0.6)),
        freckles=bool(rng.random() < FRECKLES_SHARE),
        hair_style=style,
        hair_color=hair_color,
        hair_rgb=hair_rgb,
        hair_seed=int(rng.integers(1 << 30)),
        mirrored=bool(rng.random() < 0.5),
        beard="none" if woman else _pick(rng, BEARDS, BEARD_WEIGHTS),
        glasses=_pick(rng, GLASSES, GLASSES_WEIGHTS),
        glasses_rgb=_near(rng, list(FRAME_COLORS.values())[int(rng.integers(4))]),
        hat=hat,
        hat_color=hat_color,
        hat_rgb=_near(rng, COLORS[hat_color]),
        earrings=_pick(rng, EARRINGS, EARRING_WEIGHTS[gender]),
        clothes=clothes,
        clothes_color=clothes_color,
        clothes_rgb=clothes_rgb,
        shirt_rgb=_near(rng, list(INNER_COLORS.values())[int(rng.integers(5))]),
        background=_pick(rng, BACKGROUNDS, BACKGROUND_WEIGHTS),
        background_color=background_color,
        background_rgb=background_rgb,
        decor_rgb=(decor[0], decor[1], decor[2]),
    )


def identity_split(identity: Identity) -> str:
    """ "train" (90 %), "val" (5 %) or "test" (5 %), by the combination of attributes that make a
    person recognisable.

    A held-out presenter is a combination that no training presenter has, however often one samples.
    """
    told = tuple(
        str(getattr(identity, name))
        for name in ("gender", "skin", "hair_style", "hair_color", "beard", "glasses", "face_shape")
    )
    bucket = int.from_bytes(hashlib.sha256("|".join(told).encode()).digest()[:4], "big") % 100
    return "val" if bucket < 5 else "test" if bucket < 10 else "train"


def identity_key(identity: Identity) -> str:
    """Short stable name of exactly this presenter (16 hex digits)."""
    parts = "|".join(
        f"{field.name}={getattr(identity, field.name)!r}" for field in fields(identity)
    )
    return hashlib.sha256(parts.encode()).hexdigest()[:16]
