"""Text in eight languages -> timed phones: `read("Good morning!")`.

A word is looked up in the lexicon; Japanese and Chinese words that are not there are read by their kana or pinyin, all
others by the pronunciation network. Neighbouring words are then linked, and a small head gives every phone its length.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from avdiff.data.corpus.phones import SILENCE, parse_ipa
from avdiff.data.corpus.visemes import Phone
from avdiff.data.eastern import read_chinese, read_kana, segment_chinese, segment_japanese, settle_nasals
from avdiff.data.lexicon import load_lexicon
from avdiff.data.linking import Spoken, following_class, link
from avdiff.data.speaker import fallback, phone_seconds
from avdiff.data.text import Piece, check_language, split_text

LEAD, TAIL = 0.12, 0.30  # seconds of silence before and after, as in the speech bank
LONGEST = 4000  # characters of one reading


@dataclass(frozen=True)
class SpokenWord:
    """A word as it is spoken ("58" is two words), its phonemes with marks, and its place in seconds."""

    text: str
    phonemes: str
    start: float
    end: float


@dataclass(frozen=True)
class Reading:
    """How a text is spoken.

    Args:
        language: one of the eight codes. text: as given. words: in order.
        phones: tile [0, duration] without gaps; pauses, and a short silence at both ends, are silence phones.
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
        """The same reading, evenly faster or slower so that it lasts `seconds`; silence at both ends keeps its length.

        Raises:
            ValueError: less time than 30 ms for each phone.
        """
        edges = sum(p.end - p.start for p in (self.phones[0], self.phones[-1]))
        if seconds - edges < 0.03 * (len(self.phones) - 2):
            raise ValueError(f"seconds={seconds}: too short for {len(self.phones) - 2} phones; "
                             f"needs at least {edges + 0.03 * (len(self.phones) - 2):.2f}, natural is {self.duration:.2f}")
        first, last = self.phones[0].end, self.phones[-1].start
        return self.warped([first, last], [first, seconds - (self.duration - last)])

    def timed(self, word_times: Sequence[tuple[float, float] | None]) -> Reading:
        """The same reading with words put at given times (start, end) in seconds; None leaves a word between its
        neighbours.

        Raises:
            ValueError: not one entry a word, or times that run backwards.
        """
        if len(word_times) != len(self.words):
            raise ValueError(f"word_times: {len(word_times)} entries; needs one for each of the {len(self.words)} words "
                             f"{[w.text for w in self.words][:12]}, None where it is free")
        old: list[float] = [0.0]
        new: list[float] = [0.0]
        for word, times in zip(self.words, word_times, strict=True):
            for own, wanted in zip((word.start, word.end), times or (), strict=False):
                if own > old[-1]:
                    old.append(own)
                    new.append(float(wanted))
                elif wanted != new[-1]:  # the word begins where the last one ended
                    new[-1] = max(new[-1], float(wanted)) if len(old) > 1 else 0.0
        if not all(a < b for a, b in zip(new, new[1:], strict=False)):
            raise ValueError(f"word_times={list(word_times)}: times must be in seconds, ascending, and above 0")
        return self.warped(old, new)

    def warped(self, old: Sequence[float], new: Sequence[float]) -> Reading:
        """Times `old` moved to `new`, linear between, shifted after the last; all ascending."""
        def move(t: float) -> float:
            if t >= old[-1]:
                return t + new[-1] - old[-1]
            return float(np.interp(t, [0.0, *old], [0.0, *new]))
        words = tuple(replace(w, start=move(w.start), end=move(w.end)) for w in self.words)
        return replace(self, words=words, phones=tuple(p._replace(start=move(p.start), end=move(p.end)) for p in self.phones))


