"""Objects that sound: balls, drums, bells, glasses, claps, knocks, with exact impact times.

An `Event` holds everything; its sound (`event_sound`) and its picture at any time (`event_drawing`)
are functions of it, so motion and sound agree by construction: a striker's distance is 0, and a
ball touches the floor, exactly at each impact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avdiff.corpus.face.identity import BACKDROPS, COLORS, RGB, SKINS
from avdiff.phonetics.phone import ONSET, Phone

KINDS = ("ball", "drum", "bell", "glass", "clap", "knock")
MATERIALS: dict[str, tuple[str, ...]] = {
    "ball": ("rubber", "plastic", "wood", "metal", "glass"),
    "drum": ("skin",),
    "bell": ("brass", "silver"),
    "glass": ("glass",),
    "clap": ("hands",),
    "knock": ("wood", "metal"),
}
FLOORS = ("wooden", "stone", "metal")
SIZES = {"small": 0.75, "medium": 1.0, "large": 1.35}
BOUNCE = {
    "rubber": 0.78,
    "plastic": 0.80,
    "wood": 0.62,
    "metal": 0.68,
    "glass": 0.72,
}  # speed kept in a bounce
REST_FLIGHT = 0.13  # s; a flight shorter than this is no bounce any more: the ball stays
SWING = 0.17  # s from the height of a swing to contact
MAX_CONTACTS = 6
STROKE = 0.06  # s that a stroke takes in the script


@dataclass(frozen=True)
class Event:
    """One scene.

    `impacts` are seconds; `speeds` in (0, 1] the strength of each; `scale` the size as a factor;
    `drift` the horizontal path of a ball in design units (from, to); `fill` how full a glass is;
    `seed` draws the fine detail of the sound.
    """

    kind: str
    material: str
    floor: str
    size: str
    scale: float
    color: str
    rgb: RGB
    background: str
    background_rgb: RGB
    skin: str
    skin_rgb: RGB
    sleeve_rgb: RGB
    mirrored: bool
    fill: float
    drift: tuple[float, float]
    seed: int
    contacts: tuple[float, ...]
    speeds: tuple[float, ...]

    def attributes(self) -> dict[str, str]:
        """What a caption may say."""
        told = {
            "event": self.kind,
            "material": self.material,
            "size": self.size,
            "color": self.color,
            "background_color": self.background,
            "count": str(len(self.contacts)),
            "skin": self.skin,
        }
        if self.kind == "ball":
            told["floor"] = self.floor
        return told


def _near(rng: np.random.Generator, rgb: RGB) -> RGB:
    red, green, blue = (
        np.clip(np.asarray(rgb) * rng.uniform(0.94, 1.06) + rng.normal(0, 3, 3), 8, 250)
        .astype(int)
        .tolist()
    )
    return red, green, blue


def backdrops_for(color: str, skin: str) -> list[str]:
    """Background colours from which an object and a hand stand out; a colour that is no name of
    the tables rules none out.
    """

    def apart(backdrop: RGB, other: RGB | None, least: int) -> bool:
        return other is None or int(np.abs(np.subtract(backdrop, other)).sum()) > least

    return [
        name
        for name, rgb in BACKDROPS.items()
        if apart(rgb, COLORS.get(color), 110) and apart(rgb, SKINS.get(skin), 90)
    ]


def sample_event(rng: np.random.Generator, seconds: float, kind: str | None = None) -> Event:
    """Draw a scene for a clip of `seconds` (at least 0.5).

    Raises:
        ValueError: an unknown kind, or a clip too short to hold one impact.
    """
    if kind not in (None, *KINDS):
        raise ValueError(f"kind={kind!r}: needs one of {', '.join(KINDS)}, or None")
    if seconds < 0.5:
        raise ValueError(f"seconds={seconds}: an event needs at least 0.5 s")
    kind = kind or str(rng.choice(KINDS))
    material = str(rng.choice(MATERIALS[kind]))
    size = str(rng.choice(list(SIZES)))
    color, skin, sleeve = (str(rng.choice(list(table))) for table in (COLORS, SKINS, COLORS))
    backdrop = str(rng.choice(backdrops_for(color, skin)))
    contacts, speeds = (_bounces if kind == "ball" else _strikes)(
        rng, seconds, BOUNCE.get(material, 0.7)
    )
    left, right = sorted(rng.uniform(26, 102, 2).tolist())
    mirrored = bool(rng.random() < 0.5)
    return Event(
        kind=kind,
        material=material,
        floor=str(rng.choice(FLOORS)),
        size=size,
        scale=float(SIZES[size] * rng.uniform(0.93, 1.07)),
        color=color,
        rgb=_near(rng, COLORS[color]),
        background=backdrop,
        background_rgb=_near(rng, BACKDROPS[backdrop]),
        skin=skin,
        skin_rgb=_near(rng, SKINS[skin]),
        sleeve_rgb=_near(rng, COLORS[sleeve]),
        mirrored=mirrored,
        fill=float(rng.uniform(0.2, 0.8)),
        drift=(right, left) if mirrored else (left, right),
        seed=int(rng.integers(1 << 31)),
        contacts=contacts,
        speeds=speeds,
    )


def _strikes(
    rng: np.random.Generator, seconds: float, _: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A steady beat with a human touch: times and strengths."""
    first = rng.uniform(0.2, min(0.6, seconds - 0.28))
    beat = rng.uniform(0.24, 0.75)
    most = min(MAX_CONTACTS, 1 + int((seconds - 0.25 - first) / beat))
    count = int(rng.integers(1, most + 1))
    times = first + np.arange(count) * beat + rng.uniform(-0.025, 0.025, count)
    return tuple(times.tolist()), tuple(rng.uniform(0.55, 1.0, count).tolist())


