"""Text in eight languages -> timed phones: `read("Good morning!")`.

A word is looked up in the lexicon; Japanese and Chinese words that are not there are read by their
kana or pinyin, all others by the pronunciation network. Neighbouring words are then linked, and a
small head gives every phone its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from unicodedata import name

import numpy as np

from avdiff.g2p.cjk import read_chinese, read_kana, segment_chinese, segment_japanese, settle_nasals
from avdiff.g2p.connected_speech import Spoken, following_class, link
from avdiff.g2p.lexicon import english_plural, load_lexicon
from avdiff.g2p.networks import Networks, default_networks
from avdiff.g2p.normalize import LATIN, TextPiece, check_language, split_text
from avdiff.phonetics.phone import SILENCE, Phone
from avdiff.phonetics.tokens import parse_ipa

_SCRIPTS = ("LATIN", "DEVANAGARI", "HIRAGANA", "KATAKANA", "CJK")
SPELT = (*LATIN, "hi")  # languages whose unknown words the network reads
_ELIDED = {
    "fr": {
        "l": "l",
        "d": "d",
        "j": "ʒ",
        "m": "m",
        "t": "t",
        "s": "s",
        "n": "n",
        "c": "s",
        "qu": "k",
    },
    "it": {
        "l": "l",
        "d": "d",
        "m": "m",
        "t": "t",
        "s": "s",
        "v": "v",
        "c": "ʧ",
        "un": "un",
        "gl": "ʎ",
    },
}
_DIGITS = "零一二三四五六七八九十百千万億"
_CLOCK = {
    "四時": "ヨジ",
    "七時": "シチジ",
    "九時": "クジ",
}  # hours that are not read digit by digit
# seconds of silence before and after, as in the speech bank
LEAD = 0.12
TAIL = 0.30
LONGEST = 4000  # characters of one reading


@dataclass(frozen=True)
class SpokenWord:
    """A word as it is spoken ("58" is two words), its phonemes with marks, and its place in
    seconds.
    """

    text: str
    phonemes: str
    start: float
    end: float


@dataclass(frozen=True)
class Reading:
    """How a text is spoken.

    Args:
        language: one of the eight codes. text: as given. words: in order.
        phones: tile [0, duration] without gaps; pauses, and a short silence at both ends, are
            silence phones.
    """

    language: str
    text: str
    words: tuple[SpokenWord, ...]
    phones: tuple[Phone, ...]

    @property
    def duration(self) -> float:
        """Seconds, silence at both ends included."""
        return self.phones[-1].end

    @property
    def phonemes(self) -> str:
        """All words' phonemes, with spaces between words."""
        return " ".join(word.phonemes for word in self.words)

    def stretched(self, seconds: float) -> Reading:
        """The same reading, evenly faster or slower so that it lasts `seconds`; silence at both
        ends keeps its length.

        Raises:
            ValueError: less time than 30 ms for each phone.
        """
        edges = sum(p.end - p.start for p in (self.phones[0], self.phones[-1]))
        if seconds - edges < 0.03 * (len(self.phones) - 2):
            least = edges + 0.03 * (len(self.phones) - 2)
            raise ValueError(
                f"seconds={seconds}: too short for {len(self.phones) - 2} phones; needs at least "
                f"{least:.2f}, natural is {self.duration:.2f}"
            )
        first = self.phones[0].end
        last = self.phones[-1].start
        return self.warped([first, last], [first, seconds - (self.duration - last)])

    def timed(self, word_times: Sequence[tuple[float, float] | None]) -> Reading:
        """The same reading with words put at given times (start, end) in seconds; None leaves a
        word between its neighbours.

        Raises:
            ValueError: not one entry a word, or times that run backwards.
        """
        if len(word_times) != len(self.words):
            names = ", ".join(word.text for word in self.words[:12])
            raise ValueError(
                f"word_times: {len(word_times)} entries; needs one, or None, for each of the "
                f"{len(self.words)} words ({names})"
            )
        old: list[float] = [0.0]
        new: list[float] = [0.0]
        for word, times in zip(self.words, word_times, strict=True):
            for own, wanted in zip((word.start, word.end), times or (), strict=False):
                if own > old[-1]:
                    old.append(own)
                    new.append(float(wanted))
                elif wanted != new[-1]:  # the word begins where the last one ended
                    new[-1] = max(new[-1], float(wanted)) if len(old) > 1 else 0.0
        if not all(a < b for a, b in pairwise(new)):
            raise ValueError(
                f"word_times={list(word_times)}: times must be in seconds, ascending, and above 0"
            )
        return self.warped(old, new)

    def warped(self, old: Sequence[float], new: Sequence[float]) -> Reading:
        """Times `old` moved to `new`, linear between, shifted after the last; all ascending."""

        def move(t: float) -> float:
            if t >= old[-1]:
                return t + new[-1] - old[-1]
            return float(np.interp(t, [0.0, *old], [0.0, *new]))

        words = tuple(replace(w, start=move(w.start), end=move(w.end)) for w in self.words)
        phones = tuple(p._replace(start=move(p.start), end=move(p.end)) for p in self.phones)
        return replace(self, words=words, phones=phones)


