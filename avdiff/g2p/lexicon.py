"""Exact look-up of frequent words: 14 to 30 thousand a language, with phonemes as the speech bank
writes them.
"""

from __future__ import annotations

import gzip
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from unicodedata import normalize

from avdiff.files import BUNDLED

LANGUAGES = ("en", "es", "fr", "hi", "it", "ja", "pt", "zh")
FOLDER = BUNDLED / "lexicon"


@dataclass(frozen=True)
class Lexicon:
    """Words of one language, most frequent first.

    Args:
        words: word -> phonemes of the word by itself.
        forms: word -> {what follows: phonemes inside a sentence}, for the words that change there
            (function words lose their stress, final consonants link).
    """

    language: str
    words: Mapping[str, str]
    forms: Mapping[str, Mapping[str, str]]

    def find(self, word: str) -> str | None:
        """Phonemes of a word as written or in lower case, or None."""
        return self.words.get(word) or self.words.get(word.lower())

    def form(self, word: str, following: str) -> tuple[str, bool] | None:
        """Phonemes inside a sentence, if they differ, and whether they hold for this very place;
        `following` is a class of `avdiff.g2p.connected_speech`.
        """
        forms = self.forms.get(word.lower(), {})
        if following in forms:
            return forms[following], True
        return (forms["any"], False) if "any" in forms else None

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Word -> place by frequency, 0 is the most frequent."""
        return {word: rank for rank, word in enumerate(self.words)}

    @cached_property
    def pairs(self) -> dict[str, float]:
        """Letter pair -> log probability, with "^" and "$" at the ends of a word."""
        counts = Counter(
            a + b for word in self.words for a, b in zip("^" + word, word + "$", strict=True)
        )
        total = sum(counts.values())
        return {pair: math.log(count / total) for pair, count in counts.items()}


def english_plural(word: str, words: Mapping[str, str]) -> str | None:
    """Plural, third person or possessive of a known word: "ponies", "boxes", "Emma's"; None if
    there is no such word.

    Of the validation words that this rule reads it has 97 per cent right, the network 85; of past
    tenses and the like the network has more, so it keeps them.
    """
    for ending, restored in (("'s", ""), ("ies", "y"), ("es", ""), ("s", "")):
        stem = word[: -len(ending)] + restored
        if not word.endswith(ending) or stem not in words or len(stem) < 3 or word.endswith("ss"):
            continue
        last = words[stem][-1]
        hisses = last in "szʃʒʧʤ"
        if ending == "es" and not hisses:
            continue
        return words[stem] + ("ᵻz" if hisses else "s" if last in "ptkfθ" else "z")
    return None


@cache
def load_lexicon(language: str) -> Lexicon:
    """The lexicon that ships with the package.

    Raises:
        ValueError: a language other than the eight.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language={language!r}: needs one of {', '.join(LANGUAGES)}")
    forms: dict[str, dict[str, str]] = {}
    for word, following, phonemes in _rows(FOLDER / "forms" / f"{language}.tsv.gz"):
        forms.setdefault(word, {})[following] = phonemes
    words: dict[str, str] = {}
    for word, phonemes in _rows(FOLDER / f"{language}.tsv.gz"):
        if phonemes:
            words.setdefault(normalize("NFKC", word), phonemes)
    return Lexicon(language, words, forms)


def _rows(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    with gzip.open(path, "rt", encoding="utf8") as file:
        return [line.rstrip("\n").split("\t") for line in file]
