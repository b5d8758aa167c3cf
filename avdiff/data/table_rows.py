"""Rows of a metadata table (JSON Lines, JSON or CSV), each checked before it is used.

A row that is malformed becomes a sentence; nothing that a table holds may end the whole command.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# column names that other trainers use for the same thing
VIDEO_COLUMNS = (
    "file_name",
    "video",
    "video_path",
    "media_path",
    "path",
    "image",
    "image_path",
)
AUDIO_COLUMNS = ("audio", "audio_path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
SIDE_COLUMNS = ("video_mask", "audio_mask", "reference_video", "reference_audio")
FILE_COLUMNS = (*VIDEO_COLUMNS, *AUDIO_COLUMNS, *SIDE_COLUMNS)
LONGEST_CAPTION = 10_000  # characters; the prompt encoder reads far fewer
LONGEST_NAME = 4096  # characters of a path (Linux)
NO_CAPTION = frozenset(("nan", "none", "null"))  # how tables write that there is nothing
MOST_NUMBERS = 1_000_000  # in the phones or the mouth of one clip

Row = dict[str, Any]


def read_text(path: Path) -> str:
    """A UTF-8 text file, with or without a byte-order mark; lines keep their own ends.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error


def read_rows(path: Path) -> Iterator[tuple[str, Row, str | None]]:
    """Yield (where, columns, what is wrong with them) of each row that is not empty.

    Raises:
        ValueError: the table as a whole cannot be read.
    """
    text = read_text(path)
    if path.suffix == ".csv":
        rows = _csv_rows(text)
    elif path.suffix == ".json":
        rows = _json_rows(path, text)
    else:
        rows = _json_lines(text)
    for number, row in rows:
        columns = {} if isinstance(row, str) else row
        problem = row if isinstance(row, str) else _row_problem(row)
        yield f"{path.name}:{number}", columns, problem


def _csv_rows(text: str) -> Iterator[tuple[int, Row | str]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header = next(reader, [])
    except csv.Error as error:
        yield 1, f"the header is no CSV ({error})"
        return
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield reader.line_num, f"the row is no CSV ({error})"
            continue
        if len(cells) > len(header):
            yield (
                reader.line_num,
                f"has {len(cells)} cells for {len(header)} columns: put a caption with commas into "
                "quotes",
            )
        elif cells:
            named = zip(header, cells, strict=False)
            yield reader.line_num, {name: cell for name, cell in named if name and cell}


def _json_lines(text: str) -> Iterator[tuple[int, Row | str]]:
    """Lines end at a line feed only: JSON strings may hold other line separators."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse_json(line)


def _parse_json(line: str) -> Row | str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return f"the line is no JSON ({error.msg})"
    except ValueError:  # Python refuses whole numbers of thousands of digits
        return "the line is no JSON that is read here (a number of too many digits)"
    except RecursionError:
        return "the line is no JSON that is read here (nested too deep)"
    return row if isinstance(row, dict) else "the line is no JSON object"


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, Row | str]]:
    """A list of objects, or an object of file name -> caption or columns."""
    try:
        table = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{path}: is no JSON that is read here (nested too deep)") from error
    except ValueError as error:
        raise ValueError(f"{path}: is no JSON ({str(error)[:80]})") from error
    if isinstance(table, dict):
        table = [
            {"file_name": name, **(row if isinstance(row, dict) else {"caption": row})}
            for name, row in table.items()
        ]
    if not isinstance(table, list):
        raise ValueError(f"{path}: needs a list of objects with file_name and caption")
    for number, row in enumerate(table, 1):
        yield number, row if isinstance(row, dict) else "is no JSON object"


def _row_problem(row: Row) -> str | None:
    """What is wrong with the columns of a row."""
    for name in FILE_COLUMNS:
        value = row.get(name)
        if value is not None and not is_file_name(value):
            return f"{name}={shorten(value)}: needs a file's name"
    problem = _phones_problem(row.get("phones")) or _mouth_problem(row.get("mouth"))
    if problem is not None:
        return problem
    return None if _is_text(row) else "holds half a character (a lone surrogate)"


def is_file_name(value: object) -> bool:
    """Whether a file may have this name."""
    return isinstance(value, str) and 0 < len(value) < LONGEST_NAME and "\0" not in value


def _is_text(value: object) -> bool:
    """Whether all text in a JSON value can be written as UTF-8."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def row_captions(row: Row) -> tuple[str, ...] | str:
    """The captions of a row, or what is wrong with them; () for none."""
    found = row.get("captions") or next((row[c] for c in CAPTION_COLUMNS if row.get(c)), None)
    texts = found if isinstance(found, list) else [found]
    captions = []
    for text in texts:
        if text is None or (isinstance(text, float) and math.isnan(text)):
            continue
        if not isinstance(text, str):
            return f"has caption={shorten(text)}: needs text"
        if len(text) > LONGEST_CAPTION:
            return f"has a caption of {len(text)} characters; needs at most {LONGEST_CAPTION}"
        if text.strip() and text.strip().lower() not in NO_CAPTION:
            captions.append(text.strip())
    return tuple(captions)


def _phones_problem(phones: object) -> str | None:
    """What is wrong with a row's phones: [symbol, start, end] or with stress or tone as the fourth,
    seconds in order.
    """
    if phones is None:
        return None
    if not isinstance(phones, list) or len(phones) > MOST_NUMBERS:
        return f"phones={shorten(phones)}: needs a list of [symbol, start, end]"
    last = 0.0
    for phone in phones:
        fits = isinstance(phone, list) and len(phone) in (3, 4) and isinstance(phone[0], str)
        if not fits or not all(_is_number(value) for value in phone[1:]):
            return f"phones holds {shorten(phone)}: needs [symbol, start, end] in seconds"
        if not last - 1e-3 <= phone[1] <= phone[2]:
            return f"phones holds {shorten(phone)}: needs start and end in seconds, in order"
        last = phone[2]
    return None


def _mouth_problem(mouth: object) -> str | None:
    """What is wrong with a row's mouth: one list of numbers a frame, all of one length."""
    if mouth is None:
        return None
    if not isinstance(mouth, list) or len(mouth) > MOST_NUMBERS:
        return f"mouth={shorten(mouth)}: needs one list of numbers for each frame"
    for frame in mouth:
        fits = isinstance(frame, list) and frame and len(frame) == len(mouth[0])
        if not fits or not all(_is_number(value) for value in frame):
            return f"mouth holds {shorten(frame)}: needs one list of numbers for each frame"
    return None


def _is_number(value: object) -> bool:
    """A finite number that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -1e15 < value < 1e15


def shorten(value: object) -> str:
    """A value as text, cut."""
    if isinstance(value, list | dict):
        value = f"{type(value).__name__} of {len(value)}" if len(value) > 8 else value
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
