"""Descriptions completed: what is stated stays, what is open is drawn as the corpus draws it.

A short description fits many people, and a network that must choose among them shows a mixture.
Here the choice is made before the first step of denoising, once, by the seed, and told to the
network with the words that it learned (`attribute_list`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np

from avdiff.corpus.attribute_list import (
    HAND_KINDS,
    NONE,
    attribute_list,
    identity_attributes,
    with_list,
)
from avdiff.corpus.cast import cast_member_in
from avdiff.corpus.domain import presenter_domain
from avdiff.corpus.events.scene import FLOORS, KINDS, MATERIALS, SIZES, backdrops_for
from avdiff.corpus.face import identity as looks
from avdiff.corpus.stated_attributes import language_of, stated_attributes

Stated = Mapping[str, frozenset[str]]


def complete_description(
    description: str,
    language: str,
    seed: int,
    event: bool | None = None,
    seen: Mapping[str, str] | None = None,
) -> tuple[str, dict[str, str]]:
    """Decide what a description leaves open.

    Args:
        description: what is seen, without the spoken words (`parse_prompt`), in any of eight
            languages. A name of the cast says as much as its member's whole look.
        language: that is spoken, or that the description is in: taken where its own words do not
            tell. One of eight.
        seed: another one, another person.
        event: an object sounds and nobody speaks; None: as the description has it.
        seen: attributes that given pictures show; they stand where the words say nothing.

    Returns:
        (description with the list of all attributes behind, attributes name -> value). Words that
        the corpus has no value for are left to themselves, and so are descriptions of an event
        that name none of its objects: these come back as they are, with {}.

    Raises:
        ValueError: an unknown language or a negative seed.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: needs 0 or more")
    written = language_of(description, language)
    if event is None:
        event = presenter_domain().is_event(description)
    stated = stated_attributes(description, written, event)
    if event:
        attributes = _draw_event(stated, seed)
    else:
        member = cast_member_in(description)
        known = dict(identity_attributes(member.identity)) if member else {}
        known |= seen or {}
        attributes = _draw_presenter({**_believed(known, stated), **stated}, seed)
    return with_list(description, attribute_list(attributes)), attributes


def _believed(known: Mapping[str, str], stated: Stated) -> dict[str, frozenset[str]]:
    """What is known beforehand, less what cannot be together with what is stated."""
    believed = {name: frozenset((value,)) for name, value in known.items()}
    for whole, part in (
        ("hat", "hat_color"),
        ("glasses", "glasses_color"),
        ("clothes", "shirt_color"),
        ("background", "decor"),
    ):
        if whole in stated and known.get(whole) not in stated[whole]:
            believed.pop(part, None)
    gender = stated.get("gender")
    if gender and known.get("gender") not in gender:
        for name in ("hair_style", "beard", "lipstick", "earrings"):
            believed.pop(name, None)
    return believed


def _choose(
    stated: Stated,
    seed: int,
    name: str,
    values: Iterable[str],
    weights: Sequence[float] | None = None,
) -> str:
    """One value of an attribute: a draw among those that are stated, or among all.

    Each attribute has random numbers of its own, so that a word more in a description changes
    nothing but what it says. "" where what is stated is none of the corpus' values.
    """
    names = list(values)
    chances = np.ones(len(names)) if weights is None else np.asarray(weights, float)
    if name in stated:
        if not stated[name]:
            return ""
        allowed = np.array([value in stated[name] for value in names])
        if not allowed.any():
            return min(stated[name])
        chances = np.where(allowed, chances, 0.0)
        if not chances.any():
            chances = allowed.astype(float)
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    draw = np.random.default_rng([seed, key]).random()
    place = int(np.searchsorted(np.cumsum(chances) / chances.sum(), draw, side="right"))
    return names[min(place, len(names) - 1)]