def read(
    text: str,
    language: str | None = None,
    seconds: float | None = None,
    speed: float = 1.0,
    word_times: Sequence[tuple[float, float] | None] | None = None,
    networks: Networks | None = None,
) -> Reading:
    """Pronounce a text.

    Args:
        text: in any of the eight languages' own scripts, numbers included. language: code; None
            detects it.
        seconds: total length. speed: 1 is natural, 2 twice as fast; not together with `seconds`.
        word_times: (start, end) in seconds for each spoken word, or None for a free one.
        networks: None takes those that ship with the package.

    Raises:
        ValueError: nothing to say, an unknown language, or times that do not fit.
    """
    if not 0.25 <= speed <= 4:
        raise ValueError(f"speed={speed}: needs 0.25 to 4; 1 is natural")
    if len(text) > LONGEST:
        raise ValueError(
            f"text: {len(text)} characters; needs at most {LONGEST}, so read it in parts"
        )
    language = check_language(language, text)
    networks = networks or default_networks()
    groups = pronounce(split_text(text, language), language, networks)
    if not groups:
        raise ValueError(f"text={text[:60]!r}: holds no word of {language} that could be spoken")
    reading = _time(text, language, groups, speed, networks)
    if seconds is not None:
        reading = reading.stretched(seconds)
    return reading if word_times is None else reading.timed(word_times)


def pronounce(
    pieces: Sequence[TextPiece], language: str, networks: Networks
) -> list[tuple[list[Spoken], str]]:
    """Pieces -> groups of linked words, each with the pause that follows it ("" at the end)."""
    groups: list[tuple[list[str], str]] = []
    words: list[str] = []
    for piece in pieces:
        if piece.is_word:
            words += _segment(piece.text, own_language(piece.text, language))
        elif words:
            groups.append((words, piece.text))
            words = []
    groups += [(words, "")] if words else []
    sounds = iter(pronounce_words([w for ws, _ in groups for w in ws], language, networks))
    spoken = [([Spoken(w, p) for w in ws if (p := next(sounds))], mark) for ws, mark in groups]
    alone = sum(len(ws) for ws, _ in spoken) == 1
    return [(ws if alone else _in_sentence(ws, language), mark) for ws, mark in spoken if ws]


def pronounce_words(words: Sequence[str], language: str, networks: Networks) -> list[str]:
    """Phonemes of each word by itself, "" for what is no word. Japanese words may carry their kana
    after a tab.

    Raises:
        ValueError: a word in a script of none of the eight languages.
    """
    found = [_look_up(word, own_language(word, language)) for word in words]
    for word, phonemes in zip(words, found, strict=True):
        if phonemes is None and not _is_readable(word):
            surface = word.partition("\t")[0]
            raise ValueError(
                f"text: {surface!r} is in a script that none of the eight languages uses"
            )
    for own in dict.fromkeys(own_language(word, language) for word in words):
        unknown = [
            i for i, w in enumerate(words) if found[i] is None and own_language(w, language) == own
        ]
        spelt = (
            networks.spell([words[i].partition("\t")[0].lower() for i in unknown], own)
            if own in SPELT
            else []
        )
        for i, phonemes in zip(unknown, spelt, strict=False):
            found[i] = phonemes
    return [phonemes or "" for phonemes in found]


def _is_readable(word: str) -> bool:
    """False for a word whose letters are all foreign to the eight languages; what has no letters is
    no word.
    """
    letters = [c for c in word if c.isalpha()]
    return not letters or any(name(c, "").startswith(_SCRIPTS) for c in letters)


def own_language(word: str, language: str) -> str:
    """A word in another script is read in that script's language; Latin letters among others as
    English.
    """
    if re.search("[\u0900-\u097f]", word):
        return "hi"
    if language == "zh" and re.search("[\u3040-\u30ff]", word):
        # kana in Chinese text; a run with Chinese characters too is cut into words first
        return "zh" if re.search("[\u3400-\u9fff]", word) else "ja"
    if re.search("[\u3040-\u30ff\u3400-\u9fff]", word) and language not in ("ja", "zh"):
        return "ja" if re.search("[\u3040-\u30ff]", word) else "zh"
    return (
        "en"
        if language not in LATIN and re.search("[A-Za-z]", word.partition("\t")[0])
        else language
    )


