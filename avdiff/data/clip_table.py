"""What a folder of real clips holds: media files with captions from `metadata.jsonl`,
`metadata.csv` or `.txt` files.

Nothing is left out in silence: every file that cannot be used is named with its reason.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = frozenset((".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v"))
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"))
TABLES = ("metadata.jsonl", "metadata.csv")
# column names that other trainers use for the same thing
VIDEO_COLUMNS = ("file_name", "video", "media_path", "path")
CAPTION_COLUMNS = ("caption", "text", "prompt")
SIDE_COLUMNS = ("audio", "video_mask", "audio_mask", "reference_video", "reference_audio")


@dataclass(frozen=True)
class ClipEntry:
    """One clip of a folder.

    `name` is its path inside the folder; `video` is None for sound alone; `audio` is a separate
    sound that replaces the video's own; masks and references are files beside it; `extra` holds the
    other columns of its line.
    """

    name: str
    video: Path | None
    audio: Path | None
    captions: tuple[str, ...]
    video_mask: Path | None = None
    audio_mask: Path | None = None
    reference_video: Path | None = None
    reference_audio: Path | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def caption(self) -> str:
        """The first caption."""
        return self.captions[0]


@dataclass
class ClipTable:
    """Clips that can be tried, and why the others cannot (name -> one sentence)."""

    folder: Path
    entries: list[ClipEntry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def find_clips(folder: str | os.PathLike[str]) -> ClipTable:
    """List the clips of a folder, by its table if it has one, else by media files with captions of
    the same stem.

    Raises:
        ValueError: no such folder, a table that cannot be read at all, or a folder without any
            clip.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={str(folder)!r}: no such folder")
    table = ClipTable(root)
    tables = [root / name for name in TABLES if (root / name).is_file()]
    if len(tables) > 1:
        raise ValueError(f"folder={str(folder)!r}: holds {' and '.join(TABLES)}; keep one of them")
    if tables:
        _from_table(table, tables[0])
    else:
        _from_files(table)
    if not table.entries and not table.refused:
        raise ValueError(
            f"folder={str(folder)!r}: no clips there; needs media files and {', '.join(TABLES)} "
            "or .txt files"
        )
    return table


def _from_table(table: ClipTable, path: Path) -> None:
    """One entry for each line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    used: set[Path] = {path}
    for number, row in _rows(path, text):
        where = f"{path.name}:{number}"
        if isinstance(row, str):
            table.refused[where] = row
            continue
        _add_row(table, where, row, used)
    for file in sorted(table.folder.rglob("*")):
        if file.suffix.lower() in VIDEO_SUFFIXES and file not in used:
            table.refused[str(file.relative_to(table.folder))] = f"not listed in {path.name}"


def _rows(path: Path, text: str) -> list[tuple[int, dict[str, Any] | str]]:
    """(line number, columns or what is wrong) of each line that is not empty."""
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text))
        return [
            (reader.line_num, {k: v for k, v in row.items() if k and v not in (None, "")})
            for row in reader
        ]
    rows: list[tuple[int, dict[str, Any] | str]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((number, row if isinstance(row, dict) else "the line is no JSON object"))
        except json.JSONDecodeError as error:
            rows.append((number, f"the line is no JSON ({error.msg})"))
    return rows


def _add_row(table: ClipTable, where: str, row: dict[str, Any], used: set[Path]) -> None:
    """Turn the columns of one line into an entry, or into a reason."""
    media = next((str(row[name]) for name in VIDEO_COLUMNS if row.get(name)), None)
    name = media or str(row.get("audio") or where)
    told = row.get("captions") or next((row[c] for c in CAPTION_COLUMNS if row.get(c)), "")
    captions = tuple(
        str(c).strip() for c in (told if isinstance(told, list) else [told]) if str(c).strip()
    )
    files: dict[str, Path | None] = {
        key: _beside(table.folder, row.get(key)) for key in SIDE_COLUMNS
    }
    video = _beside(table.folder, media)
    used.update(path for path in (video, *files.values()) if path is not None)
    missing = [
        str(path) for path in (video, *files.values()) if path is not None and not path.is_file()
    ]
    if video is not None and video.suffix.lower() in AUDIO_SUFFIXES:
        video, files["audio"] = None, files["audio"] or video
    problem = (
        "names neither a video nor a sound"
        if video is None and files["audio"] is None
        else f"names {missing[0]}, which is not there"
        if missing
        else "has no caption"
        if not captions
        else None
    )
    if problem:
        table.refused[name] = f"{where} {problem}"
        return
    known = (*VIDEO_COLUMNS, *CAPTION_COLUMNS, *SIDE_COLUMNS, "captions")
    extra = {key: value for key, value in row.items() if key not in known}
    table.entries.append(ClipEntry(name, video, captions=captions, extra=extra, **files))


def _beside(folder: Path, value: Any) -> Path | None:
    """A path of the table: relative to the folder, or absolute."""
    return folder / str(value) if value else None


def _from_files(table: ClipTable) -> None:
    """Media files with a caption file of the same stem; a sound beside a video of the same stem
    replaces its own.
    """
    files = [
        path
        for path in sorted(table.folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".")
    ]
    stems: dict[Path, list[Path]] = {}
    for path in files:
        stems.setdefault(path.with_suffix(""), []).append(path)
    for stem, group in stems.items():
        by_kind = {
            "video": [p for p in group if p.suffix.lower() in VIDEO_SUFFIXES],
            "audio": [p for p in group if p.suffix.lower() in AUDIO_SUFFIXES],
            "text": [p for p in group if p.suffix.lower() == ".txt"],
        }
        name = str(stem.relative_to(table.folder))
        if not by_kind["video"] and not by_kind["audio"]:
            for path in group:
                table.refused[str(path.relative_to(table.folder))] = (
                    "a caption without a clip of its name"
                    if path.suffix.lower() == ".txt"
                    else (
                        f"{path.suffix or 'a file without suffix'} is no kind of clip that is "
                        "read here"
                    )
                )
            continue
        media = (by_kind["video"] or by_kind["audio"])[0]
        name = str(media.relative_to(table.folder))
        if len(by_kind["video"]) > 1:
            for path in by_kind["video"]:
                others = ", ".join(p.name for p in by_kind["video"] if p != path)
                table.refused[str(path.relative_to(table.folder))] = (
                    f"shares its caption file with {others}"
                )
            continue
        captions = (
            _read_captions(by_kind["text"][0])
            if by_kind["text"]
            else "no caption: needs a .txt of its name"
        )
        if isinstance(captions, str):
            table.refused[name] = captions
            continue
        video, audio = (kind[0] if kind else None for kind in (by_kind["video"], by_kind["audio"]))
        table.entries.append(ClipEntry(name, video, audio, captions))


def _read_captions(path: Path) -> tuple[str, ...] | str:
    """Each line that is not empty is one caption; or what is wrong."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        return f"its caption {path.name} is not UTF-8 (byte {error.start}); save it as UTF-8"
    captions = tuple(line.strip() for line in lines if line.strip())
    return captions or f"its caption {path.name} is empty"
