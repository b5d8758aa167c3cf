"""The held-out prompts: what every measurement of a generator is asked to show and say, fixed once.

    python -m avdiff.data.heldout --bank BANK        # writes avdiff/bundled/prompts/heldout.jsonl;
    the same file at each run

Sentences come from the bank's test split (none is in an earlier split, whatever the voice), digit
strings and GRID-type commands (Cooke et al. 2006) are in no split at all, presenters are
combinations of looks that the corpus never draws for training (`identity_split`). Scenes of events
are drawn afresh; their looks and materials alone are not new.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.corpus.captions import event_captions, join_sentences, phrases, speech_captions
from avdiff.corpus.dataset import split_utterances
from avdiff.corpus.events.scene import KINDS, sample_event
from avdiff.corpus.face import identity as looks
from avdiff.corpus.speech.read import LANGUAGES, SpeechCorpus, Utterance, normalised_text
from avdiff.files import BUNDLED
from avdiff.g2p.pronounce import read
from avdiff.phonetics.phone import Phone, inventory, phone_id

FILE = BUNDLED / "prompts" / "heldout.jsonl"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GRID = (
    ("bin", "lay", "place", "set"),
    ("blue", "green", "red", "white"),
    ("at", "by", "in", "with"),
    tuple("ABCDEFGHIJKLMNOPQRSTUVXYZ"),
    DIGITS,
    ("again", "now", "please", "soon"),
)  # W is not in GRID
COUNTS = {
    "sentence": 18,
    "passage": 1,
    "digits": 24,
    "grid": 24,
    "event": 4,
}  # each language; digits and grid in all
EVENT_SECONDS = (2.0, 4.0)
ADDED = ("glasses", "beard", "hat", "earrings", "lipstick")  # what somebody may have or not
_LOOKS: dict[str, Sequence[str]] = {
    "gender": ("female", "male"),
    "skin": tuple(looks.SKINS),
    "hair_color": tuple(looks.HAIRS),
    "beard": looks.BEARDS,
    "hair_style": tuple(
        dict.fromkeys(style for styles in looks.HAIR_STYLES.values() for style in styles)
    ),
    "glasses": looks.GLASSES,
    "hat": looks.HATS,
    "hat_color": tuple(looks.COLORS),
    "eye_color": tuple(looks.IRISES),
    "earrings": looks.EARRINGS,
    "lipstick": tuple(looks.LIPSTICKS),
    "clothes": looks.CLOTHES,
    "clothes_color": tuple(looks.COLORS),
    "background_color": tuple(looks.BACKDROPS),
}


@dataclass(frozen=True)
class Prompt:
    """One line of the file.

    Args:
        id: such as "en-sentence-03". kind: sentence, passage (two sentences), digits, grid or
            event. language: code.
        prompt: what a generator is given. text: words to be said, "" for events. seconds: natural
            length of the clip.
        phones: what a recognizer should hear, without silence. attributes: the whole look, as the
            corpus names it.
        told: attributes that the prompt speaks of, "value" or "presence": only these can be asked
            of a picture.
        gender: of the voice and the presenter, "" for events. source: utterance ids of the bank.
        seed: for the generator. impacts: strokes that the event's caption may tell, 0 for speech.
    """

    id: str
    kind: str
    language: str
    prompt: str
    text: str
    seconds: float
    phones: list[str] = field(default_factory=list)
    attributes: dict[str, str] = field(default_factory=dict)
    told: dict[str, str] = field(default_factory=dict)
    gender: str = ""
    source: list[str] = field(default_factory=list)
    seed: int = 0
    contacts: int = 0


def symbols(phones: Sequence[Phone]) -> list[str]:
    """Phones as the inventory writes them, without silence."""
    names = inventory()[0]
    return [names[i] for i in (phone_id(phone.symbol) for phone in phones) if i]


def told_attributes(
    attributes: Mapping[str, str], text: str, language: str, which: int, seed: int
) -> dict[str, str]:
    """What caption `which` of this seed tells: attribute -> "value", or "presence" where it says
    that there is one.

    A value is told if every other value would change the caption ("round glasses"); presence, if
    the caption holds one of the words for the attribute all the same ("glasses").
    """

    def caption(changed: Mapping[str, str]) -> str:
        return speech_captions(changed, text, language, np.random.default_rng(seed))[which]

    plain = caption(attributes)
    told = {}
    table = phrases("en" if which < 4 else language)
    for name, values in _LOOKS.items():
        value = attributes.get(name, "none")
        if value == "none":
            continue
        others = [v for v in values if v not in ("none", value)]
        if all(caption({**attributes, name: other}) != plain for other in others):
            told[name] = "value"
        elif name in ADDED and any(
            form in plain
            for words in table.get(name, {}).get(value, ())
            for form in words.split("|")
        ):
            told[name] = "presence"
    return told


def speech_prompt(
    rng: np.random.Generator,
    name: str,
    kind: str,
    language: str,
    text: str,
    seconds: float,
    phones: list[str],
    gender: str,
    source: list[str],
) -> Prompt:
    """A presenter of the test split who says `text`; one caption in three is in the language
    itself.
    """
    attributes = looks.sample_identity(rng, gender, "test").attributes()
    seed = int(rng.integers(1 << 31))
    which = (
        int(rng.integers(4))
        if language == "en" or rng.random() < 0.67
        else 4 + int(rng.integers(2))
    )
    prompt = speech_captions(attributes, text, language, np.random.default_rng(seed))[which]
    told = told_attributes(attributes, text, language, which, seed)
    return Prompt(
        name,
        kind,
        language,
        prompt,
        text,
        round(seconds, 2),
        phones,
        attributes,
        told,
        gender,
        source,
        seed,
    )


def from_bank(rng: np.random.Generator, bank: SpeechCorpus, language: str) -> Iterator[Prompt]:
    """Sentences and passages of the bank's test split, no text twice."""
    unique: dict[str, Utterance] = {}
    for utterance in split_utterances(bank, "test", [language]):
        unique.setdefault(normalised_text(utterance.text), utterance)
    rows = [unique[key] for key in sorted(unique)]
    order = rng.permutation(len(rows))
    chosen = [rows[i] for i in order[: COUNTS["sentence"]]]
    for number, one in enumerate(chosen):
        yield speech_prompt(
            rng,
            f"{language}-sentence-{number:02d}",
            "sentence",
            language,
            one.text,
            one.duration,
            symbols(one.phones),
            one.gender,
            [one.id],
        )
    for number in range(COUNTS["passage"]):
        pair = [rows[i] for i in rng.permutation(len(rows))[:2]]
        text = join_sentences([u.text for u in pair], language, rng)
        yield speech_prompt(
            rng,
            f"{language}-passage-{number:02d}",
            "passage",
            language,
            text,
            sum(u.duration for u in pair) + 0.2,
            [s for u in pair for s in symbols(u.phones)],
            pair[0].gender,
            [u.id for u in pair],
        )


