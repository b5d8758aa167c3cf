"""Raw text -> language, sentences' words and pauses: everything that happens before
pronunciation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import log
from unicodedata import normalize

from avdiff.g2p.lexicon import LANGUAGES, load_lexicon
from avdiff.g2p.numbers import spell_fractions, spell_numbers

LATIN = ("en", "es", "fr", "it", "pt")
_WORD = r"[\w\u0300-\u036f\u0900-\u0963\u0966-\u097f\u200c\u200d'’]+"
_PAUSES = {
    ",": ",",
    ";": ",",
    ":": ",",
    "、": ",",
    "،": ",",
    "—": ",",
    "–": ",",
    "(": ",",
    ")": ",",
    "...": ".",
    ".": ".",
    "。": ".",
    "।": ".",
    "॥": ".",
    "!": "!",
    "?": "?",
    "\n": ".",
}
_PIECE = re.compile(
    rf"({_WORD})|(\.\.\.|[{re.escape(''.join(p for p in _PAUSES if len(p) == 1))}])"
)
_HIDDEN = re.compile(
    r"[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b\u2060\ufeff\ufe00-\ufe0f]"
)
# Letters that one Latin-script language has and the others have not.
_GIVEAWAYS = {"es": "ñ¿¡", "pt": "ãõ", "fr": "œêëîïûùÿ", "it": "ìò"}
# log probabilities
_UNSEEN_WORD = -13.0
_UNSEEN_PAIR = -12.0
_CHARS_PER_WORD_WEIGHT = 0.35


@dataclass(frozen=True)
class TextPiece:
    """A word, or a pause: "," short, "." "!" "?" long."""

    text: str
    is_word: bool


def normalize_text(text: str) -> str:
    """Compatible characters unified, controls and invisible characters dropped, quotes and spaces
    plain.

    Raises:
        ValueError: no text, or half a surrogate pair in it.
    """
    if not isinstance(text, str):
        raise ValueError(f"text={text!r}: needs a string")
    broken = re.search("[\ud800-\udfff]", text)
    if broken:
        raise ValueError(
            f"text: {broken[0]!r} at character {broken.start()} is half of a character; needs "
            "whole Unicode characters"
        )
    text = _HIDDEN.sub("", normalize("NFKC", text.replace("…", ".")))
    for quotes, plain in (("’‘ʼ`´", "'"), ('“”„«»"', " ")):
        text = re.sub(f"[{quotes}]", plain, text)
    return re.sub(r"[^\S\n]+", " ", re.sub(r"\s*\n\s*", "\n", text)).strip()


def detect_language(text: str) -> str:
    """The likeliest of the eight languages: by script, and among Latin-script ones by words and
    letter pairs.
    """
    if re.search(r"[\u3040-\u30ff]", text):
        return "ja"
    if re.search(r"[\u0900-\u097f]", text):
        return "hi"
    if han := set(re.findall(r"[\u3400-\u9fff]", text)):
        japanese, chinese = (set("".join(load_lexicon(x).words)) for x in ("ja", "zh"))
        return "ja" if len(han & japanese - chinese) > len(han & chinese - japanese) else "zh"
    words = re.findall(r"[^\W\d_]+(?:'[^\W\d_]+)*", normalize_text(text).lower())
    if not words:
        return "en"
    return max(LATIN, key=lambda language: _likelihood(words, text.lower(), language))


def _likelihood(words: list[str], text: str, language: str) -> float:
    """Log probability of the words, by rank in the lexicon and by letter pairs."""
    lexicon = load_lexicon(language)
    score = 8.0 * sum(text.count(letter) > 0 for letter in _GIVEAWAYS.get(language, ""))
    for word in words:
        rank = lexicon.ranks.get(word)
        # Zipf: p(rank) ~ 1 / (rank + 10); the constant is the same in all languages
        score += _UNSEEN_WORD if rank is None else -log(rank + 10)
        pairs = [
            lexicon.pairs.get(a + b, _UNSEEN_PAIR)
            for a, b in zip("^" + word, word + "$", strict=True)
        ]
        score += _CHARS_PER_WORD_WEIGHT * sum(pairs)
    return score


def check_language(language: str | None, text: str) -> str:
    """The given language, or the detected one.

    Raises:
        ValueError: an unknown code.
    """
    if language is None:
        return detect_language(text)
    code = language.lower().replace("_", "-").split("-")[0]
    if code not in LANGUAGES:
        raise ValueError(
            f"language={language!r}: needs one of {', '.join(LANGUAGES)}, or None to detect it"
        )
    return code


def split_text(text: str, language: str) -> list[TextPiece]:
    """Words and pauses in order; numbers spelt out. Japanese and Chinese stay in runs without
    spaces.
    """
    if isinstance(text, str):
        text = spell_fractions(text, language)
    spelt = spell_numbers(normalize_text(text), language)
    if language in LATIN:
        spelt = spell_letters(spelt, language)
    pieces: list[TextPiece] = []
    for match in _PIECE.finditer(spelt):
        if match[1]:
            word = match[1].strip("'_")
            if word:
                pieces.append(TextPiece(word, True))
        elif pieces and pieces[-1].is_word:
            pieces.append(TextPiece(_PAUSES[match[2]], False))
    return pieces


def spell_letters(text: str, language: str) -> str:
    """Initialisms of two to four consonants or known as such ("TV", "BBC") -> letters; other
    capitals are words.
    """

    def letters(match: re.Match[str]) -> str:
        word = match[0]
        known = load_lexicon(language).find(word.lower()) is not None
        return word if known or re.search(r"[AEIOUY]", word) else " ".join(word)

    return re.sub(r"\b[A-Z]{2,4}\b", letters, text)
