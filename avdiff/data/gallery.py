"""`avdiff data show`: one HTML page of clips: pictures, spectrogram, mouth curve, captions. No
script, no network.
"""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from avdiff.data.clip_table import ClipEntry, find_clips
from avdiff.files import write_text
from avdiff.media.container import MediaError
from avdiff.media.pictures import contact_sheet, spectrogram_picture
from avdiff.media.read import read_clip
from avdiff.media.stills import read_still
from avdiff.phonetics.phone import Phone

# pixels
WIDTH = 960
CURVE = 60
LONGEST = 60.0  # seconds of a clip that the page shows
STYLE = """body{font:15px/1.4 sans-serif;margin:2em auto;max-width:1000px;color:#222}
section{margin:0 0 2.5em}img,svg{display:block;width:100%;margin:2px 0}h2{font-size:1.05em;margin:.3em 0}
small{color:#666}ul{margin:.3em 0;padding-left:1.2em}svg{background:#f4f4f8}"""


def write_gallery(
    items: Iterable[dict[str, Any]], path: str | os.PathLike[str], title: str = "Clips"
) -> int:
    """Write clips, as `PresenterCorpus` and `RealClips` give them, as one HTML file -> number of
    clips.

    Args:
        items: clips with any of video (F, H, W, 3), audio (C, S), mouth (F, 6), phones, impacts,
            captions.
        path: the file to write; it appears when complete.
    """
    sections = [_section(item) for item in items]
    head = (
        "<!doctype html><meta "
        f"charset=utf-8><title>{html.escape(title)}</title><style>{STYLE}</style>"
    )
    text = "\n".join([head, f"<h1>{html.escape(title)}</h1>", *sections]) + "\n"
    write_text(path, text)
    return len(sections)


def folder_items(folder: str | os.PathLike[str], count: int) -> Iterator[dict[str, Any]]:
    """The first `count` clips of a folder as they are, whatever their size and rate; a file that
    cannot be read gives an item with its name and `refused`, the reason.

    Raises:
        ValueError: no such folder, or nothing in it that looks like a clip.
    """
    table = find_clips(folder)
    for entry in table.entries[:count]:
        item: dict[str, Any] = {"name": entry.name, "captions": list(entry.captions)}
        try:
            media = _entry_media(entry)
        except MediaError as error:
            yield {**item, "refused": str(error)}
            continue
        phones = entry.extra.get("phones") or ()
        item |= {**media, "phones": tuple(Phone(*phone) for phone in phones)}
        if entry.extra.get("mouth"):
            item["mouth"] = np.asarray(entry.extra["mouth"])
        yield item
    for name, reason in list(table.refused.items())[: max(0, count - len(table.entries))]:
        yield {"name": name, "captions": [], "refused": reason}


def _entry_media(entry: ClipEntry) -> dict[str, Any]:
    """Pictures and sound of a clip, as far as the page shows them."""
    if entry.is_still and entry.video is not None:
        return {"video": read_still(entry.video)[None], "fps": Fraction(25)}
    main = entry.video or entry.audio
    assert main is not None, "find_clips refuses entries without media"
    clip = read_clip(main, max_seconds=LONGEST)
    sound = clip
    if entry.audio is not None and entry.video is not None:
        sound = read_clip(entry.audio, max_seconds=LONGEST)
    return {
        "video": clip.frames,
        "fps": clip.fps,
        "audio": sound.audio,
        "sample_rate": sound.sample_rate,
    }


def _section(item: dict[str, Any]) -> str:
    """One clip."""
    name = str(item.get("name") or f"{item.get('kind', 'clip')} {item.get('index', '')}")
    parts = [f"<section><h2>{html.escape(name)}</h2>"]
    seconds = _seconds(item)
    if item.get("video") is not None:
        sheet = contact_sheet(np.asarray(item["video"]), count=12, columns=12)
        parts.append(_picture(sheet.resize((WIDTH, round(WIDTH * sheet.height / sheet.width)))))
    if item.get("audio") is not None:
        drawn = spectrogram_picture(np.asarray(item["audio"]), item["sample_rate"], height=160)
        parts.append(_picture(drawn.resize((WIDTH, 160))))
    if item.get("refused"):
        parts.append(f"<p>cannot be used: {html.escape(item['refused'])}</p>")
    parts.append(_curve(item, seconds))
    parts += [
        "<ul>",
        *(f"<li>{html.escape(c)}</li>" for c in item.get("captions") or [item.get("caption", "")]),
        "</ul>",
    ]
    facts = {
        "seconds": f"{seconds:.2f}",
        "language": item.get("language"),
        **(item.get("attributes") or {}),
    }
    told = ", ".join(
        f"{key} {value}" for key, value in facts.items() if value not in (None, "", "none")
    )
    return "\n".join([*parts, f"<small>{html.escape(told)}</small></section>"])


def _seconds(item: dict[str, Any]) -> float:
    if item.get("video") is not None:
        return len(item["video"]) / float(item["fps"])
    return item["audio"].shape[-1] / item["sample_rate"] if item.get("audio") is not None else 0.0


def _picture(picture: Image.Image) -> str:
    """A picture inside the page."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, "WEBP", quality=80)
    return f'<img src="data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _curve(item: dict[str, Any], seconds: float) -> str:
    """Opening of the mouth over time with the phones below it, or the impacts of an event, as SVG;
    "" without truth.
    """
    drawn: list[str] = []
    if item.get("mouth") is not None:
        opening = np.asarray(item["mouth"])[:, 0]
        points = " ".join(
            f"{(i + 0.5) / len(opening) * WIDTH:.1f},{44 - 40 * v:.1f}"
            for i, v in enumerate(opening)
        )
        drawn.append(f'<polyline points="{points}" fill="none" stroke="#c33" stroke-width="1.5"/>')
    for phone in item.get("phones") or ():
        if phone[0] not in ("", "sil"):
            middle = (phone[1] + phone[2]) / 2 / seconds * WIDTH
            drawn.append(
                f'<text x="{middle:.1f}" y="57" font-size="10" '
                f'text-anchor="middle">{html.escape(phone[0])}</text>'
            )
    for time in item.get("contacts") or ():
        drawn.append(f'<path d="M{time / seconds * WIDTH:.1f} 0V{CURVE}" stroke="#36c"/>')
    return f'<svg viewBox="0 0 {WIDTH} {CURVE}">{"".join(drawn)}</svg>' if drawn else ""
