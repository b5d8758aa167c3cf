"""What a folder of real clips holds: media files with captions from `metadata.jsonl`,
`metadata.json`, `metadata.csv` or `.txt` files.

Nothing is left out in silence: a file that was meant as a clip and cannot be used is refused, any
other file is left out, and both are named with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from avdiff.corpus.captions import parse_prompt
from avdiff.data.table_rows import (
    AUDIO_COLUMNS,
    CAPTION_COLUMNS,
    FILE_COLUMNS,
    LONGEST_CAPTION,
    NO_CAPTION,
    SIDE_COLUMNS,
    VIDEO_COLUMNS,
    Row,
    is_file_name,
    read_rows,
    read_text,
    row_captions,
)

VIDEO_SUFFIXES = frozenset(
    (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v", ".ts", ".gif")
)
AUDIO_SUFFIXES = frozenset((".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac"))
STILL_CLIP_SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".avif")
)
TABLES = ("metadata.jsonl", "metadata.json", "metadata.csv")
# text files that lie beside clips and caption none
NOT_CAPTIONS = re.compile(
    r"(readme|licen[sc]e|copying|notice|authors|changelog|requirements|urls?|sources?)([-_. ].*)?",
    re.IGNORECASE,
)
# a line that names which part of one caption it holds, as captioning tools write them
SECTION = re.compile(r"\s*\[[A-Z][A-Z0-9 _/&-]{1,40}\]\s*:")


@dataclass(frozen=True)
class ClipEntry:
    """One clip of a folder.

    `name` is its path inside the folder; `video` is None for sound alone, and may be a still
    picture; `audio` is a separate sound that replaces the video's own; masks and references are
    files beside it; `extra` holds the other columns of its line.
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
        """The first caption that quotes spoken words, else the first."""
        return next((text for text in self.captions if parse_prompt(text)[1]), self.captions[0])

    @property
    def is_still(self) -> bool:
        """Whether it is one picture without sound."""
        return self.video is not None and self.video.suffix.lower() in STILL_CLIP_SUFFIXES

    @property
    def warnings(self) -> tuple[str, ...]:
        """What may be a mistake in its captions."""
        quoted = [parse_prompt(text)[1] for text in self.captions]
        spoken = {words for words in quoted if words}
        if spoken and None in quoted:
            return (
                f"{quoted.count(None)} of its {len(quoted)} captions quote no words, though they "
                "are said",
            )
        if len(spoken) > 1:
            return ("its captions quote different words; those of the first are used",)
        return ()


@dataclass
class ClipTable:
    """Clips that can be tried, why others cannot (`refused`), and what is no clip at all
    (`left_out`): name -> one sentence.
    """

    folder: Path
    entries: list[ClipEntry] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


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
        names = " and ".join(path.name for path in tables)
        raise ValueError(f"folder={str(folder)!r}: holds {names}; keep one of them")
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


