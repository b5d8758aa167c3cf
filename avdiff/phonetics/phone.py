"""Phones: timed phones and the inventory with fixed ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from avdiff.clip import midpoints
from avdiff.files import BUNDLED

SILENCE = "sil"
# The phoneme that stands for the onset of an event: far behind the inventory, which grows.
ONSET_ID = 127
ONSET = "✱"  # in the script of an event: a stroke, where the script of speech has phones


class Phone(NamedTuple):
    """One timed phone: `symbol` base IPA, `start`/`end` in seconds, `mark` 0 none, 1 primary, 2
    secondary stress, 3-6 the tones → ↗ ↓ ↘, on the vowel that carries it.
    """

    symbol: str
    start: float
    end: float
    stress_tone: int = 0


@cache
def inventory() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(phones, marks): the place in each is the id; phone 0 is silence, mark 0 is none."""
    table = json.loads((BUNDLED / "phones.json").read_text(encoding="utf8"))
    return tuple(table["phones"]), tuple(table["stress_tones"])


@cache
def phone_id(symbol: str) -> int:
    """Id of a phone: 0 for silence ("sil", "" or " "), `ONSET_ID` for a stroke; a coloured phone
    that is not listed falls back to its base.

    Raises:
        ValueError: the inventory holds neither.
    """
    phones = inventory()[0]
    if symbol == ONSET:
        return ONSET_ID
    if symbol in ("", " ", SILENCE):
        return 0
    for candidate in (symbol, symbol[:2], symbol[:1]):
        if candidate in phones:
            return phones.index(candidate)
    raise ValueError(
        f"symbol={symbol!r}: no such phone; the inventory is avdiff/bundled/phones.json"
    )


def encode_phones(phones: Sequence[Phone]) -> tuple[np.ndarray, np.ndarray]:
    """Phones -> ids (P,) and marks (P,), int64."""
    return (
        np.array([phone_id(p.symbol) for p in phones], dtype=np.int64),
        np.array([p.stress_tone for p in phones], dtype=np.int64),
    )


def phones_on_frames(phones: Sequence[Phone], frames: int, rate: float) -> np.ndarray:
    """Index of the phone that covers the middle of each frame: (frames,) int64, `rate` frames a
    second.
    """
    middles = midpoints(frames, rate)
    return np.searchsorted(np.array([p.end for p in phones[:-1]]), middles, side="right").astype(
        np.int64
    )
