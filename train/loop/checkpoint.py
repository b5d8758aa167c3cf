"""Checkpoints that are whole or absent, and the states of the random-number generators.

A checkpoint is a directory `checkpoint-N`. It is written under a temporary name, its
`manifest.json` (size and SHA-256 of every file) comes last, then the directory is renamed: a killed
process or a full disk leaves no half checkpoint behind, and a damaged one is recognised and
skipped.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from avdiff.files import sha256

MANIFEST = "manifest.json"
FORMAT = 1
_UMASK = os.umask(0o022)  # it can only be read by setting it
os.umask(_UMASK)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; what was there before is untouched."""


# ----------------------------------------------------------------------------------- random numbers
def rng_state(devices: bool = True) -> dict[str, Any]:
    """States of python, numpy and torch (CPU; all CUDA devices with `devices`) in types that
    `weights_only` loads.
    """
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - libraries draw from it
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ),
        "torch": torch.get_rng_state(),
    }
    if devices and torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Inverse of `rng_state`."""
    random.setstate(state["python"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


@contextmanager
def rng_kept(devices: bool = True) -> Iterator[None]:
    """Whatever is drawn inside (validation, samples, export) leaves the global generators as they
    were.
    """
    state = rng_state(devices)
    try:
        yield
    finally:
        set_rng_state(state)


# -------------------------------------------------------------------------------------- checkpoints
def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file. Tensors that share memory (tied weights) are written as independent
    copies.
    """
    seen: set[int] = set()
    flat: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        alone = storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        seen.add(storage.data_ptr())
        flat[name] = tensor if alone else tensor.clone()
    save_file(flat, path)
    path.chmod(0o666 & ~_UMASK)  # save_file makes files that only the owner can read


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read a safetensors file to CPU."""
    return load_file(path)


def write_tree(path: Path, tree: Any) -> None:
    """Write nested containers of tensors and numbers (optimizer, scheduler, generators)."""
    with path.open("wb") as file:
        torch.save(tree, file)


def read_tree(path: Path) -> Any:
    """Read what `write_tree` wrote; nothing but tensors, numbers, strings and containers is
    accepted.
    """
    return torch.load(path, map_location="cpu", weights_only=True)


def checkpoint_dir(root: Path, step: int) -> Path:
    """`root/checkpoint-<step>`."""
    return root / f"checkpoint-{step}"


def list_checkpoints(root: Path) -> list[Path]:
    """All `checkpoint-N` directories, oldest step first, whole or not."""
    found = [
        p for p in root.glob("checkpoint-*") if p.is_dir() and p.name.split("-", 1)[1].isdecimal()
    ]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """N of `checkpoint-N`."""
    return int(checkpoint.name.split("-", 1)[1])


@contextmanager
def writing(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that `seal` turns into `target`; on error it is removed.

    Raises:
        CheckpointError: the files could not be written (full disk, no permission).
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target}: could not be written ({error}); earlier checkpoints are untouched"
        ) from error


def seal(temporary: Path, target: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest (with `facts`), flush everything to disk and give the directory its
    name.
    """
    files = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)}
        for p in sorted(temporary.iterdir())
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    if target.exists():  # a broken one of the same step, or the same step saved again
        shutil.rmtree(target)
    os.replace(temporary, target)
    _flush(target.parent)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty temporary directory that takes the place of `target` if all goes well (an
    export).
    """
    with writing(target) as temporary:
        yield temporary
        for path in temporary.rglob("*"):
            path.chmod(
                (0o777 if path.is_dir() else 0o666) & ~_UMASK
            )  # safetensors writes for the owner alone
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint after checking every file against it.

    Raises:
        ValueError: says what is wrong (no manifest, missing file, wrong size or hash).
    """
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{checkpoint}: no readable {MANIFEST}; the checkpoint was not finished"
        ) from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{checkpoint}: format {manifest.get('format')!r}; this version reads format {FORMAT}"
        )
    for name, facts in files:
        path = checkpoint / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise ValueError(f"{checkpoint}: {name} is missing or cut short")
        if sha256(path) != facts["sha256"]:
            raise ValueError(
                f"{checkpoint}: {name} is damaged (its SHA-256 differs from the manifest)"
            )
    return manifest


def find_checkpoint(root: Path, wanted: str) -> tuple[Path, dict[str, Any], list[str]] | None:
    """Resolve "latest" or a path to (checkpoint, manifest, reasons why newer ones were skipped).

    Returns None for "latest" when there is no checkpoint yet.

    Raises:
        ValueError: the named checkpoint is broken or absent, or every one under `root` is broken.
    """
    if wanted != "latest":
        path = Path(wanted) if Path(wanted).is_dir() else root / wanted
        if not path.is_dir():
            raise ValueError(
                f"resume_from_checkpoint={wanted!r}: no such directory; use 'latest' or a path"
            )
        return path, read_manifest(path), []
    skipped: list[str] = []
    for path in reversed(list_checkpoints(root)):
        try:
            return path, read_manifest(path), skipped
        except ValueError as error:
            skipped.append(str(error))
    if skipped:
        raise ValueError(
            f"resume_from_checkpoint='latest': every checkpoint in {root} is broken "
            f"({skipped[0]}); "
            "remove them to start again"
        )
    return None


def keep_newest(root: Path, limit: int | None, spare: Iterable[Path] = ()) -> None:
    """Delete the oldest checkpoints until `limit` are left; `spare` are never deleted. No limit:
    None or 0.
    """
    spared = {p.resolve() for p in spare}
    if limit:
        for old in list_checkpoints(root)[:-limit]:
            if old.resolve() not in spared:
                (old / MANIFEST).unlink(
                    missing_ok=True
                )  # first, so that a kill in between leaves it visibly broken
                shutil.rmtree(old, ignore_errors=True)


def refuse_changes(
    checkpoint: Path, saved: Mapping[str, Any], now: Mapping[str, Any], allowed: bool
) -> list[str]:
    """Lines `name: old -> new` for what differs between the manifest of a checkpoint and the facts
    of this run.

    Raises:
        ValueError: something differs and is not `allowed`; or only one of the two runs is sharded:
            its optimizer groups parameters in its own way.
    """
    if ("sharding" in saved) != ("sharding" in now):
        kind = "with" if "sharding" in saved else "without"
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: was trained {kind} FSDP; launch it the "
            "same "
            "way, or start from its exported weights"
        )
    before, after = (
        {**facts["options"], **facts["settings"], "processes": facts["num_processes"]}
        for facts in (saved, now)
    )
    changes = changed(before, after)
    if changes and not allowed:
        raise ValueError(
            f"resume_from_checkpoint={str(checkpoint)!r}: was trained with other options "
            f"({'; '.join(changes)}); put them back or set allow_changed_options"
        )
    return changes


def changed(
    before: Mapping[str, Any], after: Mapping[str, Any], ignore: Iterable[str] = ()
) -> list[str]:
    """Lines `name: old -> new` for every key that differs, values compared as JSON."""
    new = json.loads(json.dumps(after))
    keys = sorted((before.keys() | new.keys()) - set(ignore))
    return [
        f"{k}: {before.get(k)!r} -> {new.get(k)!r}" for k in keys if before.get(k) != new.get(k)
    ]


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
