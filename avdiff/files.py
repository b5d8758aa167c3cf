"""Files: the bundled folder, whole-or-absent writing, and hashes of contents."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUNDLED = (
    Path(__file__).parent / "bundled"
)  # weights, lexica, recipes and prompts that ship with the package
RECIPES = BUNDLED / "recipes"


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Hand out a temporary path beside `path` that takes its place at the end, or disappears on an
    error.

    The temporary name keeps the suffix, since writers choose the container by it, and holds the
    process number, so that two processes never write into one file.

    Raises:
        OSError: the folder cannot be written, or the move fails.
    """
    target = Path(path)
    temporary_path = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        yield temporary_path
        os.replace(temporary_path, target)
    finally:
        with suppress(FileNotFoundError):
            temporary_path.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as a whole or not at all."""
    with write_atomically(path) as temporary_path:
        temporary_path.write_text(text, encoding="utf-8")


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's contents, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
