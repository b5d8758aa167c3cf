"""What a finished run leaves for users: a pipeline folder or an adapter, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.codecs.vocoder import AVVocoder
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train.loop.config import to_toml

if TYPE_CHECKING:
    from avdiff.train.finetune import FinetuneTask
    from avdiff.train.recipe import ExportOptions, Recipe

CODECS = {"vae": AVVideoVAE, "audio_vae": AVAudioVAE, "vocoder": AVVocoder}


def export(task: FinetuneTask, directory: Path) -> None:
    """Write `task`'s weights, as they are now, to `directory`.

    LoRA: `pytorch_lora_weights.safetensors`, for `transformer.load_lora_adapter`. With codecs
        (`codecs`, or those of
    the pipeline that was fine-tuned): all that `AVDiffPipeline.from_pretrained` needs. Else the
    trained parts alone.
    """
    recipe = task.recipe
    if recipe.adapter.rank:
        task.transformer.save_lora_adapter(directory)
    else:
        codecs = codecs_of(recipe)
        parts = {
            "transformer": task.transformer,
            "text_encoder": task.text_encoder,
            "tokenizer": task.tokenizer,
            "scheduler": task.objective.scheduler,
        }
        if codecs is not None:
            loaded = load_codec_parts(codecs)
            AVDiffPipeline(
                **parts, **loaded, prompt_domain=task.prompt_domain, **task.recommended()
            ).save_pretrained(directory)
        else:
            for name, part in parts.items():
                part.save_pretrained(directory / name)
    (directory / "README.md").write_text(model_card(task))


def load_codec_parts(codecs: str) -> dict[str, Any]:
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
    try:
        api.create_repo(name, private=options.hub_private, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=name, folder_path=str(folder), commit_message="Upload by avdiff train"
            )
        )
    except Exception as error:  # whatever the network and the hub's client come up with
        raise ValueError(
            f"hub_model_id={name}: could not be pushed ({' '.join(str(error).split())[:200]}); "
            "the model "
            f"is whole in {folder}, push it later with `hf upload {name} {folder}`"
        ) from error


def codecs_of(recipe: Recipe) -> str | None:
    """Folder or hub name that the exported pipeline takes its codecs from; None exports the trained
    parts alone.
    """
    model = recipe.model
    return model.codecs or model.pretrained_model_name_or_path or recipe.distillation.teacher


def model_card(task: FinetuneTask) -> str:
    """Model card: what it is, from what it was trained, how, and the measured losses."""
    recipe = task.recipe
    base = recipe.model.pretrained_model_name_or_path
    lines = [
        "---",
        "library_name: avdiff",
        "pipeline_tag: text-to-video",
        "tags: [text-to-audio, avdiff]",
    ]
    lines += [f"base_model: {base}"] if base else []
    kind = (
        "LoRA adapter"
        if recipe.adapter.rank
        else "Fine-tuned model"
        if base
        else "Model trained from scratch"
    )
    kind = "Distilled model" if recipe.distillation.teacher else kind
    load = "pipe = AVDiffPipeline.from_pretrained(FOLDER)"
    if recipe.adapter.rank:
        load = (
            "pipe.transformer.load_lora_adapter(FOLDER, prefix=None, "
            "weight_name='pytorch_lora_weights.safetensors')"
        )
    sources = ", ".join(Path(d).name for d in recipe.data.train_data)
    lines += [
        "---",
        "",
        f"# {kind} (avdiff)",
        "",
        f"Load with `{load}`. Trained on {len(task.dataset)} cached clips from {sources}.",
    ]
    if recipe.distillation.teacher:
        told = task.recommended()
        lines += [
            "",
            f"Distilled ({recipe.distillation.distill}) from "
            f"{Path(recipe.distillation.teacher).name}; made "
            f"for {told['num_inference_steps']} steps, guidance {told['guidance_scale']:g} for "
            "the picture and "
            f"{told['audio_guidance_scale']:g} for the sound, which the pipeline uses by itself.",
        ]
    if task.last_metrics:
        lines += ["", "## Held-out measurements", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in task.last_metrics.items()]
    lines += ["", "## Recipe", "", "```toml", to_toml(recipe).strip(), "```", ""]
    return "\n".join(lines)