def read(text: str, language: str | None = None, seconds: float | None = None, speed: float = 1.0,
         word_times: Sequence[tuple[float, float] | None] | None = None) -> Reading:
    """Pronounce a text.

    Args:
        text: in any of the eight languages' own scripts, numbers included. language: code; None detects it.
        seconds: total length. speed: 1 is natural, 2 twice as fast; not together with `seconds`.
        word_times: (start, end) in seconds for each spoken word, or None for a free one.

    Raises:
        ValueError: nothing to say, an unknown language, or times that do not fit.
    """
    if not 0.25 <= speed <= 4:
        raise ValueError(f"speed={speed}: needs 0.25 to 4; 1 is natural")
    if len(text) > LONGEST:
        raise ValueError(f"text: {len(text)} characters; needs at most {LONGEST}, so read it in parts")
    language = check_language(language, text)
    groups = pronounce(split_text(text, language), language)
    if not groups:
        raise ValueError(f"text={text[:60]!r}: holds no word of {language} that could be spoken")
    reading = _time(text, language, groups, speed)
    if seconds is not None:
        reading = reading.stretched(seconds)
    return reading if word_times is None else reading.timed(word_times)


def pronounce(pieces: Sequence[Piece], language: str) -> list[tuple[list[Spoken], str]]:
    """Pieces -> groups of linked words, each with the pause that follows it ("" at the end)."""
    groups: list[tuple[list[str], str]] = []
    words: list[str] = []
    for piece in pieces:
        if piece.is_word:
            words += _segment(piece.text, language)
        elif words:
            groups.append((words, piece.text))
            words = []
    groups += [(words, "")] if words else []
    alone = sum(len(ws) for ws, _ in groups) == 1
    spoken = [([Spoken(w, p) for w in ws if (p := pronounce_word(w, language))], mark) for ws, mark in groups]
    return [(ws if alone else _in_sentence(ws, language), mark) for ws, mark in spoken if ws]


def pronounce_word(word: str, language: str) -> str:
    """Phonemes of a word by itself; "" if it has no sound."""
    surface, _, kana = word.partition("\t")
    known = load_lexicon(language).find(surface)
    if known is not None and "\t" not in word:
        return known
    if language == "ja":
        return known or (settle_nasals(read_kana(kana)) if kana else _foreign(surface))
    if language == "zh":
        return known or read_chinese(surface) or _foreign(surface)
    return fallback(surface, language)


def _segment(run: str, language: str) -> list[str]:
    """Words of a run without spaces; Japanese words carry their kana after a tab."""
    if language == "ja":
        return [f"{word}\t{kana}" for word, kana in segment_japanese(run)]
    return segment_chinese(run) if language == "zh" else [run]


def _foreign(word: str) -> str:
    """A Latin-script word in Japanese or Chinese text is read as English."""
    return pronounce_word(word, "en") if re.search("[A-Za-z]", word) else ""


def _in_sentence(words: list[Spoken], language: str) -> list[Spoken]:
    lexicon = load_lexicon(language)
    out = []
    for i, word in enumerate(words):
        following = following_class(words[i + 1].phonemes if i + 1 < len(words) else None)
        form = lexicon.form(word.text, following)
        out.append(word if form is None else Spoken(word.text, form, settled=True))
    return link(out, language)


def _time(text: str, language: str, groups: Sequence[tuple[list[Spoken], str]], speed: float) -> Reading:
    symbols: list[tuple[str, int]] = []
    spans: list[tuple[Spoken, int, int]] = []
    for words, mark in groups:
        for word in words:
            phones = parse_ipa(word.phonemes)
            spans.append((word, len(symbols), len(symbols) + len(phones)))
            symbols += phones
        if mark:
            symbols.append((SILENCE, 0))
    if symbols[-1][0] == SILENCE:
        symbols.pop()  # the pause at the end is the tail
    lengths = phone_seconds(symbols, language) / speed
    edges = LEAD + np.concatenate([[0.0], np.cumsum(lengths)])
    phones = [Phone(SILENCE, 0.0, LEAD, 0)]
    phones += [Phone(s, float(a), float(b), m) for (s, m), a, b in zip(symbols, edges, edges[1:], strict=False)]
    phones.append(Phone(SILENCE, float(edges[-1]), float(edges[-1]) + TAIL, 0))
    spoken = [SpokenWord(w.text.partition("\t")[0], w.phonemes, float(edges[a]), float(edges[b])) for w, a, b in spans]
    return Reading(language, text, tuple(spoken), tuple(phones))
