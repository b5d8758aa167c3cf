"""From the caption of an event to its script: how often something is struck, and when.

What a caption tells of time is a number: "bounces three times". The times themselves are drawn as
the corpus draws
them: a steady beat, or the flights of a ball, each shorter than the one before.
"""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache

import numpy as np

from avdiff.corpus.events.scene import MAX_CONTACTS, onset_phones, sample_event
from avdiff.files import BUNDLED
from avdiff.phonetics.phone import Phone

BALLS = re.compile(
    r"\b(?:balls?|marbles?|pelota|bola|canica|balle|boule|bille|palla|biglia)\b|गेंद|गोली|ボール|玉|球"
)
NUMBER = re.compile(r"(\d+)\s*(?:times\b|veces\b|fois\b|volt[ae]\b|vezes\b|x\b|×|बार|回|次|度)")
ALSO = {
    2: ("twice", "二次", "二回", "2x"),
    3: ("thrice",),
    1: ("one time", "una sola vez", "une seule fois"),
}
TRIES = 2000


@cache
def _counts() -> tuple[tuple[re.Pattern[str], int], ...]:
    """Patterns of "three times" in all languages with their numbers."""
    tables = json.loads((BUNDLED / "captions.json").read_text(encoding="utf8"))
    told = [(phrase, n) for table in tables.values() for n, phrase in enumerate(table["times"], 1)]
    told += [(phrase, n) for n, more in ALSO.items() for phrase in more]
    edge = {True: r"\b", False: ""}
    return tuple(
        (re.compile(edge[p.isascii()] + re.escape(_plain(p)) + edge[p.isascii()]), n)
        for p, n in told
    )


def _plain(text: str) -> str:
    """Lower case, one form of each letter; the two ways to write a Hindi nasal as one."""
    return unicodedata.normalize("NFC", text).casefold().replace("ँ", "ं")


def onsets_in_caption(description: str) -> int | None:
    """How often the caption of an event says that it sounds; None if it does not say."""
    text = _plain(description)
    found = NUMBER.search(text)
    if found:
        return int(found[1]) or None
    return next((n for pattern, n in _counts() if pattern.search(text)), None)


def onset_track(description: str, seconds: float, seed: int) -> tuple[Phone, ...]:
    """Strokes of an event on the clock of a clip, as many as its caption tells, or as chance has
    it.

    Args:
        description: caption in any of the eight languages. seconds: length of the clip. seed:
            another one, other times.

    Raises:
        ValueError: more strokes than fit into the clip, or than any event has.
    """
    count = onsets_in_caption(description)
    kind = "ball" if BALLS.search(_plain(description)) else "drum"
    rng = np.random.default_rng(seed)
    for _ in range(TRIES):
        contacts = sample_event(rng, seconds, kind).contacts
        if count is None or len(contacts) == count:
            return onset_phones(contacts)
    most = (
        f"at most {MAX_CONTACTS} strokes are known"
        if (count or 0) > MAX_CONTACTS
        else "ask for a longer clip"
    )
    raise ValueError(f"{count} strokes do not fit into a clip of {seconds:.1f} s: {most}")
