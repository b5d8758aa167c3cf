"""Loading a pipeline from a folder or a hub name: weights from safetensors alone, and nothing
ignored in silence.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

import avdiff


class SafeLoadingMixin:
    """In front of `DiffusionPipeline`: what its `from_pretrained` lets through."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Any:
        """As in diffusers, but pickled weights are refused, and so is a config with options that
        are not known.

        Raises:
            ValueError: an unknown option in a component's config, a tensor that is missing or that
                no one asked for.
        OSError: no safetensors file.
        """
        if kwargs.setdefault("use_safetensors", True) is not True:
            raise ValueError("use_safetensors: needs True, as pickled weights can run code")
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        check_configs(folder)
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        if not {"variant", "quantization_config"} & set(
            kwargs
        ):  # these have other names in their files
            check_tensors(
                folder, {name: part for name, part in pipe.components.items() if name not in kwargs}
            )
        return pipe


def check_configs(folder: Path) -> None:
    """Refuse options that a component of ours does not have: diffusers would drop them with a
    warning.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        return
    parts = _json(index)
    if parts.get("_class_name") not in avdiff.__all__:
        raise ValueError(f"{index}: is of a {parts.get('_class_name')}, needs an AVDiffPipeline")
    for part, entry in parts.items():
        if not (
            isinstance(entry, list)
            and len(entry) == 2
            and entry[0] == "avdiff"
            and entry[1] in avdiff.__all__
        ):
            continue
        kind = getattr(avdiff, entry[1])
        path = folder / part / kind.config_name
        if path.is_file():
            known = inspect.signature(kind.__init__).parameters
            unknown = [key for key in _json(path) if key not in known and not key.startswith("_")]
            if unknown:
                raise ValueError(
                    f"{path}: {entry[1]} has no option {', '.join(map(repr, unknown))}"
                )


def check_tensors(folder: Path, components: dict[str, Any]) -> None:
    """Refuse weights that do not fill a component exactly: diffusers would leave the rest as it was
    drawn.
    """
    for name, part in components.items():
        if not isinstance(part, torch.nn.Module):
            continue
        stored: set[str] = set()
        for file in (folder / name).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                stored |= set(tensors.keys())
        wanted = set(part.state_dict())
        for what, keys in (("lacks", wanted - stored), ("holds an unknown", stored - wanted)):
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
