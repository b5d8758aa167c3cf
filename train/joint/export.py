"""What a finished run leaves for users: a pipeline folder or an adapter, with a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from peft import get_peft_model_state_dict
from safetensors.torch import save_file

import avdiff
from avdiff.files import write_text
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train.joint.trained_model import TrainedModel
from avdiff.train.loop.config import to_toml

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from avdiff.train.recipe import ExportOptions, Recipe

CODECS: dict[str, type[ModelMixin]] = {
    "vae": AVVideoVAE,
    "audio_vae": AVAudioVAE,
    "vocoder": AVVocoder,
}


def export(
    model: TrainedModel, directory: Path, num_clips: int, metrics: Mapping[str, float]
) -> None:
    """Write the weights, as they are now, to `directory`, with a model card.

    A LoRA becomes `pytorch_lora_weights.safetensors` in diffusers' format, its rank and alpha in
    the metadata. With codecs (`codecs`, or those of the pipeline that was fine-tuned): all that
    `AVDiffPipeline.from_pretrained` needs. Else the trained parts alone.

    Args:
        num_clips: that it was trained on. metrics: of the last validation, for the card.
    """
    codecs = codecs_of(model.recipe)
    parts = {
        "transformer": model.transformer,
        "text_encoder": model.text_encoder,
        "tokenizer": model.tokenizer,
        "scheduler": model.scheduler,
    }
    if model.recipe.adapter.rank:
        save_lora(model, directory)
    elif codecs is not None:
        pipe = AVDiffPipeline(
            **parts,
            **load_codec_parts(codecs),
            prompt_domain=model.prompt_domain,
            **model.sampling,
        )
        pipe.save_pretrained(directory)
    else:
        for name, part in parts.items():
            part.save_pretrained(directory / name)
    write_text(directory / "README.md", model_card(model, num_clips, metrics))


def save_lora(model: TrainedModel, directory: Path) -> None:
    """The adapter in diffusers' format: names start with "transformer.". Its metadata has rank and
    alpha of every layer, without which a reader has to guess the scale, and the steps and guidance
    that it was made for.
    """
    (config,) = model.transformer.peft_config.values()
    settings = config.to_dict()
    # sets have no order, and the file shall be the same each time
    settings["target_modules"] = sorted(settings["target_modules"])
    prefix = AVDiffPipeline.transformer_name
    adapter = {f"{prefix}.{key}": value for key, value in settings.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapter, indent=2, sort_keys=True),
        "sampling_defaults": json.dumps(dict(model.sampling), sort_keys=True),
    }
    tensors = {
        f"{prefix}.{name}": tensor.detach().cpu().contiguous()
        for name, tensor in get_peft_model_state_dict(model.transformer).items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "pytorch_lora_weights.safetensors", metadata)


def load_codec_parts(codecs: str) -> dict[str, ModelMixin]:
    """The three codecs of a folder or hub name, as arguments of the pipeline."""
    return {name: kind.from_pretrained(codecs, subfolder=name) for name, kind in CODECS.items()}


def push(folder: Path, options: ExportOptions) -> str:
    """Upload an exported folder; returns its address.

    Raises:
        ValueError: the hub could not be reached or refused; the folder is untouched.
    """
    from huggingface_hub import HfApi

    name = str(options.hub_model_id)
    api = HfApi()
    message = "Upload by avdiff train"
    try:
        api.create_repo(name, private=options.hub_private, exist_ok=True)
        address = api.upload_folder(repo_id=name, folder_path=str(folder), commit_message=message)
    except Exception as error:  # whatever the network and the hub's client come up with
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"hub_model_id={name}: could not be pushed ({reason}); the model is whole in {folder}, "
            f"push it later with `hf upload {name} {folder}`"
        ) from error
    return str(address)


def codecs_of(recipe: Recipe) -> str | None:
    """Folder or hub name that the exported pipeline takes its codecs from; None exports the trained
    parts alone.
    """
    model = recipe.model
    return model.codecs or model.pretrained_model_name_or_path or recipe.distillation.teacher


def model_card(model: TrainedModel, num_clips: int, metrics: Mapping[str, float]) -> str:
    """Model card: what it is, from what it was trained, how, and the measured losses. It names
    folders, but no path of the machine that it was trained on.
    """
    recipe = without_paths(model.recipe)
    lines = ["---", "library_name: avdiff", "pipeline_tag: text-to-video"]
    lines.append("tags: [text-to-audio, avdiff]")
    base = recipe.model.pretrained_model_name_or_path
    if base is not None and base == model.recipe.model.pretrained_model_name_or_path:
        lines.append(f"base_model: {base}")  # a name on the hub, not a folder
    sources = ", ".join(recipe.data.train_data)
    lines += ["---", "", f"# {_kind(recipe)} (avdiff)", ""]
    lines.append(f"Load with `{_how_to_load(recipe)}`.")
    lines.append(f"Trained on {num_clips} cached clips from {sources}.")
    if base is not None:
        lines.append(f"Started from {base}.")
    if recipe.distillation.teacher:
        lines += ["", _distillation_line(model, recipe)]
    if metrics:
        lines += ["", "## Held-out measurements", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in metrics.items()]
    lines += ["", "## Recipe", "", "```toml", to_toml(recipe).strip(), "```", ""]
    return "\n".join(lines)


def _kind(recipe: Recipe) -> str:
    if recipe.distillation.teacher:
        return "Distilled model"
    if recipe.adapter.rank:
        return "LoRA adapter"
    if recipe.model.pretrained_model_name_or_path:
        return "Fine-tuned model"
    return "Model trained from scratch"


def _how_to_load(recipe: Recipe) -> str:
    if recipe.adapter.rank:
        return "pipe.load_lora_weights(FOLDER)"
    return "pipe = AVDiffPipeline.from_pretrained(FOLDER)"


def _distillation_line(model: TrainedModel, recipe: Recipe) -> str:
    d = recipe.distillation
    steps = model.sampling["num_inference_steps"]
    picture = model.sampling["guidance_scale"]
    sound = model.sampling["audio_guidance_scale"]
    return (
        f"Distilled ({d.distill}) from {d.teacher}; made for {steps} steps, guidance {picture:g} "
        f"for the picture and {sound:g} for the sound, which the pipeline uses by itself."
    )


def without_paths(recipe: Recipe) -> Recipe:
    """The recipe with folders of this machine shortened to their names; hub names, which name no
    folder here, stay.
    """
    sections = {}
    for section in fields(recipe):
        options = getattr(recipe, section.name)
        assert is_dataclass(options)
        shortened = {f.name: _shortened(getattr(options, f.name)) for f in fields(options)}
        changes = {
            name: value for name, value in shortened.items() if value != getattr(options, name)
        }
        sections[section.name] = replace(options, **changes)  # type: ignore[type-var]
    return replace(recipe, **sections)


def _shortened(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(_shortened(part) for part in value)
    if not isinstance(value, str) or not value:
        return value
    path = Path(value)
    if path == Path(avdiff.PRESENTER):
        return "presenter"
    return path.name if path.is_absolute() or path.exists() else value
