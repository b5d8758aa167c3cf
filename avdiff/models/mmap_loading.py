"""Load a model whose Engram tables stay in their file: weights to memory, tables mapped.

    transformer = load_off_ram(AVTransformer, "folder/transformer")
    pipe = AVDiffPipeline.from_pretrained("folder", transformer=transformer)

Memory is that of the model without its tables, plus the rows that are read; processes that load the
same folder share the pages. Tables that are mapped cannot be trained.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from avdiff.core.memory_table import memory_tables
from avdiff.models.convert_names import check_folder

Model = TypeVar("Model", bound=torch.nn.Module)
NAME = "diffusion_pytorch_model.safetensors"


def load_off_ram(
    kind: type[Model], folder: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> Model:
    """The model saved in `folder`, in eval mode, bit for bit what `from_pretrained` gives but for
    where its tables are.

    Args:
        kind: its class. folder: where `save_pretrained` put it, in one file or in several with an
            index.
        dtype: of the weights in memory; None leaves each as it is in the file.

    Raises:
        ValueError: no safetensors file, a tensor that is missing or not wanted, or a table of
            another shape.
    """
    model_class: Any = kind
    folder = Path(folder)
    check_folder(folder)
    with torch.device("meta"):  # shapes alone: the tables must never be allocated
        model = model_class.from_config(model_class.load_config(folder))
    places = _places(folder)
    for name, table in memory_tables(model):
        key = f"{name}.rows"
        if key not in places:
            raise ValueError(f"folder={folder}: holds no {key}")
        table.map_from(places.pop(key), key)
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(set(places.values())):
        with safe_open(file, framework="pt") as tensors:
            for key in (k for k in tensors.keys() if k in places):  # noqa: SIM118  (no dict: it has no __iter__)
                value = tensors.get_tensor(key)
                weights[key] = (
                    value.to(dtype) if dtype is not None and value.is_floating_point() else value
                )
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"folder={folder}: does not fit the model ({' '.join(str(error).split())[:300]})"
        ) from error
    return model.eval()


def _places(folder: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it."""
    index = folder / f"{NAME}.index.json"
    if index.is_file():
        return {
            key: folder / Path(file).name
            for key, file in json.loads(index.read_text())["weight_map"].items()
        }
    try:
        with safe_open(folder / NAME, framework="pt") as tensors:
            return dict.fromkeys(tensors.keys(), folder / NAME)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"folder={folder}: holds no readable {NAME} ({error})") from error
