"""Build a speech bank from scratch: sentences, readings, voices, sound with times, shards.

The bank has the form that `SpeechCorpus` reads. Each shard follows from (seed, language, number)
alone, so those finished are kept and a broken run goes on; a sentence's split follows from its
normalized text, so none is in two.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from avdiff.corpus.speech.read import LANGUAGES, SpeechCorpus, normalised_text
from avdiff.corpus.speech.sentences import draw_sentence
from avdiff.corpus.speech.synthesis import SAMPLE_RATE, Speech, Synthesizer
from avdiff.corpus.speech.timing import best_shift
from avdiff.g2p.networks import Networks, default_networks
from avdiff.g2p.normalize import split_text
from avdiff.g2p.pronounce import pronounce

FORMAT = 1
SHARD = 250  # utterances in a file
# seconds
SHORTEST = 0.5
LONGEST = 4.0
SPEEDS = (0.9, 1.15)
BUCKETS = {
    "val": 0.05,
    "test": 0.05,
    "test_voices": 0.05,
}  # share of all texts that belongs to each; the rest is train
TEST_VOICES = 0.04  # share of utterances by voices that occur nowhere else
BLENDED = 0.5  # share of the other utterances whose voice is a blend
LETTERS = {
    "en": "ab",
    "es": "e",
    "fr": "f",
    "hi": "h",
    "it": "i",
    "ja": "j",
    "pt": "p",
    "zh": "z",
}  # of voice names
# Partners of test voices; they speak nowhere else, not even alone.
HELD_OUT = {"f": ("af_kore", "bf_alice"), "m": ("am_liam", "bm_daniel")}
ODD = ("am_santa", "pm_santa", "em_santa", "af_nicole")  # played or whispered
SURE = 0.010  # seconds that labels may be off

Sayer = Callable[[str, Mapping[str, float], float], Speech]


@dataclass(frozen=True)
class Plan:
    """Who says what, how fast."""

    text: str
    blend: tuple[tuple[str, float], ...]
    gender: str
    speed: float
    split: str

    @property
    def voice(self) -> str:
        """One name, or names with weights: "af_heart*0.6+bf_emma*0.4"."""
        return (
            self.blend[0][0]
            if len(self.blend) == 1
            else "+".join(f"{n}*{w:g}" for n, w in self.blend)
        )


def build_bank(
    folder: str | os.PathLike[str],
    synthesizer: Synthesizer,
    count: int,
    languages: Sequence[str] | None = None,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> int:
    """Write `count` utterances a language -> number of utterances in the folder's shards of these
    languages.

    Args:
        folder: made if missing; finished shards in it are kept. languages: codes, None for all
            eight.
        rank, ranks: this process makes every `ranks`-th shard. progress: wraps the list of shards.

    Raises:
        ValueError: an unknown language, or a folder that holds another bank.
    """
    languages = tuple(languages or LANGUAGES)
    for language in languages:
        if language not in LANGUAGES:
            raise ValueError(f"languages={language!r}: needs codes among {', '.join(LANGUAGES)}")
    if count < 1:
        raise ValueError(f"count={count}: needs at least 1")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    _claim(target, synthesizer, seed)
    todo = [(language, k) for k in range(-(-count // SHARD)) for language in languages]
    networks = default_networks()
    for language, number in progress(todo[rank::ranks]):
        path = target / f"{language}-{number:03d}.tar"
        size = min(SHARD, count - number * SHARD)
        if _held(path) < size:
            names = synthesizer.voices.names()
            _write_shard(
                path, speak_plans(language, number, size, seed, synthesizer.say, names, networks)
            )
    return sum(_held(target / f"{language}-{k:03d}.tar") for language, k in todo)


def speak_plans(
    language: str,
    number: int,
    size: int,
    seed: int,
    say: Sayer,
    names: Sequence[str],
    networks: Networks,
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Records with sounds of one shard; sentences that come out too short or too long are drawn
    again.
    """
    rng = np.random.default_rng([seed, LANGUAGES.index(language), number])
    made = 0
    while made < size:
        plan = draw_plan(rng, language, names)
        try:
            phonemes = to_phonemes(plan.text, language, networks)
            speech = say(phonemes, dict(plan.blend), plan.speed)
        except ValueError:  # a word with a symbol that the voice does not know: another sentence
            continue
        seconds = len(speech.sound) / SAMPLE_RATE
        if SHORTEST <= seconds <= LONGEST:
            yield (
                _record(f"{language}-{seed}-{number * SHARD + made:05d}", language, plan, speech),
                speech.sound,
            )
            made += 1


def to_phonemes(text: str, language: str, networks: Networks) -> str:
    """A sentence as the voice wants it: words, spaces, pause marks. The reader's symbols are the
    voice's own.
    """
    groups = pronounce(split_text(text, language), language, networks)
    parts = [" ".join(word.phonemes for word in words) + mark for words, mark in groups]
    if not any(parts):
        raise ValueError(f"text={text!r}: holds no word of {language} that could be spoken")
    return " ".join(parts)


