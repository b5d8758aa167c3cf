"""Engram: a memory that is looked up by n-grams and let in by a gate (Cheng et al. 2026,
"Conditional Memory via Scalable Lookup"; hash and gate as in the published code).

The keys are known before denoising starts, so a prompt is looked up once and its rows, already
projected, serve all denoising steps and guidance passes. Only the gate depends on the hidden state.

Shape legend: B batch, T key positions, N highest n-gram order, K heads, E channels of a head, D
model width, Q query tokens (clock ticks), V' compressed vocabulary.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from avdiff.core.memory_table import MappedRows, MemoryTable

_INT64_MAX = 2**63 - 1
MAX_TABLE = 2**33  # rows of one head: beyond it a table is a slip of the keyboard


@dataclass(frozen=True)
class NgramHash:
    """Row numbers of the n-grams that end at each position; multiplicative-XOR hash of the
    published code.

    Args:
        vocab_size: V', number of different ids. It enters the multipliers: another V' is another
            hash.
        table_size: rows of each table, about; the sizes are the next unused primes.
        max_order: N; n-grams of order 2..N are looked up. heads: K tables for each order.
        layer, layers: this layer's number and all layers with a memory; no two tables of a model
            share a prime.
        pad_id: id that stands for "nothing"; n-grams neither cross it nor leave their segment.
    """

    vocab_size: int
    table_size: int
    max_order: int = 3
    heads: int = 8
    layer: int = 0
    layers: tuple[int, ...] = ()
    seed: int = 0
    pad_id: int = 0

    def __post_init__(self) -> None:
        if self.max_order < 2 or self.heads < 1:
            raise ValueError(
                f"max_order={self.max_order}, heads={self.heads}: needs max_order >= 2 and heads "
                ">= 1"
            )
        if not 2 <= self.table_size <= MAX_TABLE:
            raise ValueError(f"table_size={self.table_size}: needs 2 to {MAX_TABLE} rows")
        if not 0 <= self.pad_id < self.vocab_size:
            raise ValueError(
                f"pad_id={self.pad_id}: needs an id below vocab_size={self.vocab_size}"
            )

    @cached_property
    def multipliers(self) -> np.ndarray:
        """(N,) odd int64, one for each look-back; id * multiplier cannot overflow for id < V'."""
        bound = max(1, _INT64_MAX // self.vocab_size // 2)
        rng = np.random.default_rng(self.seed + 10007 * self.layer)
        return rng.integers(0, bound, size=self.max_order) * 2 + 1

    @cached_property
    def primes(self) -> np.ndarray:
        """(N - 1, K) table sizes."""
        layers = self.layers or (self.layer,)
        sizes = coprime_sizes(self.table_size, self.max_order - 1, self.heads, len(layers))
        return sizes[layers.index(self.layer)]

    @cached_property
    def offsets(self) -> np.ndarray:
        """(N - 1, K) first row of each table: one physical table holds them all."""
        flat = self.primes.reshape(-1)
        return (flat.cumsum() - flat).reshape(self.primes.shape)

    @property
    def num_rows(self) -> int:
        """Rows of all tables together."""
        return int(self.primes.sum())

    @property
    def reads(self) -> int:
        """(N - 1) * K, rows read for each position."""
        return self.primes.size

    def __call__(self, ids: Any, segments: Any = None) -> Any:
        """Row numbers of ids (..., T), torch or numpy alike: int64 (..., T, (N - 1) * K),
        order-major.

        Args:
            segments: (..., T) integers; an n-gram stops where the segment changes.
        """
        xp: Any = torch if isinstance(ids, torch.Tensor) else np
        place = (lambda a: torch.from_numpy(a).to(ids.device)) if xp is torch else (lambda a: a)
        past = list(self._look_back(ids, segments, xp))
        mix = past[0] * int(self.multipliers[0])
        rows = []
        for n in range(1, self.max_order):  # order n + 1
            mix = mix ^ (past[n] * int(self.multipliers[n]))
            rows.append(mix[..., None] % place(self.primes[n - 1]) + place(self.offsets[n - 1]))
        return xp.concatenate(rows, -1)

    def _look_back(self, ids: Any, segments: Any, xp: Any) -> Any:
        """Yield the ids 0, 1, .. N - 1 places back, the pad id where that lies beyond a
        boundary.
        """
        pad = ids == self.pad_id
        starts = xp.zeros_like(pad)
        starts[..., 1:] = pad[..., 1:] | pad[..., :-1]
        if segments is not None:
            starts[..., 1:] |= segments[..., 1:] != segments[..., :-1]
        run = starts.cumsum(-1)
        yield ids
        for back in range(1, self.max_order):
            seen = xp.full_like(ids, self.pad_id)
            same = run[..., back:] == run[..., :-back]
            seen[..., back:] = xp.where(same, ids[..., :-back], seen[..., back:])
            yield seen

    def fingerprint(self) -> list[int]:
        """What must agree between a saved table and the code that reads it."""
        return [
            self.vocab_size,
            self.pad_id,
            *self.multipliers.tolist(),
            *self.primes.reshape(-1).tolist(),
        ]


def coprime_sizes(table_size: int, orders: int, heads: int, layers: int) -> np.ndarray:
    """(layers, orders, heads) different primes, each order's search starting at table_size - 1."""
    seen: set[int] = set()
    for _ in range(layers * orders):
        candidate = table_size - 1
        for _ in range(heads):
            candidate += 1
            while candidate in seen or not _is_prime(candidate):
                candidate += 1
            seen.add(candidate)
    # The search returns to the same start each time, so it finds the primes in ascending order.
    return np.array(sorted(seen), np.int64).reshape(layers, orders, heads)


def _is_prime(n: int) -> bool:
    return n >= 2 and (n < 4 or bool(n % 2 and (n % np.arange(3, math.isqrt(n) + 1, 2)).all()))


class TextTokenizer(Protocol):
    """The part of a transformers tokenizer that is needed here."""

    def __len__(self) -> int: ...
    def decode(self, ids: Any, **options: Any) -> Any: ...
    def convert_ids_to_tokens(self, ids: Any) -> Any: ...


def compress_vocabulary(tokenizer: TextTokenizer) -> tuple[np.ndarray, int]:
    """Map tokens that read alike (case, accents, width, white space) to one id: table (V,) int64,
    and V'.

    A token that is not valid text by itself keeps its raw form. Ids are given in order of first
    appearance.
    """
    from tokenizers import Regex
    from tokenizers import normalizers as n

    normalize = n.Sequence(
        [
            n.NFKC(),
            n.NFD(),
            n.StripAccents(),
            n.Lowercase(),
            n.Replace(Regex(r"[ \t\r\n]+"), " "),
            n.Replace(Regex(r"^ $"), "\ue000"),
            n.Strip(),
            n.Replace("\ue000", " "),  # a lone space must survive Strip
        ]
    )
    keys: dict[str, int] = {}
    table = np.empty(len(tokenizer), np.int64)
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token], skip_special_tokens=False)
        key = (
            tokenizer.convert_ids_to_tokens(token)
            if "\ufffd" in text
            else normalize.normalize_str(text) or text
        )
        table[token] = keys.setdefault(key, len(keys))
    return table, len(keys)


