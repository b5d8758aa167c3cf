"""Loading a pipeline from a folder or a hub name: weights from safetensors alone, and nothing
ignored in silence.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import avdiff
from avdiff.files import write_text
from avdiff.models.convert_names import check_folder

# What a saved folder says of itself to diffusers, which takes a class from a file of this name.
LOADER = '"""Lets diffusers find the class."""\n\nfrom avdiff import AVDiffPipeline  # noqa: F401\n'


def refuse_pickle(options: dict[str, Any]) -> None:
    """Ask for safetensors, and refuse an option that asks for anything else.

    Raises:
        ValueError: `use_safetensors` is given and not True.
    """
    if options.setdefault("use_safetensors", True) is not True:
        raise ValueError("use_safetensors: needs True, as pickled weights can run code")


@contextmanager
def checked_folder(
    model: str | os.PathLike[str], options: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Check the configs of a local folder before it is loaded, and hand out the check of the
    loaded components' tensors.

    Raises:
        ValueError: an unknown option, a tensor that is missing or that no one asked for.
    """
    folder = Path(model)
    local = folder.is_dir()
    if local:
        check_configs(folder)
    # these have other names in their files
    renamed = {"variant", "quantization_config"} & set(options)

    def check(components: Mapping[str, Any]) -> None:
        if local and not renamed:
            own = {name: part for name, part in components.items() if name not in options}
            check_tensors(folder, own)

    yield check


def write_loader(folder: str | os.PathLike[str]) -> None:
    """Write the one-line `pipeline.py` of a saved folder."""
    write_text(Path(folder) / "pipeline.py", LOADER)


def check_configs(folder: Path) -> None:
    """Refuse options that a component of ours does not have: diffusers would drop them with a
    warning.
    """
    check_folder(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = _json(index)
    if parts.get("_class_name") not in avdiff.__all__:
        raise ValueError(f"{index}: is of a {parts.get('_class_name')}, needs an AVDiffPipeline")
    for part, entry in parts.items():
        ours = isinstance(entry, list) and len(entry) == 2 and entry[0] == "avdiff"
        if not ours or entry[1] not in avdiff.__all__:
            continue
        kind = getattr(avdiff, entry[1])
        path = folder / part / kind.config_name
        if path.is_file():
            # diffusers writes this one beside the options
            known = {*inspect.signature(kind.__init__).parameters, "quantization_config"}
            unknown = [key for key in _json(path) if key not in known and not key.startswith("_")]
            if unknown:
                raise ValueError(
                    f"{path}: {entry[1]} has no option {', '.join(map(repr, unknown))}"
                )


def check_tensors(folder: Path, components: Mapping[str, Any]) -> None:
    """Refuse weights that do not fill a component exactly: diffusers would leave the rest as it was
    drawn. Quantized components, whose files hold other tensors, are left to their quantizer.
    """
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        if getattr(part, "config", {}).get("quantization_config") is not None:
            continue
        stored: set[str] = set()
        for file in (folder / name).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored |= set(tensors.keys())
        expected = set(part.state_dict())
        for what, keys in (("lacks", expected - stored), ("holds an unknown", stored - expected)):
            if keys and stored:
                raise ValueError(
                    f"{folder / name}: {what} {min(keys)!r}, one of {len(keys)} such tensors"
                )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is not a JSON file ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: needs a JSON object")
    return content
