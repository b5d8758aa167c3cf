"""Does the reader's memory hold what no rule explains? Equal training with and without it, look-up
off, seen words.

    python -m avdiff.train.g2p.memory_proof --json OUT [--steps 600 --words 8000 --seeds 3]

Arms, all with the same words, order, steps and network: the trained table; no memory; random rows
that never learn; each word reading another word's rows; the trained table behind a constant gate;
and a side path of the same cost in place of the memory. Measured on the irregular words of the
training set: those with a chunk that its letter, seen between its two neighbours, yields in at most
one word of ten. The regular words stand beside them as a control.
"""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from avdiff.core.engram import MemoryRead
from avdiff.train.g2p.train_g2p import Spelling, WordTask, fold, load_spellings, word_scores
from avdiff.train.loop.fit import FitOptions, fit

ARMS = ("trained", "off", "frozen", "shuffled", "constant gate", "side path")
# share of a context's words, and how many words make a context one
UNCOMMON = 0.1
ENOUGH = 10


class SidePath(nn.Module):
    """D -> width -> D in the memory's place: letters (B, T, D) -> what is added to them."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(dim, width, bias=False)
        self.widen = nn.Linear(width, dim, bias=False)
        nn.init.zeros_(self.widen.weight)  # starts as nothing, like the memory

    def forward(self, x: torch.Tensor, read: MemoryRead) -> torch.Tensor:
        """`read` is not looked at."""
        return self.widen(nn.functional.silu(self.squeeze(x)))


class ProofTask(WordTask):
    """`WordTask` under one of `ARMS`."""

    def __init__(self, spellings: Sequence[Spelling], arm: str, seed: int) -> None:
        gate = {"constant_gate": 0.5} if arm == "constant gate" else {}
        memory = {"constant gate": "trained", "side path": "off"}.get(arm, arm)
        super().__init__(spellings, memory, seed, **gate)
        self.side = arm == "side path"
        if self.side:
            reader = self.reader
            # The memory projects its rows (72 values) to key and value, D each: as many products as
            # D -> 72 -> D.
            width = reader.memory.to_k.in_features
            reader.memory = SidePath(reader.letter.embedding_dim, width)
        self.held_out = []

    def read(self, letters: torch.Tensor, languages: torch.Tensor) -> MemoryRead | None:
        """The side path needs no rows."""
        if self.side:
            nothing = torch.zeros(len(letters), 1, 1)
            return MemoryRead(nothing, nothing)
        return super().read(letters, languages)

    def validate(self) -> dict[str, float]:
        """Nothing during the run."""
        return {}


def irregular(spellings: Sequence[Spelling]) -> set[tuple[str, str]]:
    """(word, language) of the words with an uncommon chunk in its context."""

    def contexts(s: Spelling) -> Iterable[tuple[str, ...]]:
        framed = f"^{s.word}$"
        return ((s.language, framed[i : i + 3]) for i in range(len(s.word)))

    seen: Counter[Any] = Counter()
    for s in spellings:
        for context, chunk in zip(contexts(s), s.chunks or (), strict=False):
            seen[context] += 1
            seen[context, chunk] += 1
    return {
        (s.word, s.language)
        for s in spellings
        if any(
            seen[c] >= ENOUGH and seen[c, chunk] <= UNCOMMON * seen[c]
            for c, chunk in zip(contexts(s), s.chunks or (), strict=False)
        )
    }


def chosen(spellings: Sequence[Spelling], count: int) -> list[Spelling]:
    """`count` training words of English and French, half each, the same ones whatever the seed."""
    kept = []
    for language in ("en", "fr"):
        words = [
            s
            for s in spellings
            if s.language == language and s.chunks and fold(s.word, language) == "train"
        ]
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        kept += [words[i] for i in order[: count // 2]]
    return kept


def prove(cache: Path, count: int, steps: int, seeds: int) -> dict[str, Any]:
    """Exactly right words in per cent by arm, seed and kind; and the trained table's lead with its
    95 % interval.
    """
    words = chosen(load_spellings(cache), count)
    odd = irregular(words)
    parts = {
        kind: [s for s in words if ((s.word, s.language) in odd) == (kind == "irregular")]
        for kind in ("irregular", "regular")
    }
    print({kind: len(part) for kind, part in parts.items()})
    scores: dict[str, dict[str, list[float]]] = {arm: {} for arm in ARMS}
    for seed in range(seeds):
        for arm in ARMS:
            task = ProofTask(words, arm, seed)
            with TemporaryDirectory() as folder:
                fit(
                    task,
                    FitOptions(
                        folder,
                        max_train_steps=steps,
                        train_batch_size=8,
                        learning_rate=2e-3,
                        seed=seed,
                        lr_warmup_steps=steps // 20,
                        mixed_precision="auto",
                        validation_steps=0,
                        checkpointing_steps=0,
                        log_every=steps,
                    ),
                )
            task.reader.eval()
            for kind, part in parts.items():
                stress_tones = word_scores(task, part)
                for language in ("en", "fr"):
                    scores[arm].setdefault(f"{kind} {language}", []).append(stress_tones[language])
            print(
                f"seed {seed} {arm}: "
                + ", ".join(f"{k} {v[-1]:.1f}" for k, v in scores[arm].items()),
                flush=True,
            )
    return {
        "words": {kind: len(part) for kind, part in parts.items()},
        "steps": steps,
        "scores": scores,
        "lead of the trained table": {
            arm: leads(scores["trained"], scores[arm]) for arm in ARMS[1:]
        },
    }


def leads(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> dict[str, list[float]]:
    """Paired difference over seeds in points: [mean, low, high] of Student's 95 % interval."""
    student = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776}
    result = {}
    for kind, values in ours.items():
        gaps = torch.tensor(values, dtype=torch.float64) - torch.tensor(
            theirs[kind], dtype=torch.float64
        )
        half = (
            student.get(len(gaps), 1.96) * float(gaps.std()) / len(gaps) ** 0.5
            if len(gaps) > 1
            else float("nan")
        )
        result[kind] = [round(float(gaps.mean()) + side * half, 2) for side in (0, -1, 1)]
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "avdiff" / "reader" / "aligned.json"
    )
    parser.add_argument(
        "--words", type=int, default=8000, help="training words, half English, half French"
    )
    parser.add_argument("--steps", type=int, default=600, help="of 128 words each")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    found = prove(options.cache, options.words, options.steps, options.seeds)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        temporary_path = options.json.with_name(f".{options.json.name}.{os.getpid()}")
        temporary_path.write_text(text)
        os.replace(temporary_path, options.json)


if __name__ == "__main__":
    main()
