"""The speech bank: short utterances with phoneme times in WebDataset-style tar shards, read at
random.

A shard holds pairs `<id>.opus` (Ogg Opus, 24 kHz mono) and `<id>.json` (id, lang, voice, gender,
speed, text, phonemes, starts, ends, duration, sample_rate, split). Shards are walked once; each
clip is then read by its offset. Training that reads the bank often can decode it once into one
memory-mapped int16 file (`decoded=True`).
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from avdiff.phonetics.phone import Phone
from avdiff.phonetics.tokens import Tokens, merge_tokens

SAMPLE_RATE = 24000
LANGUAGES = ("en", "es", "fr", "hi", "it", "ja", "pt", "zh")
SPLITS = ("train", "val", "test", "test_voices")
INT16 = 32767.0
# Seconds to add to a language's phone times, to fit them to the sound (regression of log spectra on
# phone labels, mean over its voices; `python -m avdiff.evaluation.corpus_report` measures what is
# left).
ZERO = {
    "en": -0.007,
    "es": -0.006,
    "fr": -0.008,
    "hi": -0.009,
    "it": -0.007,
    "ja": -0.009,
    "pt": -0.006,
    "zh": 0.001,
}
REPO_BANK = Path(__file__).parents[3] / "samples" / "bank"


@dataclass(frozen=True)
class Utterance:
    """One sentence by one voice.

    `voice` names a speaker or a weighted mean of speakers; `gender` is "female" or "male"; `speed`
    is relative to the voice's own; `duration` is in seconds; `split` is one of `SPLITS`. `phones`
    tile [0, duration] without gaps, silence included (see `avdiff.phonetics.tokens.merge_tokens`).
    """

    id: str
    lang: str
    voice: str
    gender: str
    speed: float
    text: str
    duration: float
    split: str
    tokens: Tokens = field(repr=False)
    bank: SpeechCorpus = field(repr=False, compare=False)

    @cached_property
    def phones(self) -> tuple[Phone, ...]:
        """Phones with marks merged and pauses, found in the audio, as silence phones."""
        return merge_tokens(
            self.tokens, self.bank.audio(self), SAMPLE_RATE, ZERO.get(self.lang, 0.0)
        )


@dataclass(frozen=True)
class _Place:
    """Where the bytes of one audio file are: shard number, offset and size."""

    shard: int
    offset: int
    size: int


class SpeechCorpus:
    """Random access to a speech bank.

    Args:
        root: folder with the `*.tar` shards. None: the variable AVDIFF_BANK, else the repository's
            mini-bank.
        split: one of `SPLITS`, or None for every utterance.
        languages: codes to keep, such as ["en", "ja"]; None keeps all.
        decoded: read from (and once make) a decoded copy in `cache_dir`: 2.9 MB a minute, no
            decoding later.
        cache_dir: folder of decoded copies; default ~/.cache/avdiff/bank.

    Raises:
        ValueError: no shards there, an unknown split, or a language that the bank does not hold.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | None = None,
        split: str | None = None,
        languages: list[str] | tuple[str, ...] | None = None,
        decoded: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.root = find_bank(root)
        if split is not None and split not in SPLITS:
            raise ValueError(f"split={split!r}: needs one of {', '.join(SPLITS)}, or None for all")
        self.shards = sorted(self.root.glob("*.tar"))
        if not self.shards:
            raise ValueError(f"root={str(root)!r}: no *.tar shards of a speech bank in {self.root}")
        self._files: dict[int, Any] = {}
        self._memory: np.memmap | None = None
        self._data: Path | None = None
        records, self._places, self.fingerprint = _index(self.shards)
        held = sorted({record["lang"] for record in records})
        for language in languages or ():
            if language not in held:
                raise ValueError(
                    f"languages={list(languages or ())}: this bank has no {language!r}, only "
                    f"{', '.join(held)}"
                )
        keep = set(languages or held)
        self.utterances = [
            self._utterance(r)
            for r in records
            if r["lang"] in keep and (split is None or r["split"] == split)
        ]
        self._by_id = {utterance.id: utterance for utterance in self.utterances}
        self._starts: dict[str, tuple[int, int]] = {}
        if decoded:
            self._open_decoded(
                records, Path(cache_dir or Path.home() / ".cache" / "avdiff" / "bank")
            )

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    def __getitem__(self, key: int | str) -> Utterance:
        """By position, or by id."""
        return self._by_id[key] if isinstance(key, str) else self.utterances[key]

    def audio(self, utterance: Utterance | str) -> np.ndarray:
        """Samples (S,) float32 in [-1, 1] at 24 kHz, on the int16 grid: the same with and without
        the decoded copy.
        """
        key = utterance if isinstance(utterance, str) else utterance.id
        if self._data is not None:
            if self._memory is None:
                self._memory = np.memmap(self._data, dtype=np.int16, mode="r")
            first, count = self._starts[key]
            samples = np.asarray(self._memory[first : first + count])
        else:
            samples = self._decode(key)
        return samples.astype(np.float32) / np.float32(INT16)

    def raw(self, utterance: Utterance | str) -> bytes:
        """The Ogg Opus file of an utterance, as it lies in the shard."""
        place = self._places[utterance if isinstance(utterance, str) else utterance.id]
        handle = self._files.get(place.shard)
        if handle is None:
            handle = self._files[place.shard] = open(self.shards[place.shard], "rb")  # noqa: SIM115 - kept open
        # pread leaves no file position behind, so threads and forked workers may share the
        # descriptor
        return os.pread(handle.fileno(), place.size, place.offset)

    @staticmethod
    def record(utterance: Utterance) -> dict[str, Any]:
        """The json record of an utterance, as it lies in the shard."""
        plain = {
            name: getattr(utterance, name)
            for name in ("id", "lang", "voice", "gender", "speed", "text")
        }
        tokens = {
            "phonemes": list(utterance.tokens.symbols),
            "starts": list(utterance.tokens.starts),
            "ends": list(utterance.tokens.ends),
        }
        return {
            **plain,
            **tokens,
            "duration": utterance.duration,
            "sample_rate": SAMPLE_RATE,
            "split": utterance.split,
        }

    def _decode(self, key: str) -> np.ndarray:
        """Decode one Ogg Opus file to (S,) int16 at 24 kHz."""
        samples, rate = soundfile.read(io.BytesIO(self.raw(key)), dtype="float32", always_2d=True)
        mono = samples.mean(axis=1)
        if rate != SAMPLE_RATE:
            from scipy.signal import resample_poly

            mono = resample_poly(mono, SAMPLE_RATE, rate)
        return np.round(np.clip(mono, -1.0, 1.0) * INT16).astype(np.int16)

    def _utterance(self, record: dict[str, Any]) -> Utterance:
        tokens = Tokens(tuple(record["phonemes"]), tuple(record["starts"]), tuple(record["ends"]))
        plain = {name: record[name] for name in ("id", "lang", "voice", "gender", "text", "split")}
        return Utterance(
            **plain,
            speed=float(record["speed"]),
            duration=float(record["duration"]),
            tokens=tokens,
            bank=self,
        )

    def _open_decoded(self, records: list[dict[str, Any]], folder: Path) -> None:
        """Map the decoded copy, making it first when it is missing (atomic: written aside, then
        renamed).
        """
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / f"{self.fingerprint}.i16"
        table = folder / f"{self.fingerprint}.json"
        if not table.is_file() or not data.is_file():
            temporary_path = folder / f".{self.fingerprint}.{os.getpid()}"
            first = 0
            starts = {}
            with open(temporary_path, "wb") as out:
                for record in records:
                    samples = self._decode(record["id"])
                    out.write(samples.tobytes())
                    starts[record["id"]] = (first, len(samples))
                    first += len(samples)
            os.replace(temporary_path, data)
            temporary_path.write_text(json.dumps(starts))
            os.replace(temporary_path, table)  # written last: the table vouches for the data
        self._starts = {
            key: (first, count) for key, (first, count) in json.loads(table.read_text()).items()
        }
        self._data = data

    def __getstate__(self) -> dict[str, Any]:
        """Open files do not travel to worker processes."""
        state = self.__dict__.copy()
        state["_files"], state["_memory"] = {}, None
        return state


