"""What the bank's sentences teach beyond single words: forms of words in context; and how well
sentences are read.
"""

from __future__ import annotations

import gzip
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from avdiff.corpus.speech.read import SpeechCorpus, Utterance
from avdiff.g2p.connected_speech import Spoken, following_class, link
from avdiff.g2p.networks import Networks
from avdiff.g2p.normalize import split_text
from avdiff.g2p.pronounce import Reading, pronounce, pronounce_words
from avdiff.phonetics.phone import SILENCE
from avdiff.phonetics.tokens import parse_ipa

Counts = dict[tuple[str, str], Counter[str]]
BREAKS = {"hi": r"[,?!;:—…]+"}  # a full stop is part of Hindi's "r."
MINED = ("en", "es", "fr", "hi", "it", "pt")
CLOSE = 2  # a form seen once must be this near to the expected one
LEAST = 0.6  # a form must be this share of a word's uses in its place


def phrases(utterance: Utterance) -> list[list[str]] | None:
    """Phoneme words of a bank sentence between its pauses."""
    text = "".join(utterance.tokens.symbols)
    return [
        part.split()
        for part in re.split(BREAKS.get(utterance.lang, r"[,.?!;:—…]+"), text)
        if part.strip()
    ]


def standard_accent(utterance: Utterance) -> bool:
    """English is read as American: the bank's British voices are left aside."""
    return utterance.lang != "en" or utterance.voice.startswith("a")


def mine_forms(
    utterances: Iterable[Utterance], language: str, networks: Networks
) -> dict[tuple[str, str], str]:
    """(word, what follows) -> phonemes, for the words whose form in sentences is neither the
    lexicon's nor a rule's.
    """
    seen: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    plain: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for utterance in utterances:
        if utterance.lang != language or not standard_accent(utterance):
            continue
        groups = _word_groups(utterance.text, language)
        spoken = phrases(utterance) or []
        if [len(g) for g in groups] != [len(s) for s in spoken] or sum(map(len, groups)) < 2:
            continue
        for words, forms in zip(groups, spoken, strict=True):
            own = [
                Spoken(w, p)
                for w, p in zip(words, pronounce_words(words, language, networks), strict=True)
            ]
            ruled = link(own, language)
            for i, (word, form) in enumerate(zip(words, forms, strict=True)):
                following = following_class(forms[i + 1] if i + 1 < len(forms) else None)
                seen[word.lower(), following][form] += 1
                plain[word.lower(), following][ruled[i].phonemes] += 1
    return _choose(seen, plain)


def _choose(seen: Counts, plain: Counts) -> dict[tuple[str, str], str]:
    """The usual form of each word in each place, where rules do not give it; "any" where all places
    agree.
    """
    forms: dict[tuple[str, str], str] = {}
    for (word, following), counts in seen.items():
        form, n = counts.most_common(1)[0]
        near = edit_distance(form, plain[word, following].most_common(1)[0][0]) <= CLOSE
        if (
            (n > 1 or near)
            and n / counts.total() >= LEAST
            and plain[word, following].most_common(1)[0][0] != form
        ):
            forms[word, following] = form
    places: dict[str, dict[str, str]] = defaultdict(dict)
    for (word, following), form in forms.items():
        places[word][following] = form
    out: dict[tuple[str, str], str] = {}
    for word, own in places.items():
        every = {following for w, following in seen if w == word}
        usual = Counter(own.values()).most_common(1)[0][0]
        whole = set(own) == every  # the word is never as in the lexicon
        out |= {
            (word, following): form
            for following, form in own.items()
            if not (whole and form == usual)
        }
        if whole:
            out[word, "any"] = usual
    return out


def _word_groups(text: str, language: str) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    for piece in split_text(text, language):
        if piece.is_word:
            groups[-1].append(piece.text)
        elif groups[-1]:
            groups.append([])
    return [g for g in groups if g]


def write_forms(folder: Path, language: str, forms: dict[tuple[str, str], str]) -> None:
    """One line a form: word, what follows, phonemes; gzip without a date, so that equal forms are
    equal files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(
        f"{word}\t{following}\t{form}\n" for (word, following), form in sorted(forms.items())
    )
    draft = folder / f"{language}.{os.getpid()}.tmp"
    draft.write_bytes(gzip.compress(lines.encode(), mtime=0))
    os.replace(draft, folder / f"{language}.tsv.gz")


def edit_distance(a: Sequence[object], b: Sequence[object]) -> int:
    """Levenshtein distance."""
    row = np.arange(len(b) + 1)
    for i, x in enumerate(a, 1):
        above = row.copy()
        row[0] = i
        for j, y in enumerate(b, 1):
            row[j] = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (x != y))
    return int(row[-1])


def sentence_scores(
    bank: SpeechCorpus, networks: Networks, split: str = "test"
) -> dict[str, dict[str, float]]:
    """By language, in per cent: phones right (1 - distance / length), the same with marks,
    sentences all right.
    """
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    for u in bank:
        if u.split != split or not standard_accent(u):
            continue
        truth = parse_ipa("".join(u.tokens.symbols))
        groups = pronounce(split_text(u.text, u.lang), u.lang, networks)
        guess = [p for words, _ in groups for w in words for p in parse_ipa(w.phonemes)]
        truth = [p for p in truth if p[0] != SILENCE]
        phones = edit_distance([s for s, _ in truth], [s for s, _ in guess])
        marked = edit_distance(truth, guess)
        counts = (len(truth), phones, marked, phones == 0, 1)
        totals[u.lang] = [a + b for a, b in zip(totals[u.lang], counts, strict=True)]
    names = ("phones", "marked", "sentences", "count")
    return {
        language: dict(
            zip(
                names,
                (100 * (1 - t[1] / t[0]), 100 * (1 - t[2] / t[0]), 100 * t[3] / t[4], t[4]),
                strict=True,
            )
        )
        for language, t in sorted(totals.items())
    }


def reading_error(reading: Reading, utterance: Utterance) -> float:
    """Relative error of a reading's length between the silences at both ends, at the utterance's
    speed.
    """
    own = reading.phones[-1].start - reading.phones[0].end
    true = utterance.phones[-1].start - utterance.phones[0].end
    return own / utterance.speed / true - 1
