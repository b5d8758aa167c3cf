"""What a run starts from: a preset with changes, or a pipeline; and what can be refused before
either is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from transformers import PreTrainedTokenizerBase

from avdiff.data.cache import LatentCache
from avdiff.latents import MODALITIES
from avdiff.models import presets
from avdiff.models.text_encoder import CaptionEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler
from avdiff.train.joint.dataset import TrainingClips, captions_of
from avdiff.train.joint.export import CODECS
from avdiff.train.joint.objective import PATH
from avdiff.train.loop.dataloader import SeededLoader
from avdiff.train.recipe import Recipe


def preset_config(recipe: Recipe) -> dict[str, Any]:
    """Configuration of the recipe's preset with its changes.

    Raises:
        ValueError: no such preset, or a change that it does not know.
    """
    model = recipe.model
    if model.preset not in presets.PRESETS:
        raise ValueError(f"preset={model.preset!r}: needs one of {', '.join(presets.PRESETS)}")
    arguments = inspect.signature(AVTransformer.__init__).parameters
    defaults = {n: p.default for n, p in arguments.items() if n != "self"}
    config = defaults | presets.PRESETS[model.preset]()
    for name in model.preset_changes:
        if not isinstance(config.get(name), int | float):
            raise ValueError(
                f"preset_changes: {name!r} is no number of AVTransformer, such as num_layers or "
                "video_dim"
            )
    config |= {name: type(config[name])(value) for name, value in model.preset_changes.items()}
    for name, last in (
        ("shared_layers", config["num_layers"] - 1),
        ("memory_layers", config["num_layers"]),
    ):
        config[name] = tuple(i for i in config[name] if i < last)
    return config


def from_preset(recipe: Recipe) -> AVTransformer:
    """A fresh transformer of the recipe's preset with its changes."""
    return AVTransformer(**preset_config(recipe))


def from_folder(base: str) -> tuple[AVTransformer, CaptionEncoder, PreTrainedTokenizerBase]:
    """Transformer, caption encoder and tokenizer of a pipeline folder or hub name."""
    from transformers import AutoTokenizer

    return (
        AVTransformer.from_pretrained(base, subfolder="transformer"),
        CaptionEncoder.from_pretrained(base, subfolder="text_encoder"),
        AutoTokenizer.from_pretrained(base, subfolder="tokenizer", trust_remote_code=False),
    )


def with_path(recipe: Recipe) -> Recipe:
    """The recipe with what it leaves open of the way from noise to data (time shifts, correlation
    of frames): as the teacher walks it, else the model that the run starts from.
    """
    o = recipe.objective
    base = recipe.distillation.teacher or recipe.model.pretrained_model_name_or_path
    if base is None or all(getattr(o, name) is not None for name in PATH):
        return recipe
    try:
        theirs = PATH | JointFlowMatchScheduler.load_config(base, subfolder="scheduler")
    except OSError:
        return recipe  # no pipeline: refused where its networks are loaded
    open_ones = {name: theirs[name] for name in PATH if getattr(o, name) is None}
    return replace(recipe, objective=replace(o, **open_ones))


def refuse_early(recipe: Recipe, caches: Sequence[LatentCache]) -> None:
    """What would fail later, found before a model is loaded.

    Raises:
        ValueError: one sentence that names the option and the fix.
    """
    o = recipe.training
    model = recipe.model
    if o.report_to and o.report_to not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"report_to={o.report_to!r}: needs one of {', '.join(map(str, LOGGER_TYPE_TO_CLASS))}"
        )
    if recipe.rates.optimizer == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError(
            "optimizer='adamw8bit': needs the package bitsandbytes, which is not installed; "
            "`pip install bitsandbytes` or choose adamw"
        )
    local = model.codecs is not None and Path(model.codecs).is_dir()
    missing = [
        name
        for name in CODECS
        if local and not (Path(str(model.codecs)) / name / "config.json").is_file()
    ]
    if missing:
        raise ValueError(
            f"codecs={model.codecs}: has no {missing[0]} in it; needs a folder with "
            f"{', '.join(CODECS)}"
        )
    clips = TrainingClips(caches[0], None)
    SeededLoader(
        clips, None, o.train_batch_size, o.gradient_accumulation_steps, groups=clips.groups()
    )
    base = model.pretrained_model_name_or_path
    try:
        config = (
            preset_config(recipe)
            if base is None
            else AVTransformer.load_config(base, subfolder="transformer")
        )
    except OSError as error:
        raise ValueError(
            f"pretrained_model_name_or_path={base}: needs the folder or hub name of a pipeline "
            f"({' '.join(str(error).split())})"
        ) from error
    for name, cache in zip(("train_data", "validation_data"), caches, strict=False):
        if len(cache):
            _refuse_foreign_latents(name, cache, config)
    if recipe.data.caption_dropout < 1 and recipe.data.text_dropout < 1:
        for index in range(len(caches[0])):
            record = caches[0].items[index][1]
            if not any(caption.strip() for caption in captions_of(record)):
                raise ValueError(
                    f"train_data: clip {index} ({record.get('name', record.get('kind', 'clip'))}) "
                    "has no "
                    "caption; write one and cache it again, or set caption_dropout=1"
                )


def _refuse_foreign_latents(name: str, cache: LatentCache, config: Mapping[str, Any]) -> None:
    item = cache[0]
    for m in MODALITIES:
        if m in item and item[m].shape[-1] != config[f"{m}_channels"]:
            raise ValueError(
                f"{name}: holds {m} of {item[m].shape[-1]} values a token, the model takes "
                f"{config[f'{m}_channels']}; cache the clips with the codecs of this model"
            )
