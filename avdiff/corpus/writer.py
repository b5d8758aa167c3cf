"""Write corpus clips as a folder of real files: `<index>.mp4` and one line each in
`metadata.jsonl`.

The folder is in the form that `avdiff.data.clips` reads, with the truth (phones, impacts,
attributes, mouth) beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.media.write import write_clip

TABLE = "metadata.jsonl"
PLAIN = (
    "caption",
    "captions",
    "language",
    "text",
    "kind",
    "split",
    "index",
    "attributes",
    "contacts",
)


def write_corpus(
    corpus: PresenterCorpus,
    folder: str | os.PathLike[str],
    indices: Iterable[int] | None = None,
    report: Callable[[int], None] | None = None,
) -> int:
    """Write clips as H.264 + AAC with `metadata.jsonl`; clips already there are kept, so a broken
    run goes on.

    Args:
        folder: made if missing. indices: clips to write; None writes all.
        report: called with the number of clips done so far.

    Returns:
        Number of clips that the table lists.

    Raises:
        ValueError: the corpus gives no pictures, or the folder holds clips of another corpus.
    """
    if not corpus.options.video:
        raise ValueError("video=False: a corpus is written with its pictures")
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    made_by = {
        "seed": corpus.seed,
        "split": corpus.split,
        "bank": corpus.bank.fingerprint,
        "options": json.loads(json.dumps(vars(corpus.options), default=str)),
    }
    _claim(target / "corpus.json", made_by)
    records: dict[int, dict[str, Any]] = {}
    if (target / TABLE).is_file():
        lines = (target / TABLE).read_text(encoding="utf8").splitlines()
        records = {
            r["index"]: r for r in map(json.loads, lines) if (target / r["file_name"]).is_file()
        }
    for index in range(len(corpus)) if indices is None else indices:
        if index not in records:
            records[index] = _write_one(corpus[index], target)
            if len(records) % 16 == 0:
                _write_table(target, records)
        if report is not None:
            report(len(records))
    _write_table(target, records)
    return len(records)


def _claim(path: Path, made_by: dict[str, Any]) -> None:
    """Note what made the folder; refuse a folder that something else made."""
    if path.is_file():
        if json.loads(path.read_text()) != made_by:
            raise ValueError(
                f"folder={str(path.parent)!r}: holds clips of another corpus; choose an empty "
                "folder"
            )
        return
    _write_text(path, json.dumps(made_by, indent=1) + "\n")


def _write_one(item: dict[str, Any], target: Path) -> dict[str, Any]:
    """Write one clip -> its line of the table."""
    name = f"{item['index']:06d}.mp4"
    sound = item["audio"].numpy() if "audio" in item else None
    write_clip(target / name, item["video"].numpy(), item["fps"], sound, item["sample_rate"])
    record = {
        "file_name": name,
        **{key: item[key] for key in PLAIN},
        "phones": [list(p) for p in item["phones"]],
    }
    if "mouth" in item:
        record["mouth"] = np.round(item["mouth"], 3).astype(float).tolist()
    return record


def _write_table(target: Path, records: dict[int, dict[str, Any]]) -> None:
    lines = [json.dumps(records[index], ensure_ascii=False) for index in sorted(records)]
    _write_text(target / TABLE, "\n".join(lines) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write aside, then rename: a reader never sees half a file."""
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
    temporary_path.write_text(text, encoding="utf8")
    os.replace(temporary_path, path)