def draw_plan(rng: np.random.Generator, language: str, names: Sequence[str]) -> Plan:
    """Voice first, then a sentence of a split that the voice may speak."""
    held_out = rng.random() < TEST_VOICES
    blend, gender = draw_voice(rng, language, names, held_out)
    while True:
        text = draw_sentence(rng, language)
        split = split_of(text)
        if (split == "test_voices") == held_out:
            return Plan(text, blend, gender, round(float(rng.uniform(*SPEEDS)), 3), split)


def draw_voice(
    rng: np.random.Generator, language: str, names: Sequence[str], held_out: bool
) -> tuple[tuple[tuple[str, float], ...], str]:
    """A voice of the language, alone or blended with another of the same gender -> ((name, weight),
    ...), gender.

    Where a language has no voice of a gender (French men), a foreign voice carries most of the
    blend.
    """
    letter = "fm"[int(rng.integers(2))]
    barred = {*HELD_OUT["f"], *HELD_OUT["m"], *ODD}
    free = [n for n in names if n not in barred]
    natives = [n for n in free if n[0] in LETTERS[language]]
    own = [n for n in natives if n[1] == letter]
    first = str(rng.choice(own or natives))
    if own and not held_out and rng.random() >= BLENDED:
        return ((first, 1.0),), _gender(letter)
    partners = (
        [n for n in HELD_OUT[letter] if n in names]
        if held_out
        else [n for n in free if n[1] == letter]
    )
    partner = str(rng.choice([n for n in partners if n != first]))
    weight = float(rng.choice((0.5, 0.6, 0.7))) if own else 0.35
    return ((first, weight), (partner, round(1 - weight, 2))), _gender(letter)


def _gender(letter: str) -> str:
    return "female" if letter == "f" else "male"


def split_of(text: str) -> str:
    """Split of a sentence, by the hash of its normalized text."""
    place = (
        int.from_bytes(hashlib.sha256(normalised_text(text).encode()).digest()[:4], "big") / 2**32
    )
    for split, share in BUCKETS.items():
        if place < share:
            return split
        place -= share
    return "train"


def _record(key: str, language: str, plan: Plan, speech: Speech) -> dict[str, Any]:
    return {
        "id": key,
        "lang": language,
        "voice": plan.voice,
        "gender": plan.gender,
        "speed": plan.speed,
        "text": plan.text,
        "phonemes": list(speech.tokens),
        "starts": list(speech.starts),
        "ends": list(speech.ends),
        "duration": round(len(speech.sound) / SAMPLE_RATE, 6),
        "sample_rate": SAMPLE_RATE,
        "split": plan.split,
    }


def _write_shard(path: Path, utterances: Iterable[tuple[dict[str, Any], np.ndarray]]) -> None:
    """Ogg Opus and json of each utterance; the file appears when it is complete."""
    temporary_path = path.with_name(
        f".{path.stem}.{os.getpid()}"
    )  # not *.tar: a reader never takes it for a shard
    with tarfile.open(temporary_path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for record, sound in utterances:
            coded = io.BytesIO()
            soundfile.write(coded, np.clip(sound, -1, 1), SAMPLE_RATE, format="OGG", subtype="OPUS")
            text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
            for kind, data in (("opus", coded.getvalue()), ("json", text)):
                member = tarfile.TarInfo(f"{record['id']}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    os.replace(temporary_path, path)


def _held(path: Path) -> int:
    """Utterances in a shard, 0 where it is missing."""
    if not path.is_file():
        return 0
    with tarfile.open(path) as archive:
        return sum(name.endswith(".json") for name in archive.getnames())


def _claim(folder: Path, synthesizer: Synthesizer, seed: int) -> None:
    """Note what makes the bank; refuse a folder that something else made."""
    made_by = {
        "format": FORMAT,
        "seed": seed,
        "model": synthesizer.fingerprint,
        "shard": SHARD,
        "voices": synthesizer.voices.fingerprint,
        "calibration": synthesizer.calibration,
    }
    manifest = folder / "bank.json"
    if not manifest.is_file():
        if any(folder.glob("*.tar")):
            raise ValueError(
                f"folder={str(folder)!r}: holds shards of another bank; choose an empty folder"
            )
        temporary_path = folder / f".bank.{os.getpid()}"
        temporary_path.write_text(json.dumps(made_by, indent=1) + "\n")
        os.replace(temporary_path, manifest)
    held = json.loads(manifest.read_text())
    if held != made_by:
        wrong = ", ".join(
            f"{k} is {held.get(k)!r}, now {v!r}" for k, v in made_by.items() if held.get(k) != v
        )
        raise ValueError(
            f"folder={str(folder)!r}: holds another bank ({wrong}); choose an empty folder"
        )


def certify(
    folder: str | os.PathLike[str], languages: Sequence[str] | None = None
) -> dict[str, float]:
    """Language -> seconds by which the labels of a bank should come later, by regression on its
    sound.

    More than `SURE` says that the calibration does not fit; below some 20 sentences the number is
    only rough.
    """
    bank = SpeechCorpus(folder, languages=list(languages) if languages else None)
    groups: dict[str, list[Any]] = {}
    for utterance in bank:
        groups.setdefault(utterance.lang, []).append(utterance)
    return {
        lang: best_shift((bank.audio(u), u.phones) for u in members[:200])[0]
        for lang, members in groups.items()
    }
