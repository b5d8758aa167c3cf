"""Train G2P: letters -> phonemes, phones -> seconds, and the forms that words take in sentences.

    avdiff train-g2p words --output_dir RUN_W        # the network with its memory, on the lexicon
    avdiff train-g2p times --bank BANK --output_dir RUN_T
    avdiff train-g2p ship --words RUN_W/final/reader --times RUN_T/final/timer    # into the package
    avdiff train-g2p forms --bank BANK               # words in sentences -> bundled/lexicon/forms
    avdiff train-g2p score --bank BANK --json OUT

Words are held out by hash: one in twenty for the score and one in twenty for validation; neither is
ever trained. Also as `python -m avdiff.train.g2p.train_g2p`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from avdiff.core.engram import MemoryRead
from avdiff.corpus.speech.read import LANGUAGES, SpeechCorpus, Utterance
from avdiff.files import write_text
from avdiff.g2p.lexicon import FOLDER as LEXICON
from avdiff.g2p.lexicon import english_plural, load_lexicon
from avdiff.g2p.networks import FOLDER as BUNDLED
from avdiff.g2p.networks import Networks
from avdiff.g2p.pronounce import read
from avdiff.models.g2p.networks import PAD, DurationPredictor, Pronouncer
from avdiff.phonetics.phone import encode_phones, inventory
from avdiff.train.g2p.letter_alignment import align_words
from avdiff.train.g2p.sentences import (
    MINED,
    mine_forms,
    reading_error,
    sentence_scores,
    write_forms,
)
from avdiff.train.loop.command import run_training
from avdiff.train.loop.config import load_options
from avdiff.train.loop.fit import FitOptions, FitSummary, Loss, Task
from avdiff.train.loop.sparse_optim import RowAdagrad

SPELT = ("en", "es", "fr", "hi", "it", "pt")
# Per epoch. Spanish and Portuguese spelling is nearly regular; English is the hardest, Hindi has
# the fewest words.
REPEATS = {"en": 3, "hi": 3, "fr": 2, "it": 2}
PACK = 16  # words of an item
RARE = 3  # chunks seen less often are left out
TABLE_LR, TABLE_DROPOUT = (
    0.08,
    0.25,
)  # the memory is missed by a quarter of the words, so that the rules are learnt too
MEMORIES = ("trained", "off", "frozen", "shuffled")


def fold(word: str, language: str) -> str:
    """train, val or test, by a hash of the word."""
    place = int(hashlib.md5(f"{language} {word}".encode()).hexdigest(), 16) % 20
    return {0: "test", 1: "val"}.get(place, "train")


@dataclass(frozen=True)
class Spelling:
    """A word, its phonemes, and its phonemes letter by letter."""

    word: str
    language: str
    phonemes: str
    chunks: tuple[str, ...] | None


def load_spellings(cache: Path, languages: Sequence[str] = SPELT) -> list[Spelling]:
    """All lexicon words of alphabetic languages, aligned; the alignment takes three minutes and is
    kept in `cache`.
    """
    if not cache.exists():
        rows = []
        for language in languages:
            words = load_lexicon(language).words
            pairs = [(w, p.replace(" ", "")) for w, p in words.items()]
            rows += [
                (w, language, p, c) for (w, p), c in zip(pairs, align_words(pairs), strict=True)
            ]
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_text(cache, json.dumps(rows, ensure_ascii=False))
    return [
        Spelling(w, x, p, None if c is None else tuple(c))
        for w, x, p, c in json.loads(cache.read_text("utf8"))
    ]


def pack(spellings: Sequence[Spelling], seed: int) -> list[list[Spelling]]:
    """Random packs of words of nearly equal length: no padding, and one item of the data loader for
    sixteen words.
    """
    order = torch.randperm(len(spellings), generator=torch.Generator().manual_seed(seed)).tolist()
    by_length: dict[int, list[Spelling]] = defaultdict(list)
    for i in order:
        by_length[min(max(len(spellings[i].word), 4), 15) // 2 * 2].append(spellings[i])
    return [
        words[i : i + PACK]
        for _, words in sorted(by_length.items())
        for i in range(0, len(words), PACK)
    ]


class WordTask(Task):
    """Letters -> chunks, teacher-forced; the memory's table is trained by gathered rows after each
    step.

    Args:
        memory: "trained"; or a control: "off", "frozen" (random rows), "shuffled" (each word reads
            another's rows).
    """

    def __init__(
        self, spellings: Sequence[Spelling], memory: str = "trained", seed: int = 0, **config: Any
    ) -> None:
        if memory not in MEMORIES:
            raise ValueError(f"memory={memory!r}: needs one of {', '.join(MEMORIES)}")
        train = [s for s in spellings if fold(s.word, s.language) == "train" and s.chunks]
        counts = Counter(chunk for s in train for chunk in s.chunks or ())
        chunks = ["", *sorted(c for c, n in counts.items() if n >= RARE and c)]
        letters = "".join(sorted({letter for s in train for letter in s.word}))
        torch.manual_seed(seed)
        self.reader = Pronouncer(list(SPELT), letters, chunks, **config)
        self.modules = {"reader": self.reader}
        self.chunk_ids = {chunk: i for i, chunk in enumerate(chunks)}
        fit_in = [s for s in train if all(c in self.chunk_ids for c in s.chunks or ())]
        repeated = [s for s in fit_in for _ in range(REPEATS.get(s.language, 1))]
        self.dataset = pack(repeated, seed)
        self.groups = [min(max(len(p[0].word), 4), 15) // 2 for p in self.dataset]
        self.held_out = [s for s in spellings if fold(s.word, s.language) == "val"]
        self.memory = memory
        self.rows = (
            RowAdagrad([self.reader.memory.table], TABLE_LR)
            if memory in ("trained", "shuffled")
            else None
        )
        self.collate = self._collate

    def _collate(self, packs: list[list[Spelling]]) -> dict[str, torch.Tensor]:
        items = [s for p in packs for s in p]
        letters, languages = self.reader.encode_words(
            [s.word for s in items], [s.language for s in items]
        )
        rows = [torch.tensor([self.chunk_ids[c] for c in s.chunks or ()]) for s in items]
        return {
            "letters": letters,
            "languages": languages,
            "chunks": pad_sequence(rows, batch_first=True),
        }

    def loss(self, batch: dict[str, torch.Tensor], phase: str, generator: torch.Generator) -> Loss:
        """Cross-entropy of each letter's chunk."""
        letters = batch["letters"]
        languages = batch["languages"]
        chunks = batch["chunks"]
        read = self.read(letters, languages)
        if read is not None:
            kept = (
                torch.rand(len(letters), 1, 1, generator=generator, device=letters.device)
                >= TABLE_DROPOUT
            )
            read = MemoryRead(read.keys, read.values * kept)
        present = letters != PAD
        logits = self.reader(letters, languages, chunks, read)[present]
        each = F.cross_entropy(
            logits.float(), chunks[present], reduction="none", label_smoothing=0.05
        )
        return Loss(each.mean(), {"chunk": each})

    def read(self, letters: torch.Tensor, languages: torch.Tensor) -> MemoryRead | None:
        """What the memory gives under this task's setting."""
        if self.memory == "off":
            return None
        if self.memory == "shuffled":
            return self.reader.read_memory(letters.roll(1, 0), languages.roll(1, 0))
        return self.reader.read_memory(letters, languages)

    def after_step(self, phase: str, lr: float) -> None:
        """One step of the table, its learning rate on the same schedule."""
        if self.rows is not None:
            self.rows.param_groups[0]["lr"] = TABLE_LR * lr / self.peak_lr
            self.rows.step()
            self.rows.zero_grad()

    peak_lr = 2e-3

    def extra_state_dict(self) -> dict[str, torch.Tensor]:
        """State of the table's optimizer."""
        return {} if self.rows is None else self.rows.flat_state()

    def load_extra_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `extra_state_dict`."""
        if self.rows is not None:
            self.rows.load_flat_state(dict(state))

    def validate(self) -> dict[str, float]:
        """Share of held-out words that are exactly right, marks included."""
        return word_scores(self, self.held_out)

    def settings(self) -> dict[str, Any]:
        """What must not change on resume."""
        return {
            "packs": len(self.dataset),
            "memory": self.memory,
            "letters": self.reader.config.letters,
        }


@torch.no_grad()
def word_scores(task: WordTask, spellings: Sequence[Spelling]) -> dict[str, float]:
    """Exactly right words by language, in per cent, and their mean."""
    right: dict[str, list[bool]] = defaultdict(list)
    order = sorted(spellings, key=lambda s: len(s.word))
    inventory_ = task.reader.config.chunks
    for i in range(0, len(order), 256):
        part = order[i : i + 256]
        letters, languages = task.reader.encode_words(
            [s.word for s in part], [s.language for s in part]
        )
        rows = task.reader.spell(letters, languages, task.read(letters, languages)).tolist()
        for s, row in zip(part, rows, strict=True):
            right[s.language].append(
                "".join(inventory_[c] for c in row[: len(s.word)]) == s.phonemes
            )
    scores = {language: 100 * sum(r) / len(r) for language, r in sorted(right.items())}
    return scores | {"mean": sum(scores.values()) / len(scores)}


class TimeTask(Task):
    """Phones of the bank's sentences -> log seconds at natural speed."""

    def __init__(self, bank: SpeechCorpus, seed: int = 0, **config: Any) -> None:
        torch.manual_seed(seed)
        self.timer = DurationPredictor(
            len(inventory()[0]), len(inventory()[1]), len(LANGUAGES), **config
        )
        self.modules = {"timer": self.timer}
        self.dataset = [u for u in bank if u.split == "train"]
        self.held_out = [u for u in bank if u.split == "val"]
        self.collate = self._collate

    def _collate(self, items: list[Utterance]) -> dict[str, torch.Tensor]:
        ids, stress_tones, seconds = map(list, zip(*(encode_timed(u) for u in items), strict=True))
        return {
            "phones": pad_sequence(ids, True, len(inventory()[0])),
            "stress_tones": pad_sequence(stress_tones, True),
            "seconds": pad_sequence(seconds, True),
            "languages": torch.tensor([LANGUAGES.index(u.lang) for u in items]),
        }

    def loss(self, batch: dict[str, torch.Tensor], phase: str, generator: torch.Generator) -> Loss:
        """L1 between logs: the median length."""
        log = self.timer(batch["phones"], batch["stress_tones"], batch["languages"])
        known = batch["seconds"] > 0
        each = (log.float() - batch["seconds"].clamp_min(0.01).log()).abs() * known
        return Loss(each.sum() / known.sum(), {"log_seconds": each.sum(1) / known.sum(1)})

    def validate(self) -> dict[str, float]:
        """Mean error in log seconds and correlation, on sentences never trained."""
        predicted = []
        true = []
        for i in range(0, len(self.held_out), 64):
            batch = self._collate(self.held_out[i : i + 64])
            known = batch["seconds"] > 0
            predicted.append(
                self.timer(batch["phones"], batch["stress_tones"], batch["languages"]).float()[
                    known
                ]
            )
            true.append(batch["seconds"][known].log())
        both = torch.stack([torch.cat(predicted), torch.cat(true)])
        return {
            "error": float((both[0] - both[1]).abs().mean()),
            "r": float(torch.corrcoef(both)[0, 1]),
        }


def encode_timed(utterance: Utterance) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Phone ids, marks and seconds at natural speed (P,); 0 for the silence at both ends, which is
    not spoken.
    """
    ids, stress_tones = encode_phones(utterance.phones)
    seconds = torch.tensor([max(p.end - p.start, 0.01) * utterance.speed for p in utterance.phones])
    seconds[0] = seconds[-1] = 0.0
    return torch.from_numpy(ids), torch.from_numpy(stress_tones), seconds


@dataclass(frozen=True)
class WordOptions:
    """What spells words."""

    memory: Literal["trained", "off", "frozen", "shuffled"] = "trained"
    """Memory of letter groups: trained; or a control: off, frozen (random rows), shuffled (each
    word reads another's rows).
    """
    constant_gate: float | None = None
    """Control: this gate everywhere in place of the learned one."""
    cache: str = str(Path.home() / ".cache" / "avdiff" / "reader" / "aligned.json")
    """File that keeps the alignment of letters and phonemes, which takes three minutes."""


@dataclass(frozen=True)
class WordRecipe:
    """Everything that decides the training of the network that spells words."""

    data: WordOptions
    training: FitOptions


@dataclass(frozen=True)
class TimeOptions:
    """Whose lengths are learned."""

    bank: str | None = None
    """Folder of the speech bank; nothing means $AVDIFF_BANK, else the mini-bank."""


@dataclass(frozen=True)
class TimeRecipe:
    """Everything that decides the training of the duration predictor."""

    data: TimeOptions
    training: FitOptions


@dataclass(frozen=True)
class ShipOptions:
    """What becomes part of the package."""

    words: str
    """Folder of the trained network that spells words."""
    times: str
    """Folder of the trained duration predictor."""


@dataclass(frozen=True)
class ScoreOptions:
    """What is measured."""

    bank: str | None = None
    """Folder of the speech bank; nothing means $AVDIFF_BANK, else the mini-bank."""
    json: str | None = None
    """File for the numbers."""


def setup_words(recipe: WordRecipe) -> WordTask:
    """The task of the network that spells words; says how large it is."""
    o = recipe.data
    task = WordTask(
        load_spellings(Path(o.cache)), o.memory, recipe.training.seed, constant_gate=o.constant_gate
    )
    task.peak_lr = recipe.training.learning_rate
    network = sum(p.numel() for p in task.reader.parameters())
    print(
        f"network {network:,} parameters, memory {task.reader.memory.table.num_rows:,} rows, "
        f"{len(task.dataset):,} packs of {PACK} words"
    )
    return task


def setup_times(recipe: TimeRecipe) -> TimeTask:
    """The task of the duration predictor."""
    return TimeTask(SpeechCorpus(recipe.data.bank, decoded=True), recipe.training.seed)


def ship(options: ShipOptions) -> None:
    """Write both networks in half precision where the package loads them from."""
    Pronouncer.from_pretrained(options.words).half().save_pretrained(BUNDLED / "pronouncer")
    DurationPredictor.from_pretrained(options.times).half().save_pretrained(
        BUNDLED / "duration_predictor"
    )
    for file in BUNDLED.rglob("*.safetensors"):
        file.chmod(0o644)


def write_all_forms(options: TimeOptions) -> None:
    """Mine the training sentences; the older forms are out of the way meanwhile."""
    train = SpeechCorpus(options.bank, "train")
    networks = Networks.load()
    for language in MINED:
        forms = mine_forms(train, language, networks)
        write_forms(LEXICON / "forms", language, forms)
        print(f"{language}: {len(forms)} forms")


def score(options: ScoreOptions) -> dict[str, Any]:
    """The numbers of the model card: words held out, sentences of the bank's test split, lengths,
    speed.
    """
    networks = Networks.load()
    held_out = [(w, x) for x in SPELT for w in load_lexicon(x).words if fold(w, x) == "test"]
    right: dict[str, list[bool]] = defaultdict(list)
    alone: dict[str, list[bool]] = defaultdict(list)
    began = time.process_time()
    for language in SPELT:
        words = [w for w, x in held_out if x == language]
        others = {
            w: p for w, p in load_lexicon(language).words.items() if fold(w, language) == "train"
        }
        for word, phonemes in zip(words, networks.spell(words, language), strict=True):
            alone[language].append(
                phonemes == (load_lexicon(language).find(word) or "").replace(" ", "")
            )
            phonemes = (english_plural(word, others) if language == "en" else None) or phonemes
            right[language].append(
                phonemes == (load_lexicon(language).find(word) or "").replace(" ", "")
            )
    speed = len(held_out) / (time.process_time() - began)
    bank = SpeechCorpus(options.bank)
    errors = [
        reading_error(read(u.text, u.lang, networks=networks), u) for u in bank if u.split == "test"
    ]
    result = {
        "held_out_words": {x: round(100 * sum(r) / len(r), 2) for x, r in right.items()},
        "by_the_network_alone": {x: round(100 * sum(r) / len(r), 2) for x, r in alone.items()},
        "words_per_cpu_second": round(speed),
        "sentences": sentence_scores(bank, networks),
        "length_error": {
            "mean": sum(errors) / len(errors),
            "absolute": sum(map(abs, errors)) / len(errors),
        },
    }
    print(json.dumps(result, indent=1))
    if options.json:
        write_text(options.json, json.dumps(result, indent=1))
    return result


def main(argv: Sequence[str] | None = None) -> FitSummary | dict[str, Any] | None:
    """Command line of the pronouncer and the duration predictor.

    words [RECIPE.toml] --output_dir DIR [--option value]...    train the pronouncer
    times [RECIPE.toml] --output_dir DIR [--option value]...    train the duration predictor
    ship --words RUN --times RUN     put both into the package, in half precision
    forms [--bank BANK]              forms that words take in sentences
    score [--bank BANK] [--json OUT] errors on held-out words and sentences

    words --help and times --help tell every option.
    """
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    about = str(main.__doc__)
    if command == "words":
        return run_training(WordRecipe, setup_words, _with_recipe("pronouncer.toml", rest), about)
    if command == "times":
        words = _with_recipe("duration_predictor.toml", rest)
        return run_training(TimeRecipe, setup_times, words, about)
    if command == "ship":
        ship(load_options(ShipOptions, None, rest))
    elif command == "forms":
        write_all_forms(load_options(TimeOptions, None, rest))
    elif command == "score":
        return score(load_options(ScoreOptions, None, rest))
    elif command in ("-h", "--help"):
        print(about)
    else:
        raise ValueError(f"command {command!r}: needs words, times, ship, forms or score")
    return None


def _with_recipe(name: str, words: Sequence[str]) -> list[str]:
    """The words with this recipe in front, unless they name one themselves."""
    named = bool(words) and not words[0].startswith("-")
    return list(words) if named or "--help" in words else [name, *words]


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
