"""What the command line says beside its results: one line for an error, a bar where somebody
watches, and nothing of the libraries below.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable
from textwrap import shorten
from typing import TypeVar

from typer.exceptions import TyperException

T = TypeVar("T")

LONGEST_ERROR = 600  # characters: torch lists every key of a state dict, a person reads the first

# What each library reads when it is imported; whoever sets one himself keeps it.
QUIET_LIBRARIES = {
    "DIFFUSERS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",  # weights are loaded under bars of two libraries
}


def prepare(debug: bool = False) -> None:
    """Make the terminal take any text, and keep libraries quiet unless `debug`."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal in ASCII or Latin-1 gets `\\u3042` for what it cannot show, not a crash.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if debug:
        return
    for name, value in QUIET_LIBRARIES.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")


def refuse_other_encodings(words: Iterable[str]) -> None:
    """Python turns bytes of the command line that are no UTF-8 into lone surrogates.

    Raises:
        ValueError: names the argument.
    """
    for word in words:
        if not is_unicode(word):
            raise ValueError(f"argument {word!r}: is not UTF-8 text; write it in UTF-8")


def is_unicode(text: str) -> bool:
    """Whether a text can be written as UTF-8: it holds no lone surrogate."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


def error_line(error: Exception) -> str:
    """An exception as the one line that a user reads."""
    if isinstance(error, TyperException):
        text = error.format_message()
    else:
        text = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: needs a smaller size, length or batch ({text})"
    elif not isinstance(error, TyperException | ValueError | OSError):
        text = f"{type(error).__name__}: {text} (a fault of avdiff; --debug shows where)"
    return f"avdiff: {shorten(text, LONGEST_ERROR, placeholder=' ...')}"


def progress(what: str, total: int | None = None) -> Callable[[Iterable[T]], Iterable[T]]:
    """A bar on stderr around an iterable; silent where stderr is a file or a pipe, so that an error
    stands alone there.
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)

    def around(items: Iterable[T]) -> Iterable[T]:
        hidden = not console.is_terminal
        return track(items, what, total, console=console, transient=True, disable=hidden)

    return around
