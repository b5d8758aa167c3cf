"""Words of a real clip on its clock: the quoted words are pronounced and aligned with the sound by
the recognizer.

Only so can training on a user's clips tell the model what is said when; without it a fine-tuned
voice would babble.
"""

from __future__ import annotations

import numpy as np

from avdiff.evaluators.load import edit_distance, phone_times, recognise, spoken_symbols
from avdiff.g2p.pronounce import read
from avdiff.phonetics.phone import SILENCE, Phone, phone_id

UNLIKE = 0.8  # phone error rate above which the sound does not say these words


def phones_of_clip(
    text: str, audio: np.ndarray, sample_rate: int, language: str | None = None
) -> tuple[Phone, ...]:
    """Phones of spoken words, with marks, at the times at which they are heard; they tile the
    audio.

    Args:
        text: the words. audio: (S,) or (channels, S), the whole of what is said. language: code;
            None detects it.

    Raises:
        ValueError: the words cannot be read, do not fit into the sound, or are not what is heard
            there.
    """
    told = [p for p in read(text, language).phones if phone_id(p.symbol)]
    symbols = spoken_symbols(told)
    heard = recognise(audio, sample_rate)
    wrong = edit_distance(symbols, heard) / len(symbols)
    if wrong > UNLIKE:
        raise ValueError(
            f"the words {text[:60]!r} are not what is heard (phone error rate {wrong:.0%}): mend "
            "the "
            "caption, or take the quotes away"
        )
    own = iter(told)
    timed = phone_times(audio, sample_rate, symbols)
    return tuple(
        p if p.symbol == SILENCE else next(own)._replace(start=p.start, end=p.end) for p in timed
    )
