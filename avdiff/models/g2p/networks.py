"""Two small networks that pronounce: letters -> phonemes, and phones -> seconds.

Letters and phonemes of a word are aligned beforehand (`avdiff.train.g2p.letter_alignment`): each
letter yields a chunk of zero to a few phoneme symbols. The network reads all letters at once, then
names the chunks from left to right, each in the light of the last, so that a word gets one main
stress. An Engram memory over letter n-grams of each language keeps spellings that no rule explains.

Shape legend: B words, T letters, P phones, D width, K chunks of the inventory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from avdiff.core.attention import Attention
from avdiff.core.engram import Engram, MemoryRead, NgramHash
from avdiff.core.modulation import rms_norm
from avdiff.models.phoneme_encoder import ConvBlock

# letter ids; chunk 0 is the empty chunk and also the one before the first
PAD = 0
UNKNOWN = 1


class LetterBlock(ConvBlock):
    """The same block with its short depthwise convolution as shifted products: on CPU three times
    as fast to train.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, D) -> (B, T, D)."""
        kernel = self.depthwise.weight[:, 0].to(x.dtype)  # (D, 5)
        reach = kernel.shape[1] // 2
        wide = F.pad(x, (0, 0, reach, reach))
        assert self.depthwise.bias is not None
        h: torch.Tensor = self.depthwise.bias
        for k in range(kernel.shape[1]):
            h = h + wide[:, k : k + x.shape[1]] * kernel[:, k]
        h = rms_norm(h.to(x.dtype))
        return x + self.contract(F.gelu(self.expand(h)))


def drop(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Dropout of whole channels of a word: (B, T, D), one draw for all letters."""
    return F.dropout1d(x.transpose(1, 2), rate, training).transpose(1, 2) if training else x


