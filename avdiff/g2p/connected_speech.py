"""Words by themselves -> words in a sentence: what neighbours do to each other's sounds.

The rules are those by which the bank's sentences differ from its lexicon; each is one line of
phonetics. Words that change by themselves inside a sentence (function words lose their stress) are
in the lexicon's `forms`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

VOWELS = "aeiouyæøœɐɑɒɔəɚɛɜɤɨɪɯʊʌᵻAIOQWY"
VOICED = "bdɡɡʤʣvðzʒmnɲŋlɹrɾʁʎjwɥβɣʝ"
_MARKS = "ˈˌː"


@dataclass(frozen=True)
class Spoken:
    """A word: how it is written, its phonemes, and whether they are already a sentence form."""

    text: str
    phonemes: str
    settled: bool = False


def following_class(phonemes: str | None) -> str:
    """What a word meets: "end", "vowel", "voiced" or "voiceless"."""
    first = (phonemes or "").lstrip(_MARKS)[:1]
    if not first:
        return "end"
    return "vowel" if first in VOWELS else "voiced" if first in VOICED else "voiceless"


def link(words: Sequence[Spoken], language: str) -> list[Spoken]:
    """Apply the language's rules to the words between two pauses, from left to right."""
    rule = _RULES.get(language)
    if rule is None:
        return list(words)
    out: list[Spoken] = []
    for i, word in enumerate(words):
        before = out[-1] if out else None
        after = words[i + 1] if i + 1 < len(words) else None
        out.append(replace(word, phonemes=rule(word, before, after)))
    return out


def _english(word: Spoken, before: Spoken | None, after: Spoken | None) -> str:
    linked = (
        after is not None
        and following_class(after.phonemes) == "vowel"
        and word.phonemes.endswith("ɚ")
    )
    return word.phonemes + "ɹ" if linked else word.phonemes


def _spanish(word: Spoken, before: Spoken | None, after: Spoken | None) -> str:
    """b d ɡ soften unless a nasal or a pause comes before, a final d before a vowel; a final n
    takes the place of what follows.
    """
    phonemes = word.phonemes
    if before is not None and before.phonemes[-1:] not in "mnŋɲ":
        phonemes = re.sub(
            r"^([ˈˌ]?)([bdɡ])", lambda m: m[1] + {"b": "β", "d": "ð", "ɡ": "ɣ"}[m[2]], phonemes
        )
    first = after.phonemes.lstrip(_MARKS)[:1] if after is not None else ""
    if phonemes.endswith("n") and first:
        phonemes = phonemes[:-1] + ("m" if first in "pbm" else "ŋ" if first in "kɡ" else "n")
    if phonemes.endswith("d") and first and first in VOWELS:
        phonemes = phonemes[:-1] + "ð"
    return phonemes


def _french(word: Spoken, before: Spoken | None, after: Spoken | None) -> str:
    """Liaison: a silent final s, x or z sounds as z before a vowel."""
    if word.text == "vingt" and before is not None and before.text == "quatre":
        return "vˈɛ̃"  # its t sounds in 21 to 29, never in 81 to 99
    if (
        word.settled
        or after is None
        or following_class(after.phonemes) != "vowel"
        or after.text[:1] in "hH"
    ):
        return word.phonemes
    silent = word.text.lower()[-1:] in "sxz" and word.phonemes[-1:] not in "sz"
    return word.phonemes + "z" if silent else word.phonemes


def _portuguese(word: Spoken, before: Spoken | None, after: Spoken | None) -> str:
    """Final unstressed vowels glide into the next vowel; a final s is voiced by what follows, r
    becomes a tap.
    """
    stem = word.phonemes[:-1]
    last = word.phonemes[-1:]
    first = after.phonemes.lstrip(_MARKS)[:1] if after is not None else ""
    if last == "s" and first and first in VOWELS + VOICED + "x":
        return stem + "z"
    if not first or first not in VOWELS:
        return word.phonemes
    if last == "r":
        return stem + "ɾ"
    glides = last in "ʊy" and len(stem) > 1 and stem[-1] not in VOWELS
    return stem + {"ʊ": "w", "y": "j"}[last] if glides else word.phonemes


_RULES: dict[str, Callable[[Spoken, Spoken | None, Spoken | None], str]] = {
    "en": _english,
    "es": _spanish,
    "fr": _french,
    "pt": _portuguese,
}
