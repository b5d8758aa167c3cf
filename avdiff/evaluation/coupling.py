"""Is it the coupling that makes lips fit? The same prompts and seeds with the links between sound
and picture cut.

An *arm* is a folder of clips of the same names: `whole` with the links, `cut` without
cross-attention and shared stream, and any others. From the whole arm's own clips `swapped` is
measured too: each picture with the sound of another clip. If lips fit as well with the links cut,
they follow the script and not the sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.evaluation.metrics.visual_speech import visual_speech
from avdiff.evaluation.report.report import Difference, Estimate, Row, column, compare, interval
from avdiff.evaluation.suite import Evaluators
from avdiff.media.write import Clip, read_clip

KEY = "mouth_r"


def swapped(clips: Sequence[Clip]) -> list[Clip]:
    """Each clip's pictures with the sound of the next one, cut or filled with silence to its
    length.

    Raises:
        ValueError: fewer than two clips, or one without sound.
    """
    if len(clips) < 2 or any(clip.audio is None for clip in clips):
        raise ValueError(f"{len(clips)} clips: needs at least two, all with sound")
    mixed = []
    for one, other in zip(clips, [*clips[1:], clips[0]], strict=True):
        assert one.audio is not None and other.audio is not None and other.sample_rate is not None
        seconds = one.audio.shape[-1] / float(one.sample_rate or 1)
        wanted = round(seconds * other.sample_rate)
        sound = np.pad(other.audio, ((0, 0), (0, max(0, wanted - other.audio.shape[-1]))))[
            :, :wanted
        ]
        mixed.append(replace(one, audio=sound, sample_rate=other.sample_rate))
    return mixed


def arm_rows(clips: Mapping[str, Clip], by: Evaluators) -> list[dict[str, Any]]:
    """Visual-speech rows of an arm: clip name -> clip."""
    rows = []
    for name, clip in clips.items():
        row: dict[str, Any] = {"id": name, "status": "ok", "error": ""}
        try:
            row |= visual_speech(clip, reader=by.face_reader, recognizer=by.recognizer)
        except ValueError as error:
            row |= {"status": "error", "error": str(error)}
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Coupling:
    """One arm: its correlation of lips and sound, and the paired difference to the whole
    model's.
    """

    arm: str
    r: Estimate
    difference: Difference | None


def couplings(arms: Mapping[str, Sequence[Row]], whole: str = "whole") -> list[Coupling]:
    """Arms beside the one with all links.

    Raises:
        ValueError: there is no such arm, or an arm in which nothing could be measured.
    """
    if whole not in arms:
        raise ValueError(f"arms are {', '.join(arms)}: needs one called {whole}")
    found = []
    for name, rows in arms.items():
        values = column(rows, KEY)
        if not len(values):
            raise ValueError(
                f"arm {name!r}: lips and sound could be compared in none of its {len(rows)} clips"
            )
        pairs = (
            None
            if name == whole
            else next((d for d in compare(arms[whole], rows) if d.key == KEY), None)
        )
        found.append(Coupling(name, interval(values), pairs))
    return found


def measure_arms(
    folders: Mapping[str, Path], by: Evaluators | None = None, whole: str = "whole"
) -> list[Coupling]:
    """Arms on disk: name -> folder of clips; `swapped` is made from the arm with all links.

    Raises:
        ValueError: a folder without clips, or as `couplings`.
    """
    by = by or Evaluators.bundled()
    arms: dict[str, list[dict[str, Any]]] = {}
    for name, folder in folders.items():
        files = sorted(folder.glob("*.mp4"))
        if not files:
            raise ValueError(f"{folder}: holds no mp4")
        clips = {file.stem: read_clip(file) for file in files}
        arms[name] = arm_rows(clips, by)
        if name == whole and len(clips) > 1:
            arms["swapped"] = arm_rows(
                dict(zip(clips, swapped(list(clips.values())), strict=True)), by
            )
    return couplings(arms, whole)


def print_couplings(found: Sequence[Coupling]) -> None:
    """A table on stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table("arm", "lips against recognized phones, r", "less than whole by", "clips")
    for one in found:
        d = one.difference.difference if one.difference else None
        less = "" if d is None else f"{-d.mean:.3f} \\[{-d.high:.3f}, {-d.low:.3f}]"
        table.add_row(
            one.arm, f"{one.r.mean:.3f} \\[{one.r.low:.3f}, {one.r.high:.3f}]", less, str(one.r.n)
        )
    Console(highlight=False).print(table)
