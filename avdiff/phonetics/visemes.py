"""From timed phones to the shape of the mouth: 15 visemes, six parameters, coarticulated by
dominance functions.

The classes are the widely used set of 15 (silence, 9 consonant and 5 vowel shapes). Each phone
pulls the mouth to its target with a dominance that decays with distance in time; the shape is the
dominance-weighted mean of all targets (Cohen & Massaro 1993, "Modeling coarticulation in synthetic
visual speech", eq. 1-4). A weighted mean never reaches its extremes, so the contacts that viewers
look for (lips on p b m, lip on teeth for f v) are laid over it as short holds.

Everything is a function of time in seconds, so a clip has the same motion at any frame rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avdiff.phonetics.phone import Phone

PARAMS = ("jaw", "width", "round", "teeth", "tongue", "tuck")
VISEMES = ("sil", "PP", "FF", "TH", "DD", "kk", "CH", "SS", "nn", "RR", "aa", "E", "ih", "oh", "ou")
VOWELS = frozenset(("aa", "E", "ih", "oh", "ou"))

#: Targets in [0, 1]: jaw = opening between the lips, width (0.5 = rest), round = protrusion, teeth
#: = how much of them shows, tongue = how far it is raised, tuck = lower lip under the upper teeth.
TARGETS: dict[str, tuple[float, float, float, float, float, float]] = {
    #        jaw  width round teeth tongue tuck
    "sil": (0.00, 0.50, 0.00, 0.00, 0.00, 0.0),
    "PP": (0.00, 0.44, 0.12, 0.00, 0.00, 0.0),
    "FF": (0.20, 0.55, 0.00, 0.90, 0.00, 1.0),
    "TH": (0.34, 0.56, 0.00, 0.60, 1.00, 0.0),
    "DD": (0.36, 0.60, 0.00, 0.55, 0.60, 0.0),
    "kk": (0.42, 0.52, 0.00, 0.45, 0.25, 0.0),
    "CH": (0.36, 0.20, 0.60, 1.00, 0.00, 0.0),
    "SS": (0.27, 0.80, 0.00, 1.00, 0.00, 0.0),
    "nn": (0.34, 0.52, 0.00, 0.40, 0.80, 0.0),
    "RR": (0.34, 0.28, 0.40, 0.55, 0.35, 0.0),
    "aa": (1.00, 0.58, 0.00, 0.50, 0.15, 0.0),
    "E": (0.64, 0.74, 0.00, 0.60, 0.25, 0.0),
    "ih": (0.38, 1.00, 0.00, 0.85, 0.20, 0.0),
    "oh": (0.68, 0.22, 0.66, 0.20, 0.10, 0.0),
    "ou": (0.30, 0.04, 1.00, 0.00, 0.00, 0.0),
}

_GROUPS: dict[str, str] = {
    "PP": "p b m β ɓ",
    "FF": "f v ʋ ɱ",
    "TH": "θ ð",
    "DD": "t d ʈ ɖ",
    "kk": "k ɡ g x h ŋ ɣ ʔ q ɴ χ ɦ ħ ç",
    # espeak writes the Hindi affricates c ɟ, and S for an Italian ʃ
    "CH": "ʃ ʒ ʧ ʤ ʂ ʐ ɕ ʑ ʨ ʥ ꭧ S c ɟ",
    "SS": "s z ʦ ʣ",
    "nn": "n l ɲ ʎ ɳ ɫ ɭ ɬ",
    "RR": "r ɾ ɹ ʁ ɻ ɽ ʀ ɚ ɝ",
    "aa": "a ɑ ɐ æ",
    "E": "e ɛ ə ʌ ɜ ɤ ɘ",
    "ih": "i ɪ j ᵻ ɨ ʝ ʏ",
    "oh": "o ɔ ɒ œ ɵ",
    "ou": "u ʊ w y ø ɯ ɥ ɸ ʍ ʉ",
}
PHONE_TO_VISEME: dict[str, str] = {
    phone: name for name, group in _GROUPS.items() for phone in group.split()
}
#: Diphthongs are one symbol in the bank's alphabet and two shapes on the mouth.
DIPHTHONGS: dict[str, tuple[str, str]] = {
    "A": ("E", "ih"),
    "I": ("aa", "ih"),
    "W": ("aa", "ou"),
    "Y": ("oh", "ih"),
    "O": ("oh", "ou"),
    "Q": ("E", "ou"),
}
#: Marks and punctuation have no shape of their own; as phones they mean silence.
SILENT = frozenset(
    (
        "",
        " ",
        "sil",
        "_",
        ".",
        ",",
        "?",
        "!",
        ";",
        ":",
        "—",
        "…",
        "-",
        "'",
        '"',
        "(",
        ")",
        "“",
        "”",
        "¿",
        "¡",
        "ˈ",
        "ˌ",
        "ː",
        "ʰ",
        "ʲ",
        "\u0303",
        "→",
        "↗",
        "↓",
        "↘",
        "<p>",
        "<sil>",
    )
)

# Strength of each class (a of eq. 2): the lips of h, k, n take the neighbouring vowel's shape,
# contacts do not.
_STRENGTH = {
    "sil": 0.8,
    "PP": 1.0,
    "FF": 1.0,
    "TH": 0.8,
    "DD": 0.4,
    "kk": 0.22,
    "CH": 0.8,
    "SS": 0.7,
    "nn": 0.35,
    "RR": 0.45,
    "aa": 1.0,
    "E": 0.9,
    "ih": 0.9,
    "oh": 1.0,
    "ou": 1.0,
}
_DECAY = np.array(
    (0.036, 0.048, 0.060, 0.036, 0.030, 0.030)
)  # s (1/theta); rounding starts earliest
_EDGE = 0.030  # s at each end of a phone that is transition; the rest holds the target
_SHORT_SILENCE = 0.14  # s; a gap between words shorter than this hardly closes the mouth
# s either side of a contact's centre: more than half a frame at 25 fps, so that one frame shows it
_HOLD = 0.024
_RAMP = 0.060  # s from open to contact
_TOUCH = 0.035
_STRESS = {0: 0.90, 1: 1.08, 2: 1.0}  # unstressed vowels are smaller; tones count as full vowels


def viseme_of(symbol: str) -> tuple[str, ...]:
    """Viseme classes of a phone symbol: one, or two for a diphthong. What follows the base symbol
    is ignored.

    Raises:
        ValueError: a symbol that is not in the inventory of the eight languages.
    """
    if symbol in SILENT:
        return ("sil",)
    base = symbol[:1]
    if base in DIPHTHONGS:
        return DIPHTHONGS[base]
    name = PHONE_TO_VISEME.get(base)
    if name is None:
        raise ValueError(
            f"symbol={symbol!r}: no viseme for this phone; known are "
            f"{' '.join(sorted(PHONE_TO_VISEME))}"
        )
    return (name,)


class _Pull(NamedTuple):
    """One target in time: class, start and end (s), strength, scale of the jaw."""

    name: str
    start: float
    end: float
    strength: float
    jaw: float


def _pulls(phones: Sequence[Phone]) -> list[_Pull]:
    """Phones -> targets in time; diphthongs become two, and silence reaches out to both ends of
    time.
    """
    pulls = [_Pull("sil", -1e3, phones[0].start if phones else 0.0, _STRENGTH["sil"], 1.0)]
    for symbol, start, end, mark in phones:
        names = viseme_of(symbol)
        if names == ("sil",):
            strength = _STRENGTH["sil"] * min(1.0, (end - start) / _SHORT_SILENCE) ** 2
            pulls.append(_Pull("sil", start, end, strength, 1.0))
            continue
        # the first half of a diphthong is the longer one
        fsdp = (start, end) if len(names) == 1 else (start, start + 0.58 * (end - start), end)
        for name, left, right in zip(names, fsdp[:-1], fsdp[1:], strict=True):
            jaw = _STRESS.get(mark, 1.0) if name in VOWELS else 1.0
            pulls.append(_Pull(name, left, right, _STRENGTH[name], jaw))
    pulls.append(_Pull("sil", phones[-1].end if phones else 0.0, 1e3, _STRENGTH["sil"], 1.0))
    return pulls


def _blend(pulls: Sequence[_Pull], times: np.ndarray) -> np.ndarray:
    """Dominance-weighted mean of the targets -> (F, 6)."""
    starts, ends = (np.array([getattr(p, key) for p in pulls]) for key in ("start", "end"))
    strength = np.array([p.strength for p in pulls])
    targets = np.array([TARGETS[p.name] for p in pulls])  # (N, 6)
    targets[:, 0] = np.clip(targets[:, 0] * np.array([p.jaw for p in pulls]), 0.0, 1.0)
    centres = (starts + ends) / 2
    holds = np.maximum((ends - starts) / 2 - _EDGE, 0.0)
    away = np.maximum(np.abs(times[:, None] - centres) - holds, 0.0)  # (F, N) seconds
    weights = strength[:, None] * np.exp(-away[:, :, None] / _DECAY)  # (F, N, 6)
    return (weights * targets).sum(1) / (weights.sum(1) + 1e-12)


def _contact(phone: Phone, times: np.ndarray) -> np.ndarray:
    """How much a contact phone is closed at each time, 0..1: full around its centre, smooth ramps
    outside. (F,)
    """
    centre = (phone.start + phone.end) / 2
    # the label of a stop holds closure and burst: the closure leads, so the hold reaches back but
    # not forward
    left = min(centre - _HOLD, phone.start + 0.012)
    right = max(centre + _HOLD, phone.end - 0.030)
    away = np.maximum(np.maximum(left - times, times - right), 0.0) / _RAMP
    return 0.5 + 0.5 * np.cos(np.pi * np.clip(away, 0.0, 1.0))


def viseme_track(phones: Sequence[Phone], times: np.ndarray) -> np.ndarray:
    """Mouth parameters at each time.

    Args:
        phones: timed phones in order, silence as " " or "sil" (see `Phone`).
        times: (F,) seconds, any spacing.

    Returns:
        (F, 6) float32 in [0, 1], columns as in `PARAMS`. Jaw is exactly 0 at the centre of every p
        b m.

    Raises:
        ValueError: a phone without a viseme.
    """
    times = np.asarray(times, np.float64)
    track = _blend(_pulls(phones), times)
    jaw, teeth, tuck = (PARAMS.index(name) for name in ("jaw", "teeth", "tuck"))
    for name, columns in (
        ("FF", (jaw, teeth, tuck)),
        ("PP", (jaw,)),
    ):  # closed lips have the last word
        for phone in phones:
            if viseme_of(phone.symbol)[0] == name:
                contact = _contact(phone, times)
                for column in columns:
                    track[:, column] += contact * (TARGETS[name][column] - track[:, column])
    track[:, jaw] = (track[:, jaw] - _TOUCH) / (1 - _TOUCH)  # lips that are that close touch
    return np.clip(track, 0.0, 1.0).astype(np.float32)
