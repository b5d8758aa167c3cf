"""What a finished run leaves for users: a pipeline folder or an adapter, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from avdiff.models.audio_vae import AVAudioVAE
from avdiff.models.video_vae import AVVideoVAE
from avdiff.models.vocoder import AVVocoder
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train.options import to_toml

if TYPE_CHECKING:
    from avdiff.train.finetune import FinetuneTask

CODECS = {"vae": AVVideoVAE, "audio_vae": AVAudioVAE, "vocoder": AVVocoder}


def export(task: FinetuneTask, directory: Path) -> None:
    """Write `task`'s weights, as they are now, to `directory`.

    LoRA: `pytorch_lora_weights.safetensors`, for `transformer.load_lora_adapter`. With codecs (`codecs`, or those of
    the pipeline that was fine-tuned): all that `AVDiffPipeline.from_pretrained` needs. Else the trained parts alone.
    """
    recipe = task.recipe
    if recipe.adapter.rank:
        task.transformer.save_lora_adapter(directory)
    else:
        codecs = recipe.model.codecs or recipe.model.pretrained_model_name_or_path
        parts = {"transformer": task.transformer, "text_encoder": task.text_encoder, "tokenizer": task.tokenizer,
                 "scheduler": task.objective.scheduler}
        if codecs is not None:
            loaded = {name: kind.from_pretrained(codecs, subfolder=name) for name, kind in CODECS.items()}
            AVDiffPipeline(**parts, **loaded).save_pretrained(directory)
        else:
            for name, part in parts.items():
                part.save_pretrained(directory / name)
    (directory / "README.md").write_text(model_card(task))


def model_card(task: FinetuneTask) -> str:
    """Model card: what it is, from what it was trained, how, and the measured losses."""
    recipe = task.recipe
    base = recipe.model.pretrained_model_name_or_path
    lines = ["---", "library_name: avdiff", "pipeline_tag: text-to-video", "tags: [text-to-audio, avdiff]"]
    lines += [f"base_model: {base}"] if base else []
    kind = "LoRA adapter" if recipe.adapter.rank else "Fine-tuned model" if base else "Model trained from scratch"
    load = "pipe = AVDiffPipeline.from_pretrained(FOLDER)"
    if recipe.adapter.rank:
        load = ("pipe.transformer.load_lora_adapter(FOLDER, prefix=None, "
                "weight_name='pytorch_lora_weights.safetensors')")
    sources = ", ".join(Path(d).name for d in recipe.data.train_data)
    lines += ["---", "", f"# {kind} (avdiff)", "",
              f"Load with `{load}`. Trained on {len(task.dataset)} cached clips from {sources}."]
    if task.last_metrics:
        lines += ["", "## Held-out loss", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {value:.4f} |" for name, value in task.last_metrics.items()]
    lines += ["", "## Recipe", "", "```toml", to_toml(recipe).strip(), "```", ""]
    return "\n".join(lines)
