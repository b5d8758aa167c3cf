"""The table that sums up a model: one line a metric, one column a set of clips (the model, the
codecs, the corpus).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from avdiff.evaluation.report.report import (
    OK,
    RATIOS,
    Estimate,
    Row,
    column,
    interval,
    is_number,
    number_columns,
)

Measure = Callable[[Sequence[Row]], Estimate | None]


def ratio(name: str) -> Measure:
    """A ratio of sums by its name in `RATIOS`."""
    top, bottom = RATIOS[name]

    def measure(rows: Sequence[Row]) -> Estimate | None:
        usable = [
            row
            for row in rows
            if is_number(row.get(top)) and is_number(row.get(bottom)) and row[bottom] > 0
        ]
        return interval(column(usable, top), column(usable, bottom)) if usable else None

    return measure


def mean(key: str, of: Callable[[np.ndarray], np.ndarray] = lambda values: values) -> Measure:
    """Mean of a number, or of a function of it."""

    def measure(rows: Sequence[Row]) -> Estimate | None:
        values = column(rows, key)
        return interval(of(values)) if len(values) else None

    return measure


def usable_share(rows: Sequence[Row]) -> Estimate | None:
    """Share of clips that could be measured."""
    return interval([row.get("status", OK) == OK for row in rows]) if rows else None


def within(key: str, most: float) -> Measure:
    """Share of clips whose number is at most `most` in size; a speaking clip without the number is
    outside.
    """

    def measure(rows: Sequence[Row]) -> Estimate | None:
        asked = [row for row in rows if row.get("kind") != "event"]
        if not any(is_number(row.get(key)) for row in asked):
            return None
        return interval([is_number(row.get(key)) and abs(row[key]) <= most for row in asked])

    return measure


#: (name, what is better, measure), in the order of the table; PER of each language and attributes
#: follow.
METRICS: list[tuple[str, str, Measure]] = [
    ("clips that could be measured", "1", usable_share),
    ("digit word errors (pocketsphinx)", "0", ratio("digit_wer")),
    ("GRID word errors (pocketsphinx)", "0", ratio("grid_wer")),
    ("phone errors, all languages", "0", ratio("per")),
    ("lip offset within 1 frame", "1", within("offset_frames", 1.0)),
    ("size of the lip offset, ms", "0", mean("offset_ms", np.abs)),
    ("lips against recognized phones, r", "1", mean("mouth_r")),
    ("lag of its peak, ms", "0", mean("mouth_lag_ms")),
    ("bilabials seen closed", "1", ratio("bilabial_recall")),
    ("open vowels seen open", "1", ratio("open_vowel_recall")),
    ("visemes right", "1", ratio("viseme_accuracy")),
    ("attributes right, all stated", "1", ratio("attribute_accuracy")),
    ("voice of the stated gender", "1", mean("voice_as_stated")),
    ("attributes kept, first to last picture", "1", mean("identity_kept")),
    ("background step, of 255", "0", mean("background_difference")),
    ("event onsets with a contact within 1 frame", "1", ratio("event_hit_rate")),
    ("strokes in the sound as asked", "1", mean("count_sound_right")),
    ("strokes in the picture as asked", "1", mean("count_picture_right")),
    ("peak", "<1", mean("peak")),
    ("loudness, LUFS", "", mean("loudness_lufs")),
    ("clipped samples", "0", mean("clipped_share")),
    ("phones a second", "", mean("phones_per_s")),
    ("predicted opinion, DNSMOS", "5", mean("dnsmos_ovrl")),
]


@dataclass(frozen=True)
class MetricsTable:
    """Metrics by name, then by set of clips; `better` tells the best value there is."""

    sets: tuple[str, ...]
    better: dict[str, str]
    metrics: dict[str, dict[str, Estimate]]

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows as text."""

        def cell(found: Estimate) -> str:
            return f"{found.mean:.3g} [{found.low:.3g}, {found.high:.3g}] (n {found.n})".replace(
                "nan", "-"
            )

        rows = [
            [name, *(cell(one[s]) if s in one else "-" for s in self.sets), self.better[name]]
            for name, one in self.metrics.items()
        ]
        return ["metric", *self.sets, "best"], rows

    def record(self) -> dict[str, Any]:
        """The same for JSON; NaN becomes null."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return {
            name: {s: {k: plain(v) for k, v in asdict(found).items()} for s, found in one.items()}
            for name, one in self.metrics.items()
        }


def metrics_table(rows: Mapping[str, Sequence[Row]]) -> MetricsTable:
    """Metrics of each set of clips; a metric that no set has is left out.

    One line is relative: the correlation of lips and sound over that of the set "corpus", on the
    prompts of both.
    """
    lines = list(METRICS)
    if "corpus" in rows:
        place = 1 + [name for name, _, _ in lines].index("lips against recognized phones, r")
        lines.insert(
            place,
            (
                "  as a share of the corpus's",
                "1",
                lambda members: _relative(members, rows["corpus"]),
            ),
        )
    everything = [row for members in rows.values() for row in members]
    languages = dict.fromkeys(
        str(row["language"]) for row in everything if row.get("phones") is not None
    )
    for language in languages:
        lines.append((f"phone errors, {language}", "0", _only(ratio("per"), "language", language)))
    for key in number_columns(everything):
        if key.startswith("looks_"):
            lines.append((f"{key.removeprefix('looks_').replace('_', ' ')} right", "1", mean(key)))
    metrics: dict[str, dict[str, Estimate]] = {}
    better: dict[str, str] = {}
    for name, best, measure in lines:
        found = {s: value for s, members in rows.items() if (value := measure(members)) is not None}
        if found:
            metrics[name], better[name] = found, best
    return MetricsTable(tuple(rows), better, metrics)


def _only(measure: Measure, key: str, value: str) -> Measure:
    return lambda rows: measure([row for row in rows if row.get(key) == value])


def _relative(rows: Sequence[Row], corpus: Sequence[Row]) -> Estimate | None:
    """Sum of mouth_r over the sum of the corpus's, on prompts that both have."""
    truth = {
        _prompt_of(row): float(row["mouth_r"]) for row in corpus if is_number(row.get("mouth_r"))
    }
    usable = [row for row in rows if is_number(row.get("mouth_r")) and _prompt_of(row) in truth]
    if not usable:
        return None
    return interval(column(usable, "mouth_r"), [truth[_prompt_of(row)] for row in usable])


def _prompt_of(row: Row) -> str:
    """The id without the seed at its end: "en-digits-03-s1" -> "en-digits-03"."""
    return str(row.get("id", "")).rsplit("-s", 1)[0]


def print_metrics(table: MetricsTable) -> None:
    """The table on stdout."""
    from rich.console import Console
    from rich.table import Table

    head, rows = table.cells()
    shown = Table(*head)
    for row in rows:
        shown.add_row(*(cell.replace("[", "\\[") for cell in row))
    Console(highlight=False).print(shown)
