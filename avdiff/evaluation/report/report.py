"""Reports of a measurement: table, JSON, CSV and one HTML page; summaries with intervals; two runs
compared.

A *row* is a flat dict for one clip: `file`, `status`, `error` (text, "" when all went well) and
numbers with the unit in the key (`offset_ms`). A curve (a list of numbers) may stand in a row: JSON
and page keep it, the CSV leaves it out. Rates over many words or phones are ratios of sums, never
means of ratios: see `RATIOS`.

    write_reports(rows, {"backend": "lip_network", "weights": "3fa0..."}, json="a.json",
    csv="a.csv", html="a.html") print_comparison(compare("a.json", "b.json"))
"""

from __future__ import annotations

import csv as csv_format
import io
import json as json_format
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Row = Mapping[str, Any]
OK = "ok"
RESAMPLES = 1000
LEVEL = 0.95
#: name -> (count of errors or hits, count of chances): summed over clips before they are divided.
RATIOS: dict[str, tuple[str, str]] = {
    "wer": ("word_errors", "words"),
    "digit_wer": ("digit_errors", "digits"),
    "grid_wer": ("grid_errors", "grid_words"),
    "per": ("phone_errors", "phones"),
    "bilabial_recall": ("bilabials_closed", "bilabials"),
    "open_vowel_recall": ("open_vowels_open", "open_vowels"),
    "viseme_accuracy": ("visemes_right", "viseme_frames"),
    "event_hit_rate": ("event_hits", "event_onsets"),
    "attribute_accuracy": ("attributes_right", "attributes_stated"),
}
_COUNTED = frozenset(name for pair in RATIOS.values() for name in pair)
#: a larger value is worse where a key holds one of these words; size alone counts for offsets and
#: lags
_WORSE = ("error", "wer", "per", "distance", "clipped", "difference", "silence", "desync")
_SIGNED = ("offset", "lag")


@dataclass(frozen=True)
class Estimate:
    """A number over `n` clips with its 95 % bootstrap interval (percentile method, Efron 1979;
    clips are resampled).
    """

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{short(self.mean)} [{short(self.low)}, {short(self.high)}]"


# ------------------------------------------------------------------------------------------ numbers
def is_number(value: Any) -> bool:
    """A finite number or a truth value."""
    return isinstance(value, int | float | np.integer | np.floating | np.bool_) and math.isfinite(
        float(value)
    )


def short(value: float) -> str:
    """Four digits that count, without an exponent where it can be avoided."""
    if not math.isfinite(value):
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def interval(
    top: Sequence[float] | np.ndarray,
    bottom: Sequence[float] | np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Estimate:
    """Mean of `top`, or sum(top) / sum(bottom), with its interval over clips; a single clip has no
    interval (NaN).

    Raises:
        ValueError: no values, or rows of different length.
    """
    above = np.asarray(top, np.float64)
    below = np.ones_like(above) if bottom is None else np.asarray(bottom, np.float64)
    if above.ndim != 1 or not len(above) or above.shape != below.shape:
        raise ValueError(
            f"top has shape {above.shape}, bottom {below.shape}: needs two rows of one length "
            "above 0"
        )
    if not below.sum():
        return Estimate(math.nan, math.nan, math.nan, len(above))
    mean = float(above.sum() / below.sum())
    if len(above) == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    drawn = np.random.default_rng(seed).integers(len(above), size=(resamples, len(above)))
    sums = above[drawn].sum(axis=1)
    chances = below[drawn].sum(axis=1)
    ratios = sums[chances != 0] / chances[chances != 0]
    edge = (1 - LEVEL) / 2
    return Estimate(
        mean, float(np.quantile(ratios, edge)), float(np.quantile(ratios, 1 - edge)), len(above)
    )


def number_columns(rows: Iterable[Row]) -> list[str]:
    """Keys that hold a number in any row, in the order of their first sight."""
    return list(
        dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    )


def column(rows: Iterable[Row], key: str) -> np.ndarray:
    """The finite numbers under a key."""
    return np.array([float(row[key]) for row in rows if is_number(row.get(key))], np.float64)


def _pairs(rows: Iterable[Row], pair: tuple[str, str]) -> list[Row]:
    """Rows that hold both counts, and a chance."""
    top, bottom = pair
    return [
        row
        for row in rows
        if is_number(row.get(top)) and is_number(row.get(bottom)) and row[bottom] > 0
    ]


def summarise(rows: Sequence[Row], resamples: int = RESAMPLES) -> dict[str, Any]:
    """Counts of all rows by status, and for each number its mean, interval and n over the clips
    that have it.

    Returns:
        {"clips": int, "status": {status: count}, "numbers": {key: Estimate}}; ratios of `RATIOS`
        stand in place of the counts they are made of.
    """
    numbers: dict[str, Estimate] = {}
    for name, pair in RATIOS.items():
        usable = _pairs(rows, pair)
        if usable:
            numbers[name] = interval(column(usable, pair[0]), column(usable, pair[1]), resamples)
    for key in number_columns(rows):
        if key not in _COUNTED and key not in RATIOS:
            numbers[key] = interval(column(rows, key), resamples=resamples)
    return {
        "clips": len(rows),
        "status": dict(Counter(str(row.get("status", OK)) for row in rows)),
        "numbers": numbers,
    }


def grouped(rows: Sequence[Row], key: str) -> dict[str, list[Row]]:
    """Rows by the text under a key, in the order of their first sight; rows without it are left
    out.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(key) not in (None, ""):
            groups.setdefault(str(row[key]), []).append(row)
    return groups


def worst_first(rows: Sequence[Row], rank: str | None = None) -> list[Row]:
    """Failures, then the worst by one number, then clips that do not have it; without `rank` by the
    first offset, lag, or else first number found.
    """
    keys = number_columns(rows)
    found = rank or next((k for k in keys if k.startswith(_SIGNED)), keys[0] if keys else "")

    def badness(row: Row) -> tuple[bool, bool, float]:
        fine = row.get("status", OK) == OK
        known = is_number(row.get(found))
        size = float(row[found]) if known else 0.0
        worse = (
            abs(size)
            if found.startswith(_SIGNED)
            else size
            if any(w in found for w in _WORSE)
            else -size
        )
        return fine, not known, -worse

    return sorted(rows, key=badness)


# ------------------------------------------------------------------------------------------ writing
def _plain(value: Any) -> Any:
    """What JSON can hold: NaN and infinity become null, arrays lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple | set):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Estimate):
        return _plain(asdict(value))
    return value if isinstance(value, str | int | bool | None) else str(value)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a file aside, then put it in its place; its folder is made."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
    temporary_path.write_text(text, encoding="utf8")
    os.replace(temporary_path, target)