def _draw_presenter(stated: Stated, seed: int) -> dict[str, str]:
    """All attributes of a presenter, in the order in which they depend on each other."""
    choose = partial(_choose, stated, seed)
    gender = choose("gender", ("female", "male"), _gender_weights(stated))
    woman = gender == "female"
    skin = choose("skin", looks.SKINS)
    style = choose("hair_style", looks.HAIR_STYLES[gender])
    hat = choose("hat", looks.HATS, looks.HAT_WEIGHTS[gender])
    if style in looks.HATLESS_STYLES and "hat" not in stated:
        hat = NONE
    lips = (1 - looks.LIPSTICK_SHARE, *[looks.LIPSTICK_SHARE / 4] * 4)
    glasses = choose("glasses", looks.GLASSES, looks.GLASSES_WEIGHTS)
    clothes = choose("clothes", looks.CLOTHES)
    background = choose("background", looks.BACKGROUNDS, looks.BACKGROUND_WEIGHTS)
    hair_color = choose("hair_color", looks.HAIRS, looks.HAIR_WEIGHTS[gender])
    clothes_color = choose("clothes_color", looks.COLORS)
    beards = looks.BEARD_WEIGHTS if not woman else (1, 0, 0, 0, 0)
    attributes = {
        "gender": gender,
        "skin": skin,
        "face_shape": choose("face_shape", looks.FACE_SHAPES),
        "nose": choose("nose", looks.NOSES),
        "hair_style": style,
        "hair_color": NONE if style == "bald" else hair_color,
        "eye_color": choose("eye_color", looks.IRISES, looks.eye_weights(skin)),
        "beard": choose("beard", looks.BEARDS, beards),
        "glasses": glasses,
        "glasses_color": _of(glasses, choose("glasses_color", looks.FRAME_COLORS)),
        "hat": hat,
        "hat_color": _of(hat, choose("hat_color", looks.COLORS)),
        "earrings": choose("earrings", looks.EARRINGS, looks.EARRING_WEIGHTS[gender]),
        "lipstick": choose(
            "lipstick", (NONE, *looks.LIPSTICKS), lips if woman else (1, 0, 0, 0, 0)
        ),
        "freckles": choose(
            "freckles", (NONE, "freckles"), (1 - looks.FRECKLES_SHARE, looks.FRECKLES_SHARE)
        ),
        "clothes": clothes,
        "clothes_color": clothes_color,
        "shirt_color": choose("shirt_color", looks.INNER_COLORS) if clothes == "blazer" else NONE,
        "background": background,
        "background_color": choose("background_color", _backdrops(hair_color, skin, clothes_color)),
        "decor": _decor(choose) if background == "shelf" else NONE,
        "side": choose("side", ("left", "right")),
    }
    return {name: value for name, value in attributes.items() if value}


def _gender_weights(stated: Stated) -> tuple[float, float]:
    """A beard or a style that only one of them has tells who it is."""
    fits = []
    for gender, styles in looks.HAIR_STYLES.items():
        told = stated.get("hair_style", frozenset(styles)) or frozenset(styles)
        bearded = stated.get("beard", frozenset((NONE,))) - {NONE}
        painted = stated.get("lipstick", frozenset((NONE,))) - {NONE}
        possible = bool(told & set(styles)) and not (bearded if gender == "female" else painted)
        fits.append(float(possible))
    return (fits[0], fits[1]) if any(fits) else (1.0, 1.0)


def _of(thing: str, color: str) -> str:
    """The colour of a thing that is there, or open with it."""
    return NONE if thing == NONE else color if thing else ""


def _decor(choose: partial[str]) -> str:
    return " ".join(choose(f"book {number}", looks.COLORS) for number in range(3))


def _backdrops(hair: str, skin: str, clothes: str) -> list[str]:
    """Background colours from which hair, skin and clothes stand out, as in the corpus."""
    tables = ((looks.HAIRS, hair), (looks.SKINS, skin), (looks.COLORS, clothes))
    others = [table[name] for table, name in tables if name in table]
    names = list(looks.BACKDROPS)
    gaps = [
        min((looks.color_distance(rgb, other) for other in others), default=np.inf)
        for rgb in looks.BACKDROPS.values()
    ]
    fitting = [name for name, gap in zip(names, gaps, strict=True) if gap > looks.BACKDROP_GAP]
    return fitting or names


def _draw_event(stated: Stated, seed: int) -> dict[str, str]:
    """All attributes of an object whose kind is stated, else none."""
    kind = next((k for k in KINDS if stated.get("kind") == frozenset((k,))), None)
    if kind is None:
        return {}
    choose = partial(_choose, stated, seed)
    color = choose("color", looks.COLORS)
    skin = choose("skin", looks.SKINS)
    material = choose("material", MATERIALS[kind])
    attributes = {
        "event": kind,
        "size": choose("size", SIZES),
        "color": color,
        "material": material if material in MATERIALS[kind] else "",
        "background_color": choose("background_color", backdrops_for(color, skin)),
    }
    if kind in HAND_KINDS:
        attributes["skin"] = skin
    if kind == "ball":
        attributes["floor"] = choose("floor", FLOORS)
    return {name: value for name, value in attributes.items() if value}