class Pronouncer(ModelMixin, ConfigMixin):
    """Spelt words -> phonemes.

    Args:
        languages: codes; the place is the id. letters: every letter known. chunks: every chunk, the
            first one "".
        dim, num_blocks: width D and convolution blocks. chunk_dim: width of a chunk's vector, for
            input and output.
        table_size, memory_heads, memory_dim, max_order: the memory; orders 2..max_order, ending one
            letter ahead.
        constant_gate: gate of the memory, None for the learned one (a control for experiments).
    """

    @register_to_config
    def __init__(
        self,
        languages: Sequence[str] = ("en",),
        letters: str = "ab",
        chunks: Sequence[str] = ("", "a", "b"),
        dim: int = 128,
        num_blocks: int = 4,
        chunk_dim: int = 64,
        table_size: int = 12000,
        memory_heads: int = 2,
        memory_dim: int = 12,
        max_order: int = 4,
        constant_gate: float | None = None,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.letter_ids = {letter: i + 2 for i, letter in enumerate(letters)}
        self.stride = len(letters) + 2  # keys of the memory: one set of letters for each language
        self.letter = nn.Embedding(self.stride, dim)
        self.language = nn.Embedding(len(languages), dim)
        hashing = NgramHash(self.stride * len(languages), table_size, max_order, memory_heads)
        self.memory = Engram(dim, hashing, memory_dim, constant_gate=constant_gate)
        self.blocks = nn.ModuleList(LetterBlock(dim) for _ in range(num_blocks))
        self.attention = Attention(dim, heads=4, dim_head=dim // 4)
        self.chunk = nn.Embedding(len(chunks), chunk_dim)
        self.decoder = nn.GRU(dim + chunk_dim, dim, batch_first=True)
        self.to_chunk = nn.Linear(2 * dim, chunk_dim)
        self.bias = nn.Parameter(torch.zeros(len(chunks)))
        self.dropout = dropout
        nn.init.normal_(self.chunk.weight, std=chunk_dim**-0.5)
        nn.init.normal_(self.letter.weight, std=0.5)

    def encode_words(
        self, words: Sequence[str], languages: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Spelt words and their languages -> letters (B, T) and language ids (B,)."""
        known = self.letter_ids
        rows = [torch.tensor([known.get(c, UNKNOWN) for c in word] or [UNKNOWN]) for word in words]
        codes = list(self.config.languages)
        letters = pad_sequence(rows, batch_first=True, padding_value=PAD)
        return letters, torch.tensor([codes.index(x) for x in languages])

    def read_memory(self, letters: torch.Tensor, languages: torch.Tensor) -> MemoryRead:
        """Look the letter n-grams up: read (B, T, D), where place t knows the letters up to t +
        1.
        """
        keys = torch.where(letters == PAD, PAD, letters + self.stride * languages[:, None])
        ahead = (torch.arange(letters.shape[1], device=letters.device) + 1).clamp(
            max=letters.shape[1] - 1
        )
        ends = (letters != PAD).sum(1, keepdim=True) - 1
        return self.memory.lookup(keys).at(torch.minimum(ahead[None], ends))

    def encode(
        self, letters: torch.Tensor, languages: torch.Tensor, read: MemoryRead | None
    ) -> torch.Tensor:
        """Letters (B, T), languages (B,), memory or None for no memory -> features (B, T, D)."""
        mask = (letters != PAD)[..., None]
        x = (self.letter(letters) + self.language(languages)[:, None]) * mask
        x = self.blocks[0](x) * mask
        if read is not None:
            x = (
                x + self.memory(x, read)
            ) * mask  # beyond a word's end there is nothing to remember
        for block in self.blocks[1:-1]:
            x = block(drop(x, self.dropout, self.training)) * mask
        x = x + self.attention(rms_norm(x), attention_mask=mask[:, None, None, :, 0])
        return self.blocks[-1](x * mask) * mask

    def forward(
        self,
        letters: torch.Tensor,
        languages: torch.Tensor,
        chunks: torch.Tensor,
        read: MemoryRead | None,
    ) -> torch.Tensor:
        """Teacher-forced logits (B, T, K) for the right chunks (B, T)."""
        x = drop(self.encode(letters, languages, read), self.dropout, self.training)
        before = F.pad(self.chunk(chunks[:, :-1]), (0, 0, 1, 0))
        state, _ = self.decoder(
            torch.cat([x, drop(before, 2 * self.dropout, self.training).to(x.dtype)], dim=-1)
        )
        return self._logits(state, x)

    @torch.no_grad()
    def spell(
        self, letters: torch.Tensor, languages: torch.Tensor, read: MemoryRead | None
    ) -> torch.Tensor:
        """The likeliest chunk of each letter, one after the other: (B, T)."""
        x = self.encode(letters, languages, read)
        state = None
        last = torch.zeros(len(x), 1, self.chunk.embedding_dim, dtype=x.dtype)
        out = []
        for t in range(x.shape[1]):
            h, state = self.decoder(torch.cat([x[:, t : t + 1], last.to(x.dtype)], dim=-1), state)
            out.append(self._logits(h, x[:, t : t + 1]).argmax(-1))
            last = self.chunk(out[-1])
        return torch.cat(out, dim=1)

    def pronounce(
        self, words: Sequence[str], languages: Sequence[str], use_memory: bool = True
    ) -> list[str]:
        """Spelt words -> phonemes with marks; words of like length are best read together."""
        letters, codes = self.encode_words(words, languages)
        read = self.read_memory(letters, codes) if use_memory else None
        inventory = self.config.chunks
        return [
            "".join(inventory[c] for c in row[: len(word)])
            for row, word in zip(self.spell(letters, codes, read).tolist(), words, strict=True)
        ]

    def _logits(self, state: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.to_chunk(torch.cat([state, x], dim=-1)), self.chunk.weight, self.bias)


class DurationPredictor(ModelMixin, ConfigMixin):
    """How long each phone of a sentence lasts at natural speed.

    Args:
        num_phones, num_stress_tones, num_languages: inventory sizes. dim, num_blocks: width and
            convolution blocks.
    """

    @register_to_config
    def __init__(
        self,
        num_phones: int = 128,
        num_stress_tones: int = 7,
        num_languages: int = 8,
        dim: int = 64,
        num_blocks: int = 3,
    ) -> None:
        super().__init__()
        self.phone = nn.Embedding(num_phones + 1, dim)  # the last is padding
        self.mark = nn.Embedding(num_stress_tones, dim)
        self.language = nn.Embedding(num_languages, dim)
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(num_blocks))
        self.to_log = nn.Linear(dim, 1)
        nn.init.constant_(self.to_log.bias, -2.5)  # 80 ms

    def forward(
        self, phones: torch.Tensor, stress_tones: torch.Tensor, languages: torch.Tensor
    ) -> torch.Tensor:
        """Phone ids (B, P) with padding `num_phones`, marks (B, P), languages (B,) -> log seconds
        (B, P).
        """
        mask = (phones != self.config.num_phones)[..., None]
        x = self.phone(phones) + self.mark(stress_tones) + self.language(languages)[:, None]
        for block in self.blocks:
            x = block(x * mask)
        return self.to_log(x)[..., 0]
