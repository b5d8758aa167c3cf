"""The HTML page of a report: one file, no script, no network; light or dark as the reader's system
is.

Each clip has its player (small clips inside the page, large ones by a relative link), its
spectrogram with the mouth's opening drawn over it, and its numbers, worst clip first.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from avdiff.evaluation.report.report import OK, Row, column, is_number, number_columns, short
from avdiff.media.write import read_clip, spectrogram_picture

SHOWN = 60  # clips with a player; the others stand in the table
EMBEDDED = 3_000_000  # bytes of a clip that goes into the page, in 40 MB for all
EMBEDDED_ALL = 40_000_000
SAID = ("file", "status", "error", "prompt", "id")  # stand above the numbers of a clip
# pixels of a spectrogram
WIDTH = 640
HEIGHT = 160
STYLE = """
:root{color-scheme:light dark;--ground:#fff;--text:#1c1c22;--soft:#666;--line:#ddd;--panel:#f5f5f8;--mark:#2563c9;
--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ground:#16171b;--text:#e6e6ea;--soft:#9a9aa4;--line:#34353c;--panel:#1f2026;
--mark:#7fb0ff;--bad:#ff8a80}}
body{font:15px/1.45 system-ui,sans-serif;margin:2em auto;max-width:1060px;padding:0 1em;background:var(--ground);
color:var(--text)}h1{font-size:1.5em}h2{font-size:1.1em;margin:1.6em 0 .4em}small,.soft{color:var(--soft)}
table{border-collapse:collapse;font-size:.92em}td,th{padding:.2em .7em;border-bottom:1px solid var(--line);
text-align:left}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}.wide{overflow-x:auto}
section{background:var(--panel);border-radius:8px;padding:.8em 1em;margin:0 0 1em}
.clip{display:flex;gap:1em;flex-wrap:wrap;align-items:flex-start}video{width:192px;max-height:192px;border-radius:4px;background:#000}
.sound{position:relative;flex:1 1 320px;min-width:280px;max-width:640px}
.sound img{display:block;width:100%;height:160px;border-radius:4px}
.sound svg{position:absolute;inset:0;width:100%;height:160px}
.bad{color:var(--bad)}svg text{fill:var(--text)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(205px,1fr));
gap:.1em 1em;margin:.5em 0 0;font-size:.88em}dl div{display:flex;justify-content:space-between;gap:.6em}
dt{color:var(--soft)}dd{margin:0;font-variant-numeric:tabular-nums}
"""


def page(
    rows: Sequence[Row],
    header: Mapping[str, Any],
    summary: Mapping[str, Any],
    folder: Path,
    title: str,
    tables: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = (),
) -> str:
    """The whole page.

    Args:
        rows: in the order to show. summary: of `summarise`. folder: where the page will lie; links
            are relative to it.
        tables: (title, head, rows) to show before the summary.
    """
    facts = "".join(
        f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in header.items()
    )
    left = EMBEDDED_ALL
    clips: list[str] = []
    for row in rows[:SHOWN]:
        clip, used = _clip(row, folder, left)
        left -= used
        clips.append(clip)
    more = (
        f"<p class=soft>{len(rows) - SHOWN} better clips stand in the table only.</p>"
        if len(rows) > SHOWN
        else ""
    )
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        "content='width=device-width'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style>",
        f"<h1>{_text(title)}</h1><table>{facts}</table>",
        *(_text_table(*table) for table in tables),
        "<h2>Summary</h2>",
        _summary(summary),
        _histogram(rows),
        "<h2>Clips, worst first</h2>",
        *clips,
        more,
        "<h2>All clips</h2>",
        _table(rows),
        "</html>",
    ]
    return "\n".join(parts) + "\n"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _summary(summary: Mapping[str, Any]) -> str:
    counts = ", ".join(f"{count} {_text(status)}" for status, count in summary["status"].items())
    lines = "".join(
        f"<tr><td>{_text(key)}</td><td class=n>{short(one.mean)}</td><td "
        f"class=n>{short(one.low)}</td>"
        f"<td class=n>{short(one.high)}</td><td class=n>{one.n}</td></tr>"
        for key, one in summary["numbers"].items()
    )
    return (
        f"<p>{summary['clips']} clips: {counts}.</p><table><tr><th>number<th class=n>mean<th "
        "class=n>95 % from"
        f"<th class=n>to<th class=n>clips</tr>{lines}</table>"
    )


def _text_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}" for cell in row) for row in rows)
    return (
        f"<h2>{_text(title)}</h2><div "
        f"class=wide><table><tr>{''.join(f'<th>{_text(cell)}' for cell in head)}{body}"
        "</table></div>"
    )


def _histogram(rows: Sequence[Row]) -> str:
    """Bars over the offset (frames if given, else ms); "" without offsets."""
    keys = number_columns(rows)
    key = next((k for k in ("offset_frames", "offset_ms") if k in keys), "")
    if not key:
        return ""
    values = column(rows, key)
    step = 1.0 if key == "offset_frames" else 20.0
    places = np.round(values / step).astype(int)
    reach = max(5, int(np.abs(places).max()))
    counts = np.array([(places == place).sum() for place in range(-reach, reach + 1)])
    wide = WIDTH / len(counts)
    bars = []
    for index, count in enumerate(counts):
        high = 90.0 * count / counts.max()
        place = (index - reach) * step
        bars.append(
            f'<rect x="{index * wide + 1:.1f}" y="{96 - high:.1f}" '
            f'width="{max(1.0, wide - 2):.1f}" '
            f'height="{high:.1f}" fill="var(--mark)"><title>{place:g}: {count}</title></rect>'
        )
        if index % max(1, len(counts) // 12) == reach % max(1, len(counts) // 12):
            bars.append(
                f'<text x="{(index + 0.5) * wide:.1f}" y="112" font-size="11" text-anchor="middle">'
                f"{place:g}</text>"
            )
    return (
        f"<h2>{_text(key.replace('_', ', '))}: positive is audio late</h2>"
        f'<svg viewBox="0 0 {WIDTH} 118" width="{WIDTH}" height="118" '
        f'style="max-width:100%">{"".join(bars)}</svg>'
    )


def _clip(row: Row, folder: Path, left: int) -> tuple[str, int]:
    """One clip's section, and the bytes that were put into the page for it."""
    file = Path(str(row.get("file", "")))
    status = str(row.get("status", OK))
    name = str(row.get("id") or file.name)
    marked = "" if status == OK else f" <span class=bad>{_text(status)}</span>"
    parts = [f"<section><h2 style='margin-top:0'>{_text(name)}{marked}</h2>"]
    if row.get("prompt"):
        parts.append(f"<p>{_text(row['prompt'])}</p>")
    if row.get("error"):
        parts.append(f"<p class=bad>{_text(row['error'])}</p>")
    used = 0
    if file.is_file():
        source, used = _source(file, folder, left)
        player = f'<video controls loop preload=metadata src="{source}"></video>'
        parts.append(f"<div class=clip>{player}{_heard(row, file)}</div>")
    facts = "".join(
        f"<div><dt>{_text(key)}</dt><dd>{_value(value)}</dd></div>"
        for key, value in row.items()
        if key not in SAID and (is_number(value) or (isinstance(value, str) and value))
    )
    return "".join([*parts, f"<dl>{facts}</dl></section>"]), used