def read_aloud(rng: np.random.Generator, taken: set[str], kind: str) -> Iterator[Prompt]:
    """English digit strings or GRID commands that the bank does not hold; phones and length by the
    reader.
    """
    number = 0
    while number < COUNTS[kind]:
        if kind == "digits":
            words = [str(rng.choice(DIGITS)) for _ in range(int(rng.integers(3, 8)))]
        else:
            words = [str(rng.choice(slot)) for slot in GRID]
        text = " ".join(words)
        if normalised_text(text) in taken:
            continue
        taken.add(normalised_text(text))
        reading = read(text, "en")
        yield speech_prompt(
            rng,
            f"en-{kind}-{number:02d}",
            kind,
            "en",
            text,
            reading.duration,
            symbols(reading.phones),
            ("female", "male")[number % 2],
            [],
        )
        number += 1


def events(rng: np.random.Generator, language: str, first: int) -> Iterator[Prompt]:
    """Objects that sound; the kinds take turns over the languages."""
    for number in range(COUNTS["event"]):
        seconds = float(rng.uniform(*EVENT_SECONDS))
        event = sample_event(rng, seconds, KINDS[(first + number) % len(KINDS)])
        captions = event_captions(event, language, rng)
        prompt = captions[int(rng.integers(len(captions)))]
        yield Prompt(
            f"{language}-event-{number:02d}",
            "event",
            language,
            prompt,
            "",
            round(seconds, 2),
            attributes=event.attributes(),
            seed=int(rng.integers(1 << 31)),
            contacts=len(event.contacts),
        )


def make_prompts(bank: SpeechCorpus, seed: int = 2026) -> list[Prompt]:
    """All prompts: a function of the bank and the seed.

    Raises:
        ValueError: a language of which the bank has no test sentences.
    """
    prompts: list[Prompt] = []
    for number, language in enumerate(LANGUAGES):
        rng = np.random.default_rng([seed, number])
        prompts += [
            *from_bank(rng, bank, language),
            *events(rng, language, number * COUNTS["event"]),
        ]
    taken = {normalised_text(utterance.text) for utterance in bank}
    for number, kind in enumerate(("digits", "grid")):
        prompts += read_aloud(np.random.default_rng([seed, 100 + number]), taken, kind)
    return prompts


def load_prompts(
    path: str | os.PathLike[str] = FILE,
    kinds: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
) -> list[Prompt]:
    """Prompts of the file, or of some kinds or languages.

    Raises:
        ValueError: no such file, or a line that is no prompt.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError(
            f"path={str(path)!r}: not found; make it with python -m avdiff.data.heldout --bank BANK"
        )
    prompts = []
    for number, line in enumerate(place.read_text(encoding="utf8").splitlines(), start=1):
        try:
            record: dict[str, Any] = json.loads(line)
            prompts.append(Prompt(**record))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{place}, line {number}: no prompt: {error}") from error
    return [
        p
        for p in prompts
        if (not kinds or p.kind in kinds) and (not languages or p.language in languages)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description="Write the held-out prompts.")
    parser.add_argument(
        "--bank", default=None, help="folder of the bank; default $AVDIFF_BANK, else the mini-bank"
    )
    parser.add_argument("--output", default=str(FILE))
    options = parser.parse_args(None if arguments is None else list(arguments))
    prompts = make_prompts(SpeechCorpus(options.bank, decoded=True))
    target = Path(options.output)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
    temporary_path.write_text(
        "".join(json.dumps(asdict(p), ensure_ascii=False) + "\n" for p in prompts), encoding="utf8"
    )
    os.replace(temporary_path, target)
    print(f"{len(prompts)} prompts: {target}")


if __name__ == "__main__":
    main()
