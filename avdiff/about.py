"""What `avdiff info` and `avdiff doctor` say: sizes of the presets, facts of a file, the state of this installation."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

CODECS = {"libx264": "w", "aac": "w", "pcm_s16le": "w", "h264": "r", "libopus": "r"}
LIBRARIES = ("torch", "torchaudio", "diffusers", "transformers", "accelerate", "peft", "safetensors", "av", "numpy")
ROOM = 2**30  # bytes of free disk below which a training run would soon stop


def describe_presets(as_json: bool) -> str:
    """Parameters of each preset: of the network, of those how many one token uses, and in the tables of its memory."""
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


def count_parameters(model: Any) -> dict[str, int]:
    """`network`: all weights but memory tables. `active`: without the experts that a token is not sent to.
    `memory`: values in Engram tables, of which a token reads a handful of rows.
    """
    from avdiff.core.memory_table import MemoryTable
    from avdiff.core.moe import MoE

    tables = [m for m in model.modules() if isinstance(m, MemoryTable)]
    memory = sum(b.numel() for table in tables for b in (*table.parameters(), *table.buffers()))
    network = sum(p.numel() for p in model.parameters()) - sum(p.numel() for t in tables for p in t.parameters())
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
    from avdiff.data.media import probe

    facts = vars(probe(path)) | {"file": str(path)}
    if as_json:
        return json.dumps(facts, default=float, ensure_ascii=False)
    lines = [str(path)]
    if facts["video_codec"] is not None:
        size = f"{facts['width']} x {facts['height']}, {facts['num_frames']} frames at {facts['fps']} a second"
        lines.append(f"  picture  {facts['video_codec']}, {size}, {_seconds(facts['video_seconds'])}")
    if facts["audio_codec"] is not None:
        kind = f"{facts['channels']} channel(s), {facts['sample_rate']} Hz"
        lines.append(f"  sound    {facts['audio_codec']}, {kind}, {_seconds(facts['audio_seconds'])}")
    return "\n".join(lines + [f"  {key:<8} {value}" for key, value in sorted(facts["metadata"].items())])


def _seconds(value: Any) -> str:
    return "of unknown length" if value is None else f"{float(value):.4f} s"


def examine(bundled: Path, as_json: bool) -> tuple[str, bool]:
    """State of this installation as text, and whether everything needed is here."""
    from avdiff.data.media import has_codec

    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        **{name: _version(name) for name in LIBRARIES},
        **_torch_facts(),
        "codecs": {name: has_codec(name, mode) for name, mode in CODECS.items()},
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here",
        "weights": weights(bundled),
    }
    problems = [f"{name} is not installed" for name in LIBRARIES if facts[name] is None]
    problems += [f"codec {name} is missing from PyAV" for name, here in facts["codecs"].items() if not here]
    if shutil.disk_usage(Path.cwd()).free < ROOM:
        problems.append("less than 1 GiB of disk is free here")
    if not (bundled / "model_index.json").is_file():
        problems.append("the package has no model in it: avdiff generate needs --model FOLDER")
    if as_json:
        return json.dumps({**facts, "problems": problems}), not problems
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            said = {True: "yes", False: "missing"}
            lines += [f"{name}:", *(f"  {key:<52} {said.get(found, found)}" for key, found in value.items())]
        else:
            lines.append(f"{name:<14} {value if value is not None else 'missing'}")
    return "\n".join(
        [*lines, *(f"PROBLEM: {p}" for p in problems), *(["all is well"] if not problems else [])]
    ), not problems


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})"
    return {"threads": threads, "accelerators": ", ".join(devices) or "none"}


def weights(folder: Path) -> dict[str, str]:
    """Size and the start of the SHA-256 of each file of the embedded model."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        found[str(path.relative_to(folder))] = f"{path.stat().st_size / 1e6:8.2f} MB  sha256 {digest[:16]}"
    return found
