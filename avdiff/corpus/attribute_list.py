"""Attribute lists: everything that a drawing shows, as one plain list of words behind a caption.

A caption as people write it leaves most of a picture open, and a model that learned from such
captions does not decide: it shows the average. The list tells all of it, with one wording for
training (`attribute_list` of what was drawn) and for generation (of what was completed).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.events.scene import Event
from avdiff.corpus.face.identity import COLORS, FRAME_COLORS, INNER_COLORS, LIPSTICKS, RGB, Identity

NONE = "none"
# Tokens that a letter takes at most on average, up to each end of a Unicode range
LETTER_COSTS = (
    ("\u0180", 0.26),  # Latin
    ("\u0900", 1.2),  # Greek, Cyrillic and others: the tokenizer knows only their bytes
    ("\u0980", 1.05),  # Devanagari
    ("\u3000", 1.0),
    ("\U0010ffff", 0.65),  # Chinese and Japanese
)
LONGEST = 90.0  # of a description with its list; the caption encoder reads 96 tokens
_ENDS = ".?!。？！।"
_HAD = {
    ("earrings", "studs"): "stud earrings",
    ("earrings", "hoops"): "hoop earrings",
    **{("lipstick", name): f"{name} lipstick" for name in LIPSTICKS},
}
HAND_KINDS = ("clap", "knock", "drum", "bell", "glass")  # events in which a hand is seen


def nearest_color(rgb: RGB, names: Mapping[str, RGB]) -> str:
    """The name whose colour is nearest to `rgb`."""
    distances = {
        name: float(np.linalg.norm(np.subtract(rgb, base))) for name, base in names.items()
    }
    return min(distances, key=distances.__getitem__)


def identity_attributes(identity: Identity) -> dict[str, str]:
    """All that is seen of a presenter, `Identity.attributes()` and what no caption says: name ->
    value in plain words, "none" for what is not there.
    """
    shown = identity.attributes()
    frames = nearest_color(identity.glasses_rgb, FRAME_COLORS)
    inner = nearest_color(identity.shirt_rgb, INNER_COLORS)
    decor = " ".join(nearest_color(rgb, COLORS) for rgb in identity.decor_rgb)
    return {
        **shown,
        "glasses_color": frames if identity.glasses != NONE else NONE,
        "shirt_color": inner if identity.clothes == "blazer" else NONE,
        "decor": decor if identity.background == "shelf" else NONE,
        "nose": identity.nose,
        "freckles": "freckles" if identity.freckles else NONE,
        "side": "right" if identity.mirrored else "left",
    }


def event_attributes(event: Event) -> dict[str, str]:
    """All that is seen of an object that sounds; how often it sounds is the onset track's."""
    shown = event.attributes()
    shown.pop("count")
    if event.kind not in HAND_KINDS:
        shown.pop("skin")
    return shown


def attribute_list(shown: Identity | Event | Mapping[str, str]) -> str:
    """Everything that is seen as a list: "female, red hair, bob, fair skin, navy shirt, ...".

    Args:
        shown: what was drawn, or the attributes that `identity_attributes`, `event_attributes` or
            `complete_description` gave. A name that is missing is left open.

    Returns:
        English words joined by commas, the most visible first, since a long caption loses its end.
    """
    if isinstance(shown, Identity):
        shown = identity_attributes(shown)
    elif isinstance(shown, Event):
        shown = event_attributes(shown)
    items = _event_items(shown) if "event" in shown else _face_items(shown)
    return ", ".join(item for item in items if item)


def with_list(description: str, listed: str) -> str:
    """A description with its list behind it.

    The list alone in place of a description that is empty, or so long that the caption encoder
    would not read the list to its end: told attributes stand in the list too.
    """
    text = description.strip()
    if not listed or not text or _cost(text) + _cost(listed) > LONGEST:
        return listed or text
    return f"{text} {listed}" if text[-1] in _ENDS else f"{text}. {listed}"


def caption_with_list(caption: str, listed: str) -> str:
    """A caption with quoted words, so that its description is `with_list` of what it was."""
    description, spoken = parse_prompt(caption)
    described = with_list(description, listed)
    return described if spoken is None else f'{described} "{spoken}"'


def _cost(text: str) -> float:
    """About how many tokens a text takes, from above: the caption tokenizer knows the letters of
    eight languages and spells out others.
    """
    return sum(next(cost for end, cost in LETTER_COSTS if letter < end) for letter in text)


def _face_items(shown: Mapping[str, str]) -> list[str]:
    """What only some men or some women can have is told of them alone, to keep the list short."""
    woman = shown.get("gender") == "female"
    return [
        shown.get("gender", ""),
        _noun(shown, "hair_color", "hair"),
        shown.get("hair_style", ""),
        _noun(shown, "skin", "skin"),
        _pair(shown, "clothes_color", "clothes"),
        _noun(shown, "shirt_color", "top" if woman else "collar"),  # under a blazer
        _noun({"": _pair(shown, "background_color", "background") or NONE}, "", "background"),
        _noun(shown, "decor", "books"),
        _had(shown, "glasses", "glasses_color"),
        _had(shown, "hat", "hat_color"),
        _had(shown, "beard", "", always=not woman),
        _noun(shown, "eye_color", "eyes"),
        _had(shown, "earrings", "", always=woman),
        _had(shown, "lipstick", "", always=woman),
        _noun(shown, "face_shape", "face"),
        _noun(shown, "nose", "nose"),
        _had(shown, "freckles", "", always=False),
        shown.get("side", ""),
    ]


def _event_items(shown: Mapping[str, str]) -> list[str]:
    return [
        shown["event"],
        shown.get("size", ""),
        _noun(shown, "color", "color"),
        "" if shown["event"] in ("drum", "glass", "clap") else shown.get("material", ""),
        _noun(shown, "floor", "floor"),
        _noun(shown, "background_color", "background"),
        _noun(shown, "skin", "skin"),
    ]


def _noun(shown: Mapping[str, str], name: str, noun: str) -> str:
    """ "fair skin", or nothing where the skin is open."""
    value = shown.get(name, NONE)
    return "" if value == NONE else f"{value} {noun}"


def _pair(shown: Mapping[str, str], first: str, second: str) -> str:
    """ "navy shirt"; either word may be open."""
    words = (shown.get(first, NONE), shown.get(second, NONE))
    return " ".join(word for word in words if word != NONE)


def _had(shown: Mapping[str, str], name: str, color: str = "", always: bool = True) -> str:
    """What somebody may have or not: "black round glasses" or "no glasses"; with `always` false,
    nothing in place of the latter.
    """
    value = shown.get(name, "")
    if value == NONE:
        return f"no {name}" if always else ""
    value = _HAD.get((name, value), value)
    tint = shown.get(color, NONE)
    return value if tint == NONE else f"{tint} {value}"
