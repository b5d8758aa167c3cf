"""Training an LTX-2 by a recipe: `avdiff train ltx2_lora.toml --pretrained_model_name_or_path
FOLDER`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import LTX2VideoTransformer3DModel

from avdiff.data.cache import LatentCache
from avdiff.families import class_name_of, family_of
from avdiff.families.ltx2.quantize import loading_config, quantize_int8
from avdiff.train.joint.ltx2_plan import describe_plan
from avdiff.train.joint.ltx2_recipe import LTX2Recipe
from avdiff.train.joint.ltx2_task import LTX2Task
from avdiff.train.loop.command import find_recipe, run_training
from avdiff.train.loop.fit import FitSummary


def is_for_ltx2(words: Sequence[str]) -> bool:
    """Whether a command line names a recipe of this training."""
    if not words or words[0].startswith("-"):
        return False
    try:
        tree = tomllib.loads(find_recipe(words[0]).read_text(encoding="utf-8"))
    except (ValueError, OSError):
        return False
    model = tree.get("model")
    return isinstance(model, dict) and model.get("family") == "LTX-2"


def setup(recipe: LTX2Recipe) -> LTX2Task:
    """Caches and transformer that a recipe names.

    Raises:
        ValueError: something it names does not exist or does not fit.
    """
    recipe.check()
    recipe.check_data()
    folder = recipe.model.pretrained_model_name_or_path
    if family_of(folder).name != "LTX-2":
        raise ValueError(
            f"pretrained_model_name_or_path={folder}: is a {class_name_of(folder)}, this recipe "
            "needs an LTX-2 folder"
        )
    train = LatentCache(recipe.data.train_data)
    held_out = LatentCache(recipe.data.validation_data) if recipe.data.validation_data else None
    torch.manual_seed(recipe.training.seed)
    return LTX2Task(recipe, load_transformer(recipe), train, held_out)


def load_transformer(recipe: LTX2Recipe) -> LTX2VideoTransformer3DModel:
    """The transformer in the type and precision that the recipe asks for; trained weights are
    float32.
    """
    model = recipe.model
    dtype = getattr(torch, model.dtype) if recipe.adapter.rank else torch.float32
    transformer = LTX2VideoTransformer3DModel.from_pretrained(
        model.pretrained_model_name_or_path,
        subfolder="transformer",
        torch_dtype=dtype,
        quantization_config=loading_config(model.quantization),
    )
    transformer.requires_grad_(False)
    if model.quantization == "int8":
        quantize_int8(transformer)
    return transformer


def _plan(recipe: LTX2Recipe) -> str:
    folder = Path(recipe.model.pretrained_model_name_or_path)
    config = LTX2VideoTransformer3DModel.load_config(folder, subfolder="transformer")
    return describe_plan(recipe, config)


def main(argv: Sequence[str] | None = None) -> FitSummary | None:
    """Command line: RECIPE.toml [--option value]... | --help; --dry-run tells the memory that a run
    needs, from configs alone.
    """
    return run_training(LTX2Recipe, setup, argv, str(main.__doc__), plan=_plan)
