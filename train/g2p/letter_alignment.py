"""Which letter makes which sound: monotonic alignment of spelt words with their phonemes, by hard
EM.

Every letter gets a chunk of zero to three phoneme units; a unit is a phone with its marks. As in
many-to-many aligners (Jiampojamarn et al. 2007), with one letter at a time.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

MOST = 3  # units in a chunk: "use" starts with j u: on one letter, "x" is k s
BAND = 5  # units by which an alignment may leave the diagonal
UNITS = re.compile(r"[ˈˌ]*[^ˈˌ][ːʰʲ\u0303\u0329\u032aᵝ→↗↓↘.]*")
Pair = tuple[str, str]


def align_words(pairs: Sequence[Pair], rounds: int = 5) -> list[list[str] | None]:
    """For each (word, phonemes) a chunk per letter; None where there are more units than letters
    can hold.
    """
    units = [UNITS.findall(phonemes) for _, phonemes in pairs]
    costs = _first_costs(pairs, units)
    aligned: list[list[str] | None] = []
    for _ in range(rounds):
        aligned = [_best(word, us, costs) for (word, _), us in zip(pairs, units, strict=True)]
        costs = _costs(pairs, aligned)
    return aligned


class _Costs:
    """-log p(chunk | letter), with a price for pairs not seen that grows with the chunk."""

    def __init__(self, counts: dict[str, Counter[str]]) -> None:
        self.seen = {}
        for letter, chunks in counts.items():
            total = sum(chunks.values()) + 5
            self.seen[letter] = {chunk: -math.log(n / total) for chunk, n in chunks.items()}

    def __call__(self, letter: str, chunk: str, length: int) -> float:
        known = self.seen.get(letter)
        if known is not None and chunk in known:
            return known[chunk]
        return 9.0 + 3.0 * abs(length - 1)


def _first_costs(pairs: Sequence[Pair], units: Sequence[list[str]]) -> _Costs:
    """Words with as many letters as units are nearly always aligned one to one."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (word, _), us in zip(pairs, units, strict=True):
        if len(word) == len(us):
            for letter, unit in zip(word, us, strict=True):
                counts[letter][unit] += 1
    return _Costs(
        {
            letter: Counter({c: n for c, n in chunks.items() if n > 1})
            for letter, chunks in counts.items()
        }
    )


def _costs(pairs: Sequence[Pair], aligned: Sequence[list[str] | None]) -> _Costs:
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for (word, _), chunks in zip(pairs, aligned, strict=True):
        for letter, chunk in zip(word, chunks or (), strict=False):
            counts[letter][chunk] += 1
    return _Costs(counts)


def _best(word: str, units: list[str], cost: _Costs) -> list[str] | None:
    """Cheapest alignment by dynamic programming over (letters, units) used."""
    n = len(word)
    m = len(units)
    if m > MOST * n or n == 0:
        return None
    slope = m / n
    reach: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for i, letter in enumerate(word, 1):
        after: dict[int, tuple[float, tuple[int, ...]]] = {}
        low = i * slope - BAND
        high = i * slope + BAND
        for j, (price, path) in reach.items():
            for k in range(MOST + 1):
                end = j + k
                if end > m:
                    break
                if not low <= end <= high:
                    continue
                total = price + cost(letter, "".join(units[j:end]), k)
                if end not in after or total < after[end][0]:
                    after[end] = (total, (*path, end))
        reach = after
    if m not in reach:
        return None
    ends = (0, *reach[m][1])
    return ["".join(units[a:b]) for a, b in pairwise(ends)]