def _bounces(
    rng: np.random.Generator, seconds: float, keep: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A dropped ball: each flight lasts `keep` times the one before; the last impact ends it."""
    keep = float(np.clip(keep + rng.uniform(-0.05, 0.05), 0.5, 0.85))
    shortest = rng.uniform(
        REST_FLIGHT, REST_FLIGHT / keep * 0.98
    )  # the last flight that still counts
    longest = min(0.85, (seconds - 0.4) / 2)
    most = 1
    while most < MAX_CONTACTS:
        flight = shortest / keep ** (most - 1)
        if (
            flight > longest
            or _first_fall(flight, keep) + sum(shortest / keep**k for k in range(most))
            > seconds - 0.3
        ):
            break
        most += 1
    count = int(rng.integers(1, most + 1))
    flights = [shortest / keep**k for k in reversed(range(count - 1))]
    fall = _first_fall(flights[0], keep) if flights else _first_fall(shortest * keep, keep)
    slack = max(seconds - 0.25 - fall - sum(flights), 0.0)
    first = fall + rng.uniform(0, min(0.5, slack))
    times = first + np.concatenate([[0.0], np.cumsum(flights)])
    return tuple(times.tolist()), tuple((keep ** np.arange(count)).tolist())


def _first_fall(flight: float, keep: float) -> float:
    """Seconds of free fall before the impact that a flight of `flight` seconds follows."""
    return flight / (2 * keep)


def onset_phones(contacts: Sequence[float]) -> tuple[Phone, ...]:
    """The script of an event: `IMPACT` for 60 ms from each impact on, less where the next one is
    nearer.
    """
    ends = [*contacts[1:], float("inf")]
    return tuple(
        Phone(ONSET, t, min(t + STROKE, end)) for t, end in zip(contacts, ends, strict=True)
    )


def ball_height(event: Event, time: float) -> float:
    """Height of a ball's lowest point over the floor as a share of the height it was dropped from;
    0 at each impact.
    """
    times = event.contacts
    keep = event.speeds[1] if len(times) > 1 else 0.0
    fall = _first_fall(times[1] - times[0], keep) if keep else 0.32
    if time <= times[0]:
        return (
            1.0 - min(max((time - times[0] + fall) / fall, 0.0), 1.0) ** 2
        )  # held at the top, then free fall
    index = int(np.searchsorted(times, time, side="right")) - 1
    if index + 1 >= len(times):
        return 0.0
    flight = times[index + 1] - times[index]
    part = (time - times[index]) / flight
    return (flight / (2 * fall)) ** 2 * 4 * part * (1 - part)


def strike_distance(event: Event, time: float) -> float:
    """Distance of a striker in [0, 1]: 0 exactly at each impact, 0.6 at rest.

    Near an impact it is the same before and after, so that the frame nearest in time is also
    nearest in the picture.
    """
    times = np.asarray(event.contacts)
    index = int(np.searchsorted(times, time, side="right"))
    if 0 < index < len(times):
        gap = float(times[index] - times[index - 1])
        if (
            gap < 2 * SWING
        ):  # too quick a beat for the whole swing: the same speed at contact, less height
            return float(gap / (2 * SWING) * np.sin(np.pi * (time - times[index - 1]) / gap))
    away = float(np.abs(times - time).min())
    if away < SWING:
        return float(np.sin(np.pi * 0.5 * away / SWING))
    outside = time < times[0] or time > times[-1]
    return 0.8 + 0.2 * float(np.cos(np.pi * min((away - SWING) / 0.25, 1.0))) if outside else 1.0


def since_contact(event: Event, time: float) -> float:
    """Seconds since the last impact at or before `time`; infinity before the first."""
    index = int(np.searchsorted(event.contacts, time, side="right")) - 1
    return time - event.contacts[index] if index >= 0 else float("inf")