def _csv(rows: Sequence[Row]) -> str:
    """One line a clip; lists and other nested values stay out."""
    keys = list(
        dict.fromkeys(
            key
            for row in rows
            for key, value in row.items()
            if value is None or isinstance(value, str) or np.isscalar(value)
        )
    )
    buffer = io.StringIO()
    writer = csv_format.DictWriter(buffer, keys, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = _plain(row)
        writer.writerow({key: "" if plain.get(key) is None else plain[key] for key in keys})
    return buffer.getvalue()


def write_reports(
    rows: Sequence[Row],
    header: Mapping[str, Any],
    json: str | os.PathLike[str] | None = None,
    csv: str | os.PathLike[str] | None = None,
    html: str | os.PathLike[str] | None = None,
    rank: str | None = None,
    title: str = "avdiff evaluation",
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = (),
) -> dict[str, Any]:
    """Write what is asked for; each file appears when complete.

    Args:
        rows: one a clip, failures too. header: facts about the run: backend, version, hash of the
            weights, options.
        json, csv, html: files to write. rank: key that sorts the page, worst first (see
            `worst_first`).
        tables: more tables for the page: (title, head, rows of text).

    Returns:
        the summary of `summarise`.
    """
    summary = summarise(rows)
    if json is not None:
        text = {"header": _plain(header), "summary": _plain(summary), "rows": _plain(list(rows))}
        write_text(
            json, json_format.dumps(text, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        )
    if csv is not None:
        write_text(csv, _csv(rows))
    if html is not None:
        from avdiff.evaluation.report.page import page

        folder = Path(html).resolve().parent
        write_text(html, page(worst_first(rows, rank), header, summary, folder, title, tables))
    return summary


def read_report(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a JSON report.

    Raises:
        ValueError: no such file, or no report.
    """
    try:
        rows = json_format.loads(Path(path).read_text(encoding="utf8"))["rows"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: no JSON report of avdiff eval: {type(error).__name__}"
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: no JSON report of avdiff eval: rows must be a list of objects")
    return rows


# ---------------------------------------------------------------------------------------- comparing
@dataclass(frozen=True)
class Difference:
    """One number in two runs over the clips that both have; `difference` is b - a with its paired
    interval.
    """

    key: str
    a: float
    b: float
    difference: Estimate

    @property
    def clear(self) -> bool:
        """The interval leaves out 0."""
        return self.difference.low > 0 or self.difference.high < 0


def _identity(row: Row) -> str:
    """What names a clip in both runs: its id if it has one, else the name of its file."""
    return str(row.get("id") or Path(str(row.get("file", ""))).name)


def compare(
    run_a: Sequence[Row] | str | os.PathLike[str],
    run_b: Sequence[Row] | str | os.PathLike[str],
    resamples: int = RESAMPLES,
) -> list[Difference]:
    """Paired differences b - a of each number, or ratio of sums, over the clips of both runs.

    Args:
        run_a, run_b: rows, or JSON reports. Clips are matched by `id`, else by the name of the
            file.

    Raises:
        ValueError: no clip is in both, or one run has two clips of the same name.
    """
    tables = []
    for name, run in (("run_a", run_a), ("run_b", run_b)):
        rows: Sequence[Row] = read_report(run) if isinstance(run, str | os.PathLike) else run
        table = {_identity(row): row for row in rows}
        if len(table) != len(rows):
            raise ValueError(
                f"{name} has {len(rows)} clips with {len(table)} names: needs a name of its own "
                "for each"
            )
        tables.append(table)
    first, second = tables
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(
            "run_a and run_b have no clip in common: clips are matched by id or by the name of "
            "the file"
        )
    pairs = [(first[key], second[key]) for key in shared]
    found: list[Difference] = []
    for name, counts in RATIOS.items():
        usable = [(a, b) for a, b in pairs if _pairs([a], counts) and _pairs([b], counts)]
        if usable:
            found.append(_difference(name, usable, counts, resamples))
    keys = [k for k in number_columns(a for a, _ in pairs) if k not in _COUNTED and k not in RATIOS]
    for key in keys:
        usable = [(a, b) for a, b in pairs if is_number(a.get(key)) and is_number(b.get(key))]
        if usable:
            found.append(_difference(key, usable, None, resamples))
    return found


def _difference(
    key: str, pairs: Sequence[tuple[Row, Row]], counts: tuple[str, str] | None, resamples: int
) -> Difference:
    """Resample pairs, not clips of each run apart: what both runs find hard cancels out."""
    top = np.array(
        [[float(row[counts[0] if counts else key]) for row in pair] for pair in pairs]
    )  # (n, 2)
    bottom = (
        np.array([[float(row[counts[1]]) for row in pair] for pair in pairs])
        if counts
        else np.ones_like(top)
    )
    a, b = top.sum(axis=0) / bottom.sum(axis=0)
    low = high = math.nan
    if len(pairs) > 1:
        drawn = np.random.default_rng(0).integers(len(pairs), size=(resamples, len(pairs)))
        means = top[drawn].sum(axis=1) / bottom[drawn].sum(axis=1)  # (resamples, 2)
        edge = (1 - LEVEL) / 2
        low, high = np.quantile(means[:, 1] - means[:, 0], [edge, 1 - edge]).tolist()
    return Difference(key, float(a), float(b), Estimate(float(b - a), low, high, len(pairs)))


# ------------------------------------------------------------------------------------------- tables
def print_rows(rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """One line a clip on stdout; by default file, status and the first eight numbers."""
    from rich.console import Console
    from rich.table import Table

    keys = list(columns or number_columns(rows)[:8])
    table = Table("file", "status", *keys)
    for row in rows:
        cells = [
            short(float(row[key])) if is_number(row.get(key)) else str(row.get(key) or "-")
            for key in keys
        ]
        table.add_row(
            Path(str(row.get("file", row.get("id", "")))).name, str(row.get("status", OK)), *cells
        )
        if row.get("error"):
            table.add_row("", f"[dim]{str(row['error']).replace('[', '(')}[/dim]")
    Console().print(table)


def print_summary(summary: Mapping[str, Any], header: Mapping[str, Any] | None = None) -> None:
    """Counts by status and every number with its interval, on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for key, value in (header or {}).items():
        console.print(f"{key}: {value}", markup=False)
    counts = ", ".join(f"{count} {status}" for status, count in summary["status"].items())
    console.print(f"{summary['clips']} clips: {counts}", markup=False)
    table = Table("number", "mean", "95 % interval", "clips")
    for key, found in summary["numbers"].items():
        table.add_row(
            key, short(found.mean), f"{short(found.low)} to {short(found.high)}", str(found.n)
        )
    console.print(table)


def print_comparison(differences: Sequence[Difference]) -> None:
    """Both runs side by side on stdout; a star marks an interval that leaves out 0."""
    from rich.console import Console
    from rich.table import Table

    table = Table("number", "a", "b", "b - a", "95 % interval", "", "pairs")
    for one in differences:
        d = one.difference
        table.add_row(
            one.key,
            short(one.a),
            short(one.b),
            short(d.mean),
            f"{short(d.low)} to {short(d.high)}",
            "*" if one.clear else "",
            str(d.n),
        )
    Console(highlight=False).print(table)