def _value(value: Any) -> str:
    return (
        short(float(value))
        if is_number(value) and not isinstance(value, bool | np.bool_)
        else _text(value)
    )


def _source(file: Path, folder: Path, left: int) -> tuple[str, int]:
    """A data: address for a small mp4, else a relative link."""
    size = file.stat().st_size
    if file.suffix.lower() in (".mp4", ".webm") and size <= min(EMBEDDED, left):
        kind = "webm" if file.suffix.lower() == ".webm" else "mp4"
        return f"data:video/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}", size
    try:
        link = os.path.relpath(file.resolve(), folder)
    except ValueError:  # another drive
        return file.resolve().as_uri(), 0
    return html.escape(quote(link.replace(os.sep, "/"))), 0


def _heard(row: Row, file: Path) -> str:
    """Spectrogram with the mouth's opening over it; "" for a file whose sound cannot be read."""
    try:
        clip = read_clip(file, size=16, max_seconds=60)
    except ValueError:
        return ""
    if clip.audio is None or clip.sample_rate is None or not clip.audio.size:
        return ""
    seconds = clip.audio.shape[-1] / clip.sample_rate
    picture = (
        spectrogram_picture(clip.audio, clip.sample_rate, height=HEIGHT)
        .convert("RGB")
        .resize((WIDTH, HEIGHT))
    )
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(buffer, "WEBP", quality=70)
    drawn = base64.b64encode(buffer.getvalue()).decode()
    fps = row.get("fps") or clip.fps  # the curves' own rate, where a clip was resampled to be read
    curves = _polyline(row.get("mouth_curve"), fps, seconds, "#ffffff")
    curves += _polyline(row.get("expected_curve"), fps, seconds, "#ffb020")
    note = (
        "<small>mouth opening from the pixels: white; as the sound would have it: orange</small>"
        if curves
        else ""
    )
    return (
        f'<div class=sound><img alt="spectrogram" src="data:image/webp;base64,{drawn}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none">{curves}</svg>{note}</div>'
    )


def _polyline(curve: Any, fps: Any, seconds: float, colour: str) -> str:
    """An opening of 0 to 1 for each frame, at the middle of its time; gaps where it is not
    known.
    """
    if curve is None or not len(curve) or not fps or seconds <= 0:
        return ""
    runs: list[list[str]] = [[]]
    for index, value in enumerate(curve):
        if value is None or not np.isfinite(value):
            runs.append([])
            continue
        x = (index + 0.5) / float(fps) / seconds * WIDTH
        runs[-1].append(
            f"{x:.1f},{HEIGHT - 6 - min(max(float(value), 0.0), 1.2) * (HEIGHT - 24) / 1.2:.1f}"
        )
    return "".join(
        f'<polyline points="{" ".join(run)}" fill="none" stroke="#000" stroke-width="4" '
        'opacity=".4"/>'
        f'<polyline points="{" ".join(run)}" fill="none" stroke="{colour}" stroke-width="2"/>'
        for run in runs
        if len(run) > 1
    )


def _table(rows: Sequence[Row]) -> str:
    keys = number_columns(rows)
    head = "".join(f"<th class=n>{_text(key)}" for key in keys)
    body = "".join(
        f"<tr><td>{_text(row.get('id') or Path(str(row.get('file', ''))).name)}<td>{_text(row.get('status', OK))}"
        + "".join(
            f"<td class=n>{short(float(row[key])) if is_number(row.get(key)) else '-'}"
            for key in keys
        )
        for row in rows
    )
    return f"<div class=wide><table><tr><th>clip<th>status{head}{body}</table></div>"