def normalised_text(text: str) -> str:
    """Without punctuation, symbols and case: two texts that sound alike are alike."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(
        "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in plain).split()
    )


def find_bank(root: str | os.PathLike[str] | None = None) -> Path:
    """The bank's folder: `root`, else $AVDIFF_BANK, else the repository's mini-bank.

    Raises:
        ValueError: the folder does not exist.
    """
    path = Path(root or os.environ.get("AVDIFF_BANK") or REPO_BANK)
    if not path.is_dir():
        raise ValueError(f"bank folder {path}: not found; give a folder, or set AVDIFF_BANK")
    return path


def _index(shards: list[Path]) -> tuple[list[dict[str, Any]], dict[str, _Place], str]:
    """Walk the shards once -> records sorted by id, place of each audio file, fingerprint of the
    whole.
    """
    records: list[dict[str, Any]] = []
    places: dict[str, _Place] = {}
    digest = hashlib.sha256()
    for number, path in enumerate(shards):
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                stem, _, kind = member.name.rpartition(".")
                digest.update(f"{member.name} {member.size} {member.chksum}".encode())
                if kind == "opus":
                    places[stem] = _Place(number, member.offset_data, member.size)
                elif kind == "json":
                    raw.seek(member.offset_data)
                    text = raw.read(member.size)
                    digest.update(text)
                    records.append(json.loads(text))
    records = sorted((r for r in records if r["id"] in places), key=lambda r: r["id"])
    return records, places, digest.hexdigest()[:16]