def _files(table: ClipTable) -> Iterator[Path]:
    """All files of the folder and of linked folders, in order; hidden ones are left out and named
    once.
    """
    seen: set[str] = set()
    found: list[Path] = []
    for folder, folders, names in os.walk(table.folder, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for name in [n for n in (*folders, *names) if n.startswith(".")]:
            table.left_out[_inside(table.folder, Path(folder, name))] = "hidden"
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return iter(sorted(path for path in found if path.is_file()))


def _inside(root: Path, path: Path) -> str:
    """A path as it is named inside the folder."""
    return str(path.relative_to(root))


def _from_table(table: ClipTable, path: Path) -> None:
    """One entry for each line."""
    used = {os.path.realpath(path)}
    for where, row, problem in read_rows(path):
        _add_row(table, where, row, problem, used)
    for file in _files(table):
        if os.path.realpath(file) in used:
            continue
        name = _inside(table.folder, file)
        if file.suffix.lower() in VIDEO_SUFFIXES:
            table.refused[name] = f"not listed in {path.name}"
        else:
            table.left_out[name] = f"not listed in {path.name}"


def _add_row(table: ClipTable, where: str, row: Row, problem: str | None, used: set[str]) -> None:
    """Turn the columns of one line into an entry, or into a reason."""
    row = {key: value for key, value in row.items() if key not in FILE_COLUMNS} | {
        key: row[key] for key in FILE_COLUMNS if is_file_name(row.get(key))
    }
    media = next((row[name] for name in VIDEO_COLUMNS if name in row), None)
    sound = next((row[name] for name in AUDIO_COLUMNS if name in row), None)
    name = _name(table.folder, media or sound or where)
    video = _resolve(table.folder, media)
    audio = _resolve(table.folder, sound)
    sides = {key: _resolve(table.folder, row.get(key)) for key in SIDE_COLUMNS}
    files = [path for path in (video, audio, *sides.values()) if path is not None]
    used.update(os.path.realpath(path) for path in files)
    missing = next((path for path in files if not is_file(path)), None)
    if video is not None and video.suffix.lower() in AUDIO_SUFFIXES:
        audio = audio or video
        video = None
    captions = row_captions(row)
    if problem is not None:
        table.refused[name] = problem if name == where else f"{where} {problem}"
        return
    if video is None and audio is None:
        problem = "names neither a video nor a sound"
    elif missing is not None:
        problem = f"names {missing}, which is not there"
    elif isinstance(captions, str):
        problem = captions
    elif not captions:
        problem = "has no caption"
    if problem is not None or isinstance(captions, str):
        table.refused[name] = f"{where} {problem}"
        return
    known = (*FILE_COLUMNS, *CAPTION_COLUMNS, "captions")
    extra = {key: value for key, value in row.items() if key not in known}
    table.entries.append(ClipEntry(name, video, audio, captions, extra=extra, **sides))


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _name(folder: Path, value: str) -> str:
    """An absolute path of the table as it is named inside the folder; others as they are."""
    if os.path.isabs(value):
        inside = os.path.relpath(value, os.path.abspath(folder))
        return value if inside.startswith("..") else inside
    return value


def _resolve(folder: Path, value: str | None) -> Path | None:
    """A path of the table: relative to the folder, or absolute."""
    return folder / value if value else None


def _from_files(table: ClipTable) -> None:
    """Media files with a caption file of the same stem; a sound beside a video of the same stem
    replaces its own.
    """
    stems: dict[Path, list[Path]] = {}
    for path in _files(table):
        stems.setdefault(path.with_suffix(""), []).append(path)
    only_stills = not any(
        path.suffix.lower() in VIDEO_SUFFIXES | AUDIO_SUFFIXES
        for group in stems.values()
        for path in group
    )
    for group in stems.values():
        _add_group(table, group, only_stills)


def _add_group(table: ClipTable, group: list[Path], only_stills: bool) -> None:
    """Files of one stem: a clip with its caption, or what each of them is instead."""
    videos = _of_kind(group, VIDEO_SUFFIXES)
    sounds = _of_kind(group, AUDIO_SUFFIXES)
    stills = _of_kind(group, STILL_CLIP_SUFFIXES)
    texts = _of_kind(group, frozenset((".txt",)))
    media = videos or sounds or stills
    if not media:
        _name_others(table, group, texts)
        return
    for path in group:
        if path not in (*media, *sounds, *texts[:1]):
            kind = "a picture" if path in stills else path.suffix or "a file without suffix"
            table.left_out[_inside(table.folder, path)] = f"{kind} beside the clip of its name"
    if len(media) > 1:
        for path in media:
            others = ", ".join(other.name for other in media if other != path)
            reason = f"shares its caption file with {others}"
            table.refused[_inside(table.folder, path)] = reason
        return
    name = _inside(table.folder, media[0])
    if not texts:
        unwanted = media == stills and not only_stills
        (table.left_out if unwanted else table.refused)[name] = (
            "no caption: needs a .txt of its name"
        )
        return
    captions = read_captions(texts[0])
    if isinstance(captions, str):
        table.refused[name] = captions
        return
    video = media[0] if media != sounds else None
    audio = sounds[0] if sounds and media != stills else None
    table.entries.append(ClipEntry(name, video, audio, captions))


def _of_kind(group: list[Path], suffixes: frozenset[str]) -> list[Path]:
    return [path for path in group if path.suffix.lower() in suffixes]


def _name_others(table: ClipTable, group: list[Path], texts: list[Path]) -> None:
    """Files without a clip of their stem: those with a caption were meant as clips."""
    captioned = any(not NOT_CAPTIONS.fullmatch(path.stem) for path in texts)
    for path in group:
        kind = path.suffix or "a file without suffix"
        reason = f"{kind} is no kind of clip that is read here"
        if path in texts and captioned:
            reason = "a caption without a clip of its name"
        target = table.refused if captioned else table.left_out
        target[_inside(table.folder, path)] = reason


def read_captions(path: Path) -> tuple[str, ...] | str:
    """Each line that is not empty is one caption, lines that begin with [VISUAL]: and the like are
    parts of one; or what is wrong.
    """
    try:
        text = read_text(path)
    except ValueError as error:
        return f"its caption {str(error).removeprefix(f'{path.parent}{os.sep}')}"
    except OSError as error:
        return f"its caption {path.name} cannot be read ({error.strerror})"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if any(SECTION.match(line) for line in lines):
        lines = [" ".join(lines)]
    captions = tuple(line for line in lines if line.lower() not in NO_CAPTION)
    if any(len(line) > LONGEST_CAPTION for line in captions):
        return f"its caption {path.name} has a line of more than {LONGEST_CAPTION} characters"
    return captions or f"its caption {path.name} is empty"
