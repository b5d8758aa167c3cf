"""Passages: sentences of one voice joined with pauses, with the phone times that go with the
sound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from avdiff.corpus.augment import shift_pitch
from avdiff.corpus.speech.read import SAMPLE_RATE, Utterance
from avdiff.phonetics.phone import SILENCE, Phone

# seconds of the recording kept around the speech
MARGIN_BEFORE = 0.06
MARGIN_AFTER = 0.10
FADE = 0.008  # seconds
LOUDNESS = 10 ** (-20 / 20)  # RMS of the speaking parts
PEAK = 0.95


@dataclass(frozen=True)
class UtteranceSegment:
    """One sentence cut to its speech: audio (S,), phones in seconds from the first sample."""

    utterance: Utterance
    audio: np.ndarray
    phones: tuple[Phone, ...]

    @property
    def seconds(self) -> float:
        """Length of the cut audio."""
        return len(self.audio) / SAMPLE_RATE


@dataclass(frozen=True)
class Concatenation:
    """Joined sentences: audio (S,) float32, phones that tile it, and the sentences."""

    audio: np.ndarray
    phones: tuple[Phone, ...]
    utterances: tuple[Utterance, ...]


def cut_piece(utterance: Utterance, pitch: Fraction = Fraction(1)) -> UtteranceSegment:
    """Cut a sentence to its speech with small faded margins; `pitch` raises and speeds it up by a
    factor.
    """
    audio = utterance.bank.audio(utterance)
    phones = utterance.phones
    spoken = [p for p in phones if p.symbol != SILENCE]
    first = max(0, round((spoken[0].start - MARGIN_BEFORE) * SAMPLE_RATE))
    last = min(len(audio), round((spoken[-1].end + MARGIN_AFTER) * SAMPLE_RATE))
    audio = audio[first:last].copy()
    fade = np.sin(np.linspace(0, np.pi / 2, round(FADE * SAMPLE_RATE), dtype=np.float32)) ** 2
    audio[: len(fade)] *= fade
    audio[-len(fade) :] *= fade[::-1]
    if pitch != 1:
        audio = shift_pitch(audio, pitch)
    begin = first / SAMPLE_RATE
    scale = 1 / float(pitch)
    end = len(audio) / SAMPLE_RATE
    moved = [
        Phone(
            p.symbol,
            min(max((p.start - begin) * scale, 0.0), end),
            min(max((p.end - begin) * scale, 0.0), end),
            p.stress_tone,
        )
        for p in phones
    ]
    return UtteranceSegment(utterance, audio, tuple(p for p in moved if p.end > p.start))


def choose_pieces(
    rng: np.random.Generator,
    first: Utterance,
    others: Sequence[Utterance],
    seconds: float,
    most: int,
    pause: Callable[[], float],
    pitch: Fraction,
) -> tuple[list[UtteranceSegment], list[float]]:
    """Sentences of one voice that fit in `seconds` -> pieces and the pause before each (the first
    has none).
    """
    pieces = [cut_piece(first, pitch)]
    pauses = [0.0]
    used = pieces[0].seconds
    order = rng.permutation(len(others))[:6]  # a few tries: rare voices have few sentences that fit
    for i in order:
        if len(pieces) >= most:
            break
        gap = pause()
        rough = (others[i].duration - 0.3) / float(pitch)
        if others[i].id == first.id or used + gap + rough > seconds:
            continue
        piece = cut_piece(others[i], pitch)
        if used + gap + piece.seconds <= seconds:
            pieces.append(piece)
            pauses.append(gap)
            used += gap + piece.seconds
    return pieces, pauses


def join_pieces(
    pieces: Sequence[UtteranceSegment], pauses: Sequence[float], lead: float, samples: int
) -> Concatenation:
    """Lay pieces on a silent track of `samples`, `lead` seconds in, each after its pause; loudness
    is evened out.
    """
    audio = np.zeros(samples, dtype=np.float32)
    phones: list[Phone] = []
    position = round(lead * SAMPLE_RATE)
    for piece, gap in zip(pieces, pauses, strict=True):
        position += round(gap * SAMPLE_RATE)
        part = piece.audio[: max(0, samples - position)]
        audio[position : position + len(part)] = part
        phones += [
            Phone(
                p.symbol,
                p.start + position / SAMPLE_RATE,
                p.end + position / SAMPLE_RATE,
                p.stress_tone,
            )
            for p in piece.phones
            if p.symbol != SILENCE
        ]
        position += len(piece.audio)
    return Concatenation(
        _even(audio),
        tile(phones, samples / SAMPLE_RATE),
        tuple(piece.utterance for piece in pieces),
    )


def tile(phones: Sequence[Phone], seconds: float) -> tuple[Phone, ...]:
    """Fill every gap with silence, so that the phones tile [0, seconds]."""
    row: list[Phone] = []
    now = 0.0
    for phone in phones:
        if phone.start >= seconds:
            break
        if phone.start > now + 1e-6:
            row.append(Phone(SILENCE, now, phone.start, 0))
        row.append(
            phone._replace(
                start=now if phone.start <= now + 1e-6 else phone.start, end=min(phone.end, seconds)
            )
        )
        now = row[-1].end
    if now < seconds:
        row.append(Phone(SILENCE, now, seconds, 0))
    return tuple(row)


def _even(audio: np.ndarray) -> np.ndarray:
    """Bring the RMS of the speaking parts to `LOUDNESS`, peaks under `PEAK`."""
    frames = audio[: len(audio) // 240 * 240].reshape(-1, 240)
    power = np.mean(frames**2, axis=1)
    speaking = power[power > power.max(initial=0.0) * 1e-3]
    if not len(speaking):
        return audio
    gain = min(LOUDNESS / float(np.sqrt(speaking.mean())), PEAK / float(np.abs(audio).max()))
    return audio * np.float32(gain)
