"""The reader's two networks as they are used: loaded once, words in batches, answers remembered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from unicodedata import combining, normalize

import numpy as np

from avdiff.files import BUNDLED
from avdiff.g2p.lexicon import LANGUAGES
from avdiff.phonetics.phone import phone_id

if TYPE_CHECKING:
    from avdiff.models.g2p.networks import DurationPredictor, Pronouncer

FOLDER = BUNDLED / "g2p"
BATCH = 128  # words read at once
LONGEST = 40  # letters; longer strings are no words and are read in parts
KEPT = 50_000  # remembered words


@dataclass
class Networks:
    """Letters -> phonemes and phones -> seconds; CPU, fp32.

    Args:
        words, times: the networks. memory: use the Engram memory (False: the rules alone, for
            experiments).
    """

    words: Pronouncer
    times: DurationPredictor
    memory: bool = True
    _known: dict[tuple[str, str], str] = field(default_factory=dict, repr=False)

    @classmethod
    def load(
        cls, folder: Path = FOLDER, words: Path | None = None, times: Path | None = None
    ) -> Networks:
        """Load `folder`/words and `folder`/times, or the two folders given."""
        import torch

        from avdiff.models.g2p.networks import DurationPredictor, Pronouncer

        reader = Pronouncer.from_pretrained(
            words or folder / "pronouncer", torch_dtype=torch.float32
        )
        timer = DurationPredictor.from_pretrained(
            times or folder / "duration_predictor", torch_dtype=torch.float32
        )
        return cls(reader.eval(), timer.eval())

    def spell(self, words: Sequence[str], language: str) -> list[str]:
        """Phonemes of words that no lexicon holds."""
        wanted = sorted(
            {w for w in words if (language, w) not in self._known}, key=lambda w: (len(w), w)
        )
        if len(self._known) + len(wanted) > KEPT:
            self._known.clear()
            wanted = sorted(set(words), key=lambda w: (len(w), w))
        parts = [
            [self._letters(w[i : i + LONGEST]) for i in range(0, len(w), LONGEST)] for w in wanted
        ]
        flat = [p for ps in parts for p in ps]
        read = [
            p
            for i in range(0, len(flat), BATCH)
            for p in self.words.pronounce(
                flat[i : i + BATCH], [language] * len(flat[i : i + BATCH]), self.memory
            )
        ]
        for word, ps in zip(wanted, parts, strict=True):
            self._known[language, word] = "".join(read[: len(ps)])
            read = read[len(ps) :]
        return [self._known[language, w] for w in words]

    def _letters(self, word: str) -> str:
        """Lower case; a letter that was never trained loses its accents, or goes."""
        known = self.words.letter_ids
        out = ""
        for letter in word.lower():
            bare = "".join(c for c in normalize("NFKD", letter) if not combining(c))
            out += letter if letter in known else "".join(c for c in bare if c in known)
        return out

    def seconds(self, phones: Sequence[tuple[str, int]], language: str) -> np.ndarray:
        """Length of each (symbol, mark) at natural speed, silence at both ends included: (P,)
        seconds.
        """
        import torch

        ids = torch.tensor([[phone_id(symbol) for symbol, _ in phones]])
        stress_tones = torch.tensor([[mark for _, mark in phones]])
        with torch.no_grad():
            log = self.times(ids, stress_tones, torch.tensor([LANGUAGES.index(language)]))
        return log[0].exp().double().clamp(0.02, 1.0).numpy()


@cache
def default_networks() -> Networks:
    """The weights that ship with the package."""
    return Networks.load()