def _look_up(word: str, language: str) -> str | None:
    """Phonemes by lexicon, kana or pinyin; None leaves the word to the network."""
    surface, _, kana = word.partition("\t")
    if language == "ja" and kana:
        return settle_nasals(read_kana(kana))
    known = load_lexicon(language).find(surface)
    if known is None and language == "en":
        return english_plural(surface.lower(), load_lexicon("en").words)
    if known is None and "'" in surface and language in _ELIDED:
        return _elided(surface, language)
    if known is None and language == "ja":
        known = read_kana(surface) or None
    if known is None and language == "zh":
        known = read_chinese(surface) or None
    return known


def _elided(word: str, language: str) -> str | None:
    """ "l'homme", "dell'arte": the elided word without its vowel, then the other, if both are
    known.
    """
    first, _, rest = word.lower().partition("'")
    lexicon = load_lexicon(language)
    whole = next((p for vowel in "aeo" if (p := lexicon.words.get(first + vowel))), "")
    start = _ELIDED[language].get(first) or whole[:-1].translate({ord("ˈ"): None, ord("ˌ"): None})
    known = lexicon.find(rest)
    return start + known if start and known else None


def _segment(run: str, language: str) -> list[str]:
    """Words of a run without spaces. Japanese words that are not in the lexicon carry their
    kana.
    """
    if language == "ja":
        return _segment_japanese(run)
    return segment_chinese(run) if language == "zh" else [run]


def _segment_japanese(run: str) -> list[str]:
    """Neighbours that make one lexicon word are joined; a lone character inside a compound is read
    by context.
    """
    known = load_lexicon("ja").words
    tokens = segment_japanese(run)
    out: list[str] = []
    i = 0
    while i < len(tokens):
        counted = (
            i > 0 and tokens[i - 1][0][-1] in _DIGITS
        )  # what follows a number counts something
        names = [
            "".join(t for t, _ in tokens[i : i + n]) for n in range(1, min(4, len(tokens) - i) + 1)
        ]
        whole = [n for n, name in enumerate(names, 1) if n == 1 or name in known or name in _CLOCK]
        joined = 1 if counted else whole[-1]
        surface = names[joined - 1]
        inside = (
            i > 0 and len(surface) == 1 and bool(re.match("[\u3400-\u9fff]", tokens[i - 1][0][-1]))
        )
        kana = _CLOCK.get(surface, tokens[i][1])
        out.append(surface if surface in known and not inside else f"{surface}\t{kana}")
        i += joined
    return out


def _in_sentence(words: list[Spoken], language: str) -> list[Spoken]:
    lexicon = load_lexicon(language)
    out = []
    for i, word in enumerate(words):
        following = following_class(words[i + 1].phonemes if i + 1 < len(words) else None)
        form = lexicon.form(word.text, following)
        out.append(word if form is None else Spoken(word.text, form[0], settled=form[1]))
    return link(out, language)


def _time(
    text: str,
    language: str,
    groups: Sequence[tuple[list[Spoken], str]],
    speed: float,
    networks: Networks,
) -> Reading:
    symbols: list[tuple[str, int]] = []  # phones and marks
    spans: list[tuple[Spoken, int, int]] = []
    for words, mark in groups:
        for word in words:
            own = parse_ipa(word.phonemes)
            if not own:  # a lone length mark
                continue
            spans.append((word, len(symbols), len(symbols) + len(own)))
            symbols += own
        if mark:
            symbols.append((SILENCE, 0))
    if symbols[-1][0] == SILENCE:
        symbols.pop()  # the pause at the end is the tail
    lengths = networks.seconds([(SILENCE, 0), *symbols, (SILENCE, 0)], language)[1:-1] / speed
    edges = LEAD + np.concatenate([[0.0], np.cumsum(lengths)])
    phones = [Phone(SILENCE, 0.0, LEAD, 0)]
    phones += [
        Phone(s, float(a), float(b), m)
        for (s, m), a, b in zip(symbols, edges, edges[1:], strict=False)
    ]
    phones.append(Phone(SILENCE, float(edges[-1]), float(edges[-1]) + TAIL, 0))
    spoken = [
        SpokenWord(w.text.partition("\t")[0], w.phonemes, float(edges[a]), float(edges[b]))
        for w, a, b in spans
    ]
    return Reading(language, text, tuple(spoken), tuple(phones))