@dataclass(frozen=True)
class MemoryRead:
    """What one prompt reads from a memory, ready for all steps.

    Args:
        keys: (B, T, D) fp32, RMSNorm(W_K e). values: (B, T, D), W_V e; zero where nothing was
            looked up.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def at(self, index: torch.Tensor) -> MemoryRead:
        """Reads of the positions `index` (B, Q): from phonemes to clock ticks. Worth doing once a
        prompt.
        """
        place = index[..., None].expand(-1, -1, self.keys.shape[-1])
        return MemoryRead(self.keys.gather(1, place), self.values.gather(1, place))

    def to(self, device: torch.device | str) -> MemoryRead:
        """Copy on another device."""
        return MemoryRead(self.keys.to(device), self.values.to(device))

    def silenced(self) -> MemoryRead:
        """The same batch with an empty memory: what a pass without words reads."""
        return replace(self, values=torch.zeros_like(self.values))

    @staticmethod
    def cat(reads: Sequence[MemoryRead]) -> MemoryRead:
        """Join batches of equal T."""
        return MemoryRead(torch.cat([r.keys for r in reads]), torch.cat([r.values for r in reads]))


class Engram(nn.Module):
    """Memory over n-grams of discrete ids: u = gate(h, key) * value, to be added to h.

    gate = sigmoid(sign(s) sqrt(max(|s|, 1e-6))), s = <RMSNorm(h), RMSNorm(W_K e)> / sqrt(D). The
    square root is in the published code and not in the paper. W_V starts at zero, so a fresh memory
    changes nothing. The short convolution of the paper is left out, as in the later release of its
    authors.

    Args:
        dim: D, of the hidden states. hashing: what is looked up. dim_head: E, channels of a row.
        dtype, std: of the table. constant_gate: use this gate everywhere (a control for
            experiments).
        table_file: safetensors file, or (file, tensor name), to map the table from in place of a
            table in RAM.
    """

    hash_check: torch.Tensor

    def __init__(
        self,
        dim: int,
        hashing: NgramHash,
        dim_head: int = 32,
        dtype: torch.dtype = torch.float32,
        std: float = 0.1,
        constant_gate: float | None = None,
        table_file: str | os.PathLike[str] | tuple[str | os.PathLike[str], str] | None = None,
    ) -> None:
        super().__init__()
        self.hashing = hashing
        self.constant_gate = constant_gate
        mapped = None
        if table_file is not None:
            mapped = (
                MappedRows(*table_file) if isinstance(table_file, tuple) else MappedRows(table_file)
            )
        self.table = MemoryTable(hashing.num_rows, dim_head, dtype, std, mapped)
        self.to_k = nn.Linear(hashing.reads * dim_head, dim, bias=False)
        self.to_v = nn.Linear(hashing.reads * dim_head, dim, bias=False)
        self.norm_q = WideNorm(dim, eps=1e-6)
        self.norm_k = WideNorm(dim, eps=1e-6)
        nn.init.zeros_(self.to_v.weight)
        self.register_buffer("hash_check", torch.tensor(hashing.fingerprint()))
        self.register_load_state_dict_post_hook(lambda module, _: module.check_hash())

    def lookup(self, ids: torch.Tensor, segments: torch.Tensor | None = None) -> MemoryRead:
        """Read the memory for ids (B, T), once a prompt; pad positions read nothing.

        Raises:
            ValueError: an id lies outside the vocabulary, or the table was saved for another hash.
        """
        self.check_hash()
        hashing = self.hashing
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < hashing.vocab_size:
            raise ValueError(
                f"ids: hold {int(ids.min())}..{int(ids.max())}; needs 0..{hashing.vocab_size - 1}"
            )
        rest = self.to_k.weight  # an offloaded model is read where it rests
        device = ids.device
        ids = ids if rest.is_meta else ids.to(rest.device)
        segments = segments if segments is None or rest.is_meta else segments.to(rest.device)
        e = (
            self.table(hashing(ids.long(), segments)).flatten(-2).to(self.to_k.weight.dtype)
        )  # (B, T, (N-1)*K*E)
        keys = self.norm_k(self.to_k(e))
        present = (ids != hashing.pad_id)[..., None]
        return MemoryRead(keys, self.to_v(e) * present.to(e.device)).to(device)

    def forward(
        self, h: torch.Tensor, read: MemoryRead, index: torch.Tensor | None = None
    ) -> torch.Tensor:
        """h (B, Q, D) and what was read at its positions, or at positions `index` (B, Q) -> update
        (B, Q, D).
        """
        read = read if index is None else read.at(index)
        if self.constant_gate is not None:
            return (self.constant_gate * read.values).to(h.dtype)
        return (self.gate(h, read.keys) * read.values).to(h.dtype)

    def gate(self, h: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """(B, Q, D), (B, Q, D) -> (B, Q, 1) in (0, 1), in fp32."""
        s = (self.norm_q(h) * keys).sum(-1, keepdim=True) / math.sqrt(h.shape[-1])
        return torch.sigmoid(s.sign() * s.abs().clamp_min(1e-6).sqrt())

    def check_hash(self) -> None:
        """Refuse a table that was saved for another hash: its rows would be noise, and nothing else
        would tell.
        """
        expected = self.hashing.fingerprint()
        if not self.hash_check.is_meta and self.hash_check.tolist() != expected:
            raise ValueError(
                f"vocab_size={expected[0]}, pad_id={expected[1]}: the saved memory was hashed with "
                f"vocab_size={int(self.hash_check[0])}, pad_id={int(self.hash_check[1])} or other "
                "tables"
            )


class WideNorm(nn.RMSNorm):
    """RMS norm in fp32 whatever the dtypes of input and weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)
