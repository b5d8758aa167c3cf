"""Families of models: which one reads a folder, and what it can do.

`avdiff.load(folder)` looks at `_class_name` in the folder's model_index.json and hands over to the
family that is registered for it. Each family is a package here with an object `FAMILY`, imported
when a folder asks for it. Start with `protocols.py`, then `presenter`, the smallest.

Families are a floor below the pipelines: a family names its pipeline by a dotted path alone.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

from avdiff.families.protocols import Family

__all__ = ["FAMILIES", "class_name_of", "family_of", "load"]

# `_class_name` of a model folder -> package with the object FAMILY in it.
FAMILIES = {
    "AVDiffPipeline": "avdiff.families.presenter",
    "LTX2ConditionPipeline": "avdiff.families.ltx2",
    "LTX2ImageToVideoPipeline": "avdiff.families.ltx2",
    "LTX2Pipeline": "avdiff.families.ltx2",
}


def class_name_of(model: str | os.PathLike[str], **options: Any) -> str:
    """`_class_name` in the model_index.json of a folder or hub name.

    Args:
        options: revision, token, cache_dir, local_files_only... of a hub name.

    Raises:
        ValueError: there is no such file, or it is no JSON object with a `_class_name`.
    """
    index = Path(model) / "model_index.json"
    if Path(model).is_dir():
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"{index}: cannot be read as the index of a model ({said})") from error
    else:
        from diffusers import DiffusionPipeline

        try:
            content = DiffusionPipeline.load_config(os.fspath(model), **options)
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise ValueError(f"model={str(model)!r}: is no folder of a model ({said})") from error
    name = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{index}: needs a JSON object with a _class_name")
    return name


def family_of(model: str | os.PathLike[str], **options: Any) -> Family:
    """The family that reads a model folder or hub name.

    Raises:
        ValueError: no family is registered for its `_class_name`.
    """
    name = class_name_of(model, **options)
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(f"model={str(model)!r}: is a {name}; avdiff reads {known}")
    return import_module(FAMILIES[name]).FAMILY


def load(model: str | os.PathLike[str], **options: Any) -> Any:
    """A pipeline from a folder or a hub name, whatever its family.

    Args:
        options: of diffusers' `from_pretrained`: torch_dtype, device_map, variant...

    Raises:
        ValueError: no family reads it, or a file in it is broken.
    """
    wanted = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
    hub = {name: options[name] for name in wanted if name in options}
    return family_of(model, **hub).load(model, **options)
