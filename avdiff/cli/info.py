"""`avdiff info`: the networks in the package, sizes of the presets, facts of a media file."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

import avdiff

LONGEST_TAG = 500  # characters of a tag that are shown
BUNDLED_NETWORKS = {  # folder in avdiff/bundled -> what it is for
    "transformer": "draws and speaks: the presenter",
    "text_encoder": "reads the description",
    "vae": "pictures to latents and back",
    "audio_vae": "sound to latents and back",
    "vocoder": "mel to sound",
    "g2p/pronouncer": "letters to phonemes",
    "g2p/duration_predictor": "phonemes to seconds",
    "recognizer": "evaluator: which phones are heard",
    "face_reader": "evaluator: who and what mouth is seen",
    "lip_network": "evaluator: whether lips fit the sound",
    "contact_detector": "evaluator: which frames show an impact",
}


def info(
    file: Annotated[
        Path | None, typer.Argument(help="A media file; without one, what is in the package.")
    ] = None,
    presets: Annotated[
        bool, typer.Option("--presets", help="How large the sizes are that can be trained.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What the package holds (networks, licence, training data), the presets' sizes, or what is in
    a media file.
    """
    if file is not None:
        print(describe_file(file, as_json))
    elif presets:
        print(describe_presets(as_json))
    else:
        print(describe_bundled(Path(avdiff.PRESENTER), as_json))


def describe_presets(as_json: bool) -> str:
    """Parameters of each preset: of the network, of those how many one token uses, and in the
    tables of its memory.
    """
    import torch

    from avdiff.models import presets
    from avdiff.models.transformer import AVTransformer

    rows: list[dict[str, Any]] = []
    for name, preset in presets.PRESETS.items():
        with torch.device("meta"):  # shapes without memory: the largest would not fit here
            model = AVTransformer(**preset())
        about = (preset.__doc__ or "").strip().splitlines()[0]
        rows.append({"preset": name, **count_parameters(model), "about": about})
    if as_json:
        return json.dumps(rows)
    lines = [f"{'preset':<10} {'network':>9} {'active':>9} {'memory':>9}"]
    for r in rows:
        numbers = " ".join(f"{_short(r[key]):>9}" for key in ("network", "active", "memory"))
        lines.append(f"{r['preset']:<10} {numbers}  {r['about']}")
    return "\n".join(lines)


def describe_bundled(bundled: Path, as_json: bool) -> str:
    """The networks in the package with their values and bytes, the licence, and what they were
    trained on.
    """
    rows: list[dict[str, Any]] = []
    for name, purpose in BUNDLED_NETWORKS.items():
        files = sorted((bundled / name).glob("*.safetensors"))
        if files:
            values = sum(stored_values(file) for file in files)
            size = sum(f.stat().st_size for f in files)
            rows.append({"network": name, "values": values, "bytes": size, "for": purpose})
    card = bundled / "README.md"
    text = card.read_text(encoding="utf8") if card.is_file() else ""
    told = {key: _paragraph(text, key) for key in ("State", "Data", "Limits", "Licence")}
    if as_json:
        return json.dumps(
            {"bundled": rows, **{key.lower(): value for key, value in told.items()}},
            ensure_ascii=False,
        )
    if not rows:
        return "no weights in this copy of the package"
    lines = [f"{'network':<14} {'values':>8} {'MB':>7}"]
    lines += [
        f"{r['network']:<14} {_short(r['values']):>8} {r['bytes'] / 1e6:>7.1f}  {r['for']}"
        for r in rows
    ]
    return "\n".join([*lines, *(f"{key}: {value}" for key, value in told.items() if value)])


def stored_values(file: Path) -> int:
    """Numbers in a safetensors file, by its header.

    Raises:
        ValueError: it is none.
    """
    try:
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return sum(
            math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__"
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise ValueError(f"{file}: is not a safetensors file, or damaged") from error


def _paragraph(card: str, title: str) -> str:
    """The paragraph of a model card that begins with **Title.**, on one line."""
    found = re.search(rf"\*\*{title}\.\*\*\s+(.+?)(?:\n\n|\Z)", card, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def count_parameters(model: Any) -> dict[str, int]:
    """`network`: all weights but memory tables. `active`: without the experts that a token is not
    sent to. `memory`: values in Engram tables, of which a token reads a handful of rows.
    """
    from avdiff.core.memory_table import MemoryTable
    from avdiff.core.moe import MoE

    tables = [m for m in model.modules() if isinstance(m, MemoryTable)]
    memory = sum(b.numel() for table in tables for b in (*table.parameters(), *table.buffers()))
    network = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for t in tables for p in t.parameters()
    )
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoE):
            each = sum(p.numel() for p in layer.experts.parameters()) // layer.router.num_experts
            idle += each * (layer.router.num_experts - layer.router.top_k)
    return {"network": network, "active": network - idle, "memory": memory}


def _short(number: float) -> str:
    for unit in ("", " k", " M", " B"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def describe_file(path: Path, as_json: bool) -> str:
    """Streams, exact lengths and tags of a media file."""
    from avdiff.media.probe import probe

    facts = vars(probe(path)) | {"file": str(path)}
    if as_json:
        return json.dumps(facts, default=float, ensure_ascii=False)
    lines = [str(path)]
    if facts["video_codec"] is not None:
        size = (
            f"{facts['width']} x {facts['height']}, {facts['num_frames']} frames at "
            f"{facts['fps']} a second"
        )
        lines.append(
            f"  picture  {facts['video_codec']}, {size}, {_seconds(facts['video_seconds'])}"
        )
    if facts["audio_codec"] is not None:
        kind = f"{facts['channels']} channel(s), {facts['sample_rate']} Hz"
        lines.append(
            f"  sound    {facts['audio_codec']}, {kind}, {_seconds(facts['audio_seconds'])}"
        )
    lines += [f"  note     {note}" for note in facts["notes"]]
    lines += [f"  {key:<8} {_cut(str(value))}" for key, value in sorted(facts["metadata"].items())]
    return "\n".join(lines)


def _cut(text: str) -> str:
    """A tag's text on one line, at most `LONGEST_TAG` characters of it."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_TAG else f"{line[:LONGEST_TAG]}... ({len(line)} characters)"


def _seconds(value: Any) -> str:
    return "of unknown length" if value is None else f"{float(value):.4f} s"
