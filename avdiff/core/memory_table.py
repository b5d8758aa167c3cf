"""Rows of an Engram memory: in RAM, or memory-mapped from a safetensors file, bit for bit the same.

A table is far too large for a dense gradient and often for RAM. It is a buffer, not a parameter;
`avdiff.train.loop.sparse_optim` trains the rows that a forward touched and nothing else.

Shape legend: R rows of the table, D channels of a row, U unique rows of one look-up.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

# How each stored type is moved (bits only) and what it means to torch.
_STORED: dict[str, tuple[np.dtype[Any], torch.dtype]] = {
    "F32": (np.dtype(np.uint32), torch.float32),
    "F16": (np.dtype(np.uint16), torch.float16),
    "BF16": (np.dtype(np.uint16), torch.bfloat16),
    "F8_E4M3": (np.dtype(np.uint8), torch.float8_e4m3fn),
}
_READERS = 32  # parallel preads: a disk queue this deep hides the latency of single 4 KiB reads
_PROBES = 64  # rows whose residency is asked for before a read
_AROUND = (
    2**21
    # bytes that Linux may map around a faulting page: the largest piece of a file that it caches as
    # one
)


class MappedRows:
    """Read-only rows of one tensor in a safetensors file; several processes share the pages of one
    mapping.

    Warm rows are gathered straight from the mapping. If any of a sample of rows is not in the page
    cache, all wanted rows are read with sorted, parallel preads: several times faster than page
    faults one after the other.

    Args:
        path: safetensors file. name: tensor of shape (R, D) in it, float32, float16, bfloat16 or
            float8_e4m3.

    Raises:
        ValueError: the file is no safetensors file, or holds no such tensor.
    """

    def __init__(self, path: str | os.PathLike[str], name: str = "rows") -> None:
        self.path = Path(path)
        self.name = name
        kind, shape, begin = _locate(self.path, name)
        self._bits, self.dtype = _STORED[kind]
        self.shape: tuple[int, int] = (shape[0], shape[1])
        self._begin = begin
        self._row_bytes = shape[1] * self._bits.itemsize
        self._file = open(self.path, "rb")  # noqa: SIM115  (lives as long as the mapping)
        self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        self._map.madvise(
            mmap.MADV_RANDOM
        )  # a fault must not drag 128 KiB of neighbours into memory
        with contextlib.suppress(AttributeError, OSError):  # where there are no huge pages
            self._map.madvise(
                mmap.MADV_NOHUGEPAGE
            )  # nor map 2 MiB, as it does where the cache has a huge page
        self._advise("POSIX_FADV_RANDOM")  # nor must a read
        flat = np.frombuffer(self._map, np.uint8, shape[0] * self._row_bytes, begin)
        # A header may leave the data at an address that is odd for the type, so rows are taken as
        # bytes.
        self._rows = flat.reshape(shape[0], self._row_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedRows, (self.path, self.name)

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (...) of int64 -> values (..., D) in the stored type."""
        wanted = rows.detach().cpu().numpy()
        taken = self._gather(wanted) if self.resident(wanted) else self._read_cold(wanted)
        return torch.from_numpy(taken.view(self._bits)).view(self.dtype).to(rows.device)

    def prefetch(self) -> None:
        """Ask the kernel to bring the whole table in, without waiting: for tables that fit in free
        memory.
        """
        self._map.madvise(mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Drop the table's pages from this process and, if no one else maps them, from the page
        cache.
        """
        self._map.madvise(mmap.MADV_DONTNEED)
        self._advise("POSIX_FADV_DONTNEED")

    def resident(self, rows: np.ndarray) -> bool:
        """Whether a sample of these rows is in the page cache; False if the system cannot tell."""
        sample = rows.reshape(-1)[:: max(1, rows.size // _PROBES)]
        return all(self._is_cached(row * self._row_bytes) for row in sample.tolist())

    def _is_cached(self, place: int) -> bool:
        """Whether the byte at `place` of the table could be read without the disk."""
        if hasattr(os, "RWF_NOWAIT"):
            # Before mincore: of a file that we may not write, Linux lets mincore say that all of it
            # is resident.
            try:
                return (
                    os.preadv(
                        self._file.fileno(), [bytearray(1)], self._begin + place, os.RWF_NOWAIT
                    )
                    == 1
                )
            except BlockingIOError:
                return False
            except OSError:  # not every file system knows the flag
                pass
        page = mmap.PAGESIZE
        flag = ctypes.c_ubyte()
        address = (self._rows.ctypes.data + place) // page * page
        failed = _LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(1), ctypes.byref(flag))
        return not failed and bool(flag.value & 1)

    def _advise(self, what: str) -> None:
        """A hint to the page cache, where the system takes one (macOS does not)."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, getattr(os, what))

    def _gather(self, wanted: np.ndarray) -> np.ndarray:
        """Warm rows from the mapping, which is let go of before it may have grown to a fiftieth of
        a large table: the pages stay in the cache, but a process must not come to hold the table.
        """
        most = max(2**26, self._rows.nbytes // 50)
        if self._rows.nbytes <= most:
            return self._rows[wanted]
        unique, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), self._row_bytes), np.uint8)
        chunk = most // _AROUND
        for first in range(0, len(unique), chunk):
            out[first : first + chunk] = self._rows[unique[first : first + chunk]]
            self._map.madvise(mmap.MADV_DONTNEED)
        return out[inverse.reshape(wanted.shape)]

    def _read_cold(self, wanted: np.ndarray) -> np.ndarray:
        """Sorted unique rows by parallel preads, then put in the order asked for."""
        unique, inverse = np.unique(wanted, return_inverse=True)
        out = np.empty((len(unique), self._row_bytes), np.uint8)
        chunk = -(-len(unique) // _READERS)
        spans = [slice(i, i + chunk) for i in range(0, len(unique), chunk)] if chunk else []
        with ThreadPoolExecutor(_READERS) as pool:
            list(pool.map(partial(self._pread, unique, out), spans))
        return out[inverse.reshape(wanted.shape)]

    def _pread(self, unique: np.ndarray, out: np.ndarray, span: slice) -> None:
        # type: ignore[arg-type]
        fd = self._file.fileno()
        size = self._row_bytes
        view = memoryview(out.reshape(-1))
        for i, row in enumerate(unique[span].tolist(), span.start):
            if os.preadv(fd, [view[i * size : (i + 1) * size]], self._begin + row * size) != size:
                raise OSError(
                    f"{self.path}: ends before row {row} of {self.name!r}; the file is cut short"
                )


class MemoryTable(nn.Module):
    """(R, D) rows that are looked up by number.

    In RAM the rows are a persistent buffer `rows`, so they are saved with the model. Mapped, the
    module holds no tensor of its own, and the rows stay in their file.

    Args:
        num_rows, dim: R and D. dtype: float32, bfloat16 or float16. std: spread of the initial
            normal values.
        mapped: rows in a file, in place of rows in RAM.
    """

    rows: torch.Tensor | None

    def __init__(
        self,
        num_rows: int,
        dim: int,
        dtype: torch.dtype = torch.float32,
        std: float = 0.1,
        mapped: MappedRows | None = None,
    ) -> None:
        super().__init__()
        if mapped is not None:
            _check_shape(mapped, (num_rows, dim))
        self.num_rows = num_rows
        self.dim = dim
        self.mapped = mapped
        self.collecting = False  # switched on by the row optimizer that trains this table
        self.pending: list[PendingRows] = []
        self.register_buffer(
            "rows", None if mapped else torch.randn(num_rows, dim).mul_(std).to(dtype)
        )

    def map_from(self, path: str | os.PathLike[str], name: str = "rows") -> None:
        """Let go of the rows in RAM and read them from a file from now on; the file must hold as
        many.
        """
        mapped = MappedRows(path, name)
        _check_shape(mapped, (self.num_rows, self.dim))
        self.mapped = mapped
        self.rows = None

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], name: str = "rows") -> MemoryTable:
        """Table that stays in a safetensors file; `name` may be a table inside a model's
        checkpoint.
        """
        mapped = MappedRows(path, name)
        return cls(*mapped.shape, mapped=mapped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the rows to a safetensors file that `from_file` can map; atomic."""
        if self.rows is None:
            raise ValueError("save: this table is already mapped from a file")
        draft = f"{os.fspath(path)}.{os.getpid()}.tmp"
        save_file({"rows": self.rows.detach().contiguous()}, draft)
        os.replace(draft, path)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Row numbers (...) -> values (..., D), in the stored type, or in fp32 with a gradient
        while being trained.
        """
        if self.collecting and self.training and torch.is_grad_enabled():
            return self._collect(rows)
        return self._read(rows)

    def _read(self, rows: torch.Tensor) -> torch.Tensor:
        if self.mapped is not None:
            return self.mapped.read(rows)
        assert self.rows is not None
        return self.rows.index_select(0, rows.reshape(-1)).view(*rows.shape, self.dim)

    def _collect(self, rows: torch.Tensor) -> torch.Tensor:
        """Gather-leaf: the touched rows become a small leaf that autograd knows; the table itself
        never does.
        """
        unique, inverse = rows.unique(return_inverse=True)
        leaf = self._read(unique).float().requires_grad_()  # (U, D)
        self.pending.append(PendingRows(unique, leaf))
        return leaf[inverse]

    def take_pending(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Rows that got a gradient since the last call, each once, and their summed gradients:
        (U,), (U, D) fp32.

        A forward without a backward (or the first of a recomputed pair) leaves no gradient and is
        dropped.
        """
        done = [(p.rows, p.leaf.grad) for p in self.pending if p.leaf.grad is not None]
        self.pending.clear()
        if not done:
            return None
        return merge_rows(torch.cat([r for r, _ in done]), torch.cat([g for _, g in done]))


@dataclass(frozen=True)
class PendingRows:
    """Row numbers (U,) that a forward used, and the leaf (U, D) fp32 that holds their gradient
    after the backward.
    """

    rows: torch.Tensor
    leaf: torch.Tensor


def merge_rows(rows: torch.Tensor, grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum the gradients of equal rows: (n,), (n, D) -> (U,) sorted, (U, D)."""
    unique, inverse = rows.unique(return_inverse=True)
    if len(unique) == len(rows):
        return unique, grads[rows.argsort()]
    return unique, torch.zeros(len(unique), grads.shape[1]).to(grads).index_add_(0, inverse, grads)


def _check_shape(mapped: MappedRows, shape: tuple[int, int]) -> None:
    if mapped.shape != shape:
        raise ValueError(
            f"mapped table: {mapped.path} holds {mapped.shape} (rows, channels); needs {shape}"
        )


def memory_tables(module: nn.Module) -> Iterator[tuple[str, MemoryTable]]:
    """All tables inside a module with their names, e.g. to hand them to a row optimizer."""
    for name, child in module.named_modules():
        if isinstance(child, MemoryTable):
            yield name, child


def _locate(path: Path, name: str) -> tuple[str, list[int], int]:
    """Type, shape and byte position of a tensor, from the file's own header (8 bytes of length,
    then JSON).
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise ValueError("no header")
            header = json.loads(file.read(length))
        tensors = {key: value for key, value in header.items() if key != "__metadata__"}
        kind, shape, (begin, end) = (
            tensors[name][key] for key in ("dtype", "shape", "data_offsets")
        )
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("no numbers")
    except KeyError:
        raise ValueError(
            f"table {name!r}: not in {path}, which holds {sorted(tensors)[:8]}"
        ) from None
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise ValueError(f"path={path}: not a safetensors file, or damaged") from None
    except OSError as error:
        raise ValueError(f"path={path}: cannot be read ({error.strerror})") from None
    if kind not in _STORED or len(shape) != 2:
        raise ValueError(
            f"table {name!r}: is {kind} of shape {shape}; needs (rows, channels) of "
            f"{', '.join(_STORED)}"
        )
    begin += 8 + length
    if (
        shape[0] * shape[1] * _STORED[kind][0].itemsize != end + 8 + length - begin
        or end + 8 + length > size
    ):
        raise ValueError(f"path={path}: not a safetensors file, or damaged")
    return kind, shape, begin


_LIBC = ctypes.CDLL(None, use_errno=True)
