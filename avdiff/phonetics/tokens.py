"""From the synthesizer's tokens to phones that tile the clip.

Stress marks, tone arrows and length signs are tokens with frames of their own in the bank. Here
they are merged: stress into the vowel that follows, tones into the vowel before, length into the
phone before. Aspiration, palatalisation and nasalisation tell words apart, so they stay part of the
symbol ("kʰ", "kʲ", "ɑ̃"). Pauses, which the bank's times leave on the last phone, are found in the
audio and become silence phones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avdiff.phonetics.phone import SILENCE, Phone, phone_id

STRESS = {"ˈ": 1, "ˌ": 2}
TONES = {"→": 3, "↗": 4, "↓": 5, "↘": 6}
COLOURS = "ʰʲ\u0303"  # aspirated, palatalised, nasal: kept in the symbol
DROPPED = "ː\u0329\u032aᵝ-"  # length (the times tell), syllabic, dental, compressed
PAUSES = " ,.?!;:—…\"'()“”"
VOWELS = frozenset("aeiouyæøœɐɑɒɔəɚɛɜɤɨɪɯʊʌᵻAIOQWY")
STOPS = frozenset("pbtdkɡcɟqʈɖʔʤʧʣʦʨʥꭧ")
# Shares that explain the log spectra best (regression on phone labels, en es fr): the frames of a
# stress mark belong to the vowel but for their first tenth, those of a word space to both
# neighbours.
STRESS_BEFORE = 0.1
# silence: this far under the loud parts, or under this level
PAUSE_DB = -38.0
SHORTEST_PAUSE = {"space": 0.12, "mark": 0.06, "end": 0.0}  # seconds
CLOSURE = 0.05  # seconds of silence before a burst that are part of a stop


SPACE_BEFORE = 0.4
FLOOR_DB = -62.0


@dataclass(frozen=True)
class Tokens:
    """Phoneme tokens as the synthesizer timed them: marks are still tokens of their own. Times in
    seconds.
    """

    symbols: tuple[str, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]


def parse_ipa(text: str) -> list[tuple[str, int]]:
    """Phoneme string of a lexicon or converter -> [(symbol, mark)]; pauses become one silence, word
    spaces vanish.

    Raises:
        ValueError: a character that is neither a phone nor a mark.
    """
    times = tuple(float(i) for i in range(len(text) + 1))
    parts = _merge_marks(tuple(text), times[:-1], times[1:])
    known: list[tuple[str, int]] = []
    for part in parts:
        phone_id(part.symbol)
        known.append((part.symbol, part.stress_tone))
        if part.pause == "mark":
            known.append((SILENCE, 0))
    return known


class _Part:
    """A phone while it is being put together; `pause` says what follows it: "", "space", "mark" or
    "end".
    """

    __slots__ = ("end", "gap_end", "pause", "start", "stress_tone", "symbol")

    def __init__(self, symbol: str, start: float, end: float, stress_tone: int) -> None:
        self.symbol = symbol
        self.start = start
        self.end = end
        self.stress_tone = stress_tone
        self.gap_end = end
        self.pause = ""


def _merge_marks(
    symbols: Sequence[str], starts: Sequence[float], ends: Sequence[float]
) -> list[_Part]:
    """Merge every token that is no phone into its neighbours."""
    parts: list[_Part] = []
    start: float | None = None
    stress = 0
    for symbol, first, last in zip(symbols, starts, ends, strict=True):
        if symbol in STRESS:
            stress = STRESS[symbol]
            if start is None:
                start = _share(parts, first, last, STRESS_BEFORE)
        elif symbol in TONES:
            if parts:
                parts[-1].end = last
                carrier = next(
                    (p for p in reversed(parts[-2:]) if p.symbol[0] in VOWELS), parts[-1]
                )
                carrier.stress_tone = TONES[symbol]
        elif symbol in DROPPED or symbol in COLOURS:
            if parts:
                parts[-1].end = last
                parts[-1].symbol += symbol if symbol in COLOURS else ""
        elif symbol == "." and parts and parts[-1].symbol == "r":
            parts[-1].symbol, parts[-1].end = (
                "ɽ",
                last,
            )  # espeak writes the retroflex flap of Hindi as "r."
        elif symbol in PAUSES:
            start = _pause(parts, symbol, first, last, start)
        else:
            parts.append(_Part(symbol, first if start is None else start, last, stress))
            start = None
            stress = 0
    if parts:
        parts[-1].pause = "end"
    return parts


def _share(parts: list[_Part], first: float, last: float, before: float) -> float:
    """Split [first, last] between the phone before, if any, and the next one -> start of the
    next.
    """
    if not parts:
        return first
    parts[-1].end = first + before * (last - first)
    return parts[-1].end


def _pause(
    parts: list[_Part], symbol: str, first: float, last: float, start: float | None
) -> float:
    """Give a pause token to its neighbours and remember it; runs of pause tokens count as one."""
    if not parts:
        return first if start is None else start
    part = parts[-1]
    if not part.pause:
        part.gap_end = part.end
    first = part.gap_end if part.pause else first
    part.pause = "mark" if symbol != " " or part.pause == "mark" else "space"
    part.gap_end = first
    return _share(parts, first, last, SPACE_BEFORE)


def merge_tokens(
    tokens: Tokens, audio: np.ndarray, rate: int, shift: float = 0.0
) -> tuple[Phone, ...]:
    """Tokens and their audio (S,) -> phones that tile [0, S / rate] seconds without gaps, silence
    included.

    Args:
        shift: seconds added to the times of all tokens.
    """
    seconds = len(audio) / rate
    starts, ends = ([max(0.0, t + shift) for t in times] for times in (tokens.starts, tokens.ends))
    parts = _merge_marks(tokens.symbols, starts, ends)
    loud, hop = _loud_frames(audio, rate)
    phones: list[Phone] = []
    clock = 0.0
    if parts and parts[0].start > 0:
        clock = min(parts[0].start, seconds)
        phones.append(Phone(SILENCE, 0.0, clock, 0))
    for i, part in enumerate(parts):
        following = parts[i + 1] if i + 1 < len(parts) else None
        silence = _find_pause(part, clock, following, loud, hop, seconds) if part.pause else None
        end = silence[0] if silence else (following.start if following else seconds)
        phones.append(Phone(part.symbol, clock, end, part.stress_tone))
        clock = end
        if silence:
            phones.append(Phone(SILENCE, *silence, 0))
            clock = silence[1]
    return tuple(phones)


def _loud_frames(
    audio: np.ndarray, rate: int, hop_seconds: float = 0.005
) -> tuple[np.ndarray, float]:
    """Which 5 ms frames carry speech: level against the clip's loud parts -> (frames,) bool,
    seconds a frame.
    """
    hop = round(rate * hop_seconds)
    frames = audio[: len(audio) // hop * hop].reshape(-1, hop)
    level = 10 * np.log10(np.mean(frames**2, axis=1) + 1e-12)
    return level > max(np.percentile(level, 95) + PAUSE_DB, FLOOR_DB), hop / rate


def _find_pause(
    part: _Part, start: float, following: _Part | None, loud: np.ndarray, hop: float, seconds: float
) -> tuple[float, float] | None:
    """The longest silent stretch from the phone's start to the next phone, where it is long enough
    to be a pause.
    """
    limit = following.end if following else seconds
    earliest = start + min(0.03, (part.end - start) / 2)
    first = round(earliest / hop)
    last = min(len(loud), round(limit / hop))
    edges = np.flatnonzero(
        np.diff(np.concatenate([[True], loud[first:last], [True]]).astype(np.int8))
    )
    if not len(edges):
        return None
    runs = edges.reshape(-1, 2)
    if following is None:  # the tail: from the last speech to the end
        begin = float((first + runs[-1, 0]) * hop) if runs[-1, 1] == last - first else seconds
        return (begin, seconds) if seconds - begin > hop else None
    run = runs[np.argmax(runs[:, 1] - runs[:, 0])] + first
    begin = float(run[0] * hop)
    end = min(float(run[1] * hop), max(following.end - 0.03, following.start))
    if following.symbol[0] in STOPS:
        end -= CLOSURE
    return (begin, end) if end - begin >= SHORTEST_PAUSE[part.pause] else None
