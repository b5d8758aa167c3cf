"""Cut a small bank out of a large one: `python -m avdiff.corpus.speech.subset BANK samples/bank`.

The choice depends only on the ids and texts of the large bank, so the same bank always gives the
same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

from avdiff.corpus.speech.read import LANGUAGES, SpeechCorpus, Utterance

QUOTAS = {"train": 38, "val": 4, "test": 5, "test_voices": 3}  # utterances a language
DIGIT_QUOTAS = {"train": 10, "val": 2, "test": 4}  # extra English digit strings
VOICES_A_LANGUAGE = 4  # few voices with many sentences each: clips join sentences of one voice
MAX_SECONDS = 2.6
DIGITS = frozenset(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "oh"]
)


def build_minibank(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> int:
    """Copy a deterministic choice of utterances, one shard a language -> number of utterances
    copied.

    Args:
        source: folder of the large bank. target: folder to write (made if missing).

    Raises:
        ValueError: `source` is no bank.
    """
    bank = SpeechCorpus(source)
    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for language in LANGUAGES:
        chosen = sorted(_choose([u for u in bank if u.lang == language]), key=lambda u: u.id)
        _write_shard(bank, chosen, folder / f"{language}-000.tar")
        count += len(chosen)
    return count


def _order(utterance: Utterance) -> str:
    """A shuffle that needs no generator: the hash of the id."""
    return hashlib.sha256(utterance.id.encode()).hexdigest()


def _choose(utterances: list[Utterance]) -> list[Utterance]:
    """Short sentences of the commonest voices by `QUOTAS`; English gets digit strings too."""
    short = sorted((u for u in utterances if u.duration <= MAX_SECONDS), key=_order)
    chosen: dict[str, Utterance] = {}
    for split, quota in QUOTAS.items():
        members = [u for u in short if u.split == split]
        voices = _common_voices(short if split in ("val", "test") else members)
        per_voice: dict[str, int] = defaultdict(int)
        members.sort(
            key=lambda u: u.voice not in voices
        )  # stable: the shuffle stays within each half
        limit = -(-quota // len(voices))
        for utterance in members:
            if quota and per_voice[utterance.voice] < limit and utterance.id not in chosen:
                chosen[utterance.id] = utterance
                per_voice[utterance.voice] += 1
                quota -= 1
    for split, quota in DIGIT_QUOTAS.items():
        digits = [
            u for u in short if u.split == split and u.id not in chosen and is_digit_string(u)
        ]
        chosen.update((u.id, u) for u in digits[:quota])
    return list(chosen.values())


def is_digit_string(utterance: Utterance) -> bool:
    """Whether an utterance is English digits and nothing else."""
    return utterance.lang == "en" and set(utterance.text.split()) <= DIGITS


def _common_voices(utterances: Iterable[Utterance]) -> list[str]:
    """The commonest voices, half of them of each gender where the language has both."""
    counts = Counter((u.gender, u.voice) for u in utterances if u.split != "test_voices")
    counts = counts or Counter((u.gender, u.voice) for u in utterances)
    voices: list[str] = []
    for gender in ("female", "male"):
        ranked = sorted(
            (key for key in counts if key[0] == gender), key=lambda key: (-counts[key], key[1])
        )
        voices += [voice for _, voice in ranked[: VOICES_A_LANGUAGE // 2]]
    return voices


def _write_shard(bank: SpeechCorpus, utterances: list[Utterance], path: Path) -> None:
    """Write audio and record of each utterance; no times or owners, so the bytes depend on the
    content only.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for utterance in utterances:
            record = json.dumps(
                bank.record(utterance), ensure_ascii=False, separators=(",", ":")
            ).encode()
            for kind, data in (("opus", bank.raw(utterance)), ("json", record)):
                member = tarfile.TarInfo(f"{utterance.id}.{kind}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    temporary_path = path.with_suffix(".tmp")
    temporary_path.write_bytes(buffer.getvalue())
    os.replace(temporary_path, path)


def main() -> None:
    """Command line: source and target folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder of the large bank")
    parser.add_argument("target", help="folder to write")
    options = parser.parse_args()
    print(
        f"{build_minibank(options.source, options.target)} utterances written to {options.target}"
    )


if __name__ == "__main__":
    main()
