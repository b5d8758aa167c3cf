"""What a finished run on an LTX-2 leaves: LoRA files that everybody reads, or a whole LTX-2
folder.
"""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel

from avdiff.families.ltx2.lora import DIFFUSERS_FILE, LoraFile, LoraLayer, write_lora
from avdiff.files import write_text
from avdiff.train.joint.lora import lora_layers
from avdiff.train.joint.ltx2_recipe import LTX2Recipe
from avdiff.train.loop.config import to_toml


def export(transformer: LTX2VideoTransformer3DModel, recipe: LTX2Recipe, directory: Path) -> None:
    """Write the weights as they are now.

    A LoRA becomes two files: diffusers' own, and `<folder's name>_native.safetensors` for ComfyUI,
    ltx-pipelines and ltx-trainer. Full training becomes an LTX2Pipeline folder.
    """
    directory.mkdir(parents=True, exist_ok=True)
    base = recipe.model.pretrained_model_name_or_path
    if recipe.adapter.rank:
        lora = lora_of(transformer)
        told = {
            "base_model": Path(base).name,
            "trigger": recipe.adapter.trigger,
            "tasks": json.dumps(recipe.objective.tasks),
        }
        write_lora(lora, directory / DIFFUSERS_FILE, "diffusers", told)
        native = f"{Path(recipe.training.output_dir).name}_native.safetensors"
        write_lora(lora, directory / native, "native", told)
    else:
        pipe = LTX2Pipeline.from_pretrained(base, transformer=transformer)
        pipe.save_pretrained(directory)
    write_text(directory / "recipe.toml", to_toml(recipe))


def lora_of(transformer: LTX2VideoTransformer3DModel) -> LoraFile:
    """The adapter on a transformer."""
    layers = {}
    for name, layer in lora_layers(transformer).items():
        for adapter in layer.active_adapters:
            down = layer.lora_A[adapter].weight.detach().cpu()
            up = layer.lora_B[adapter].weight.detach().cpu()
            alpha = layer.scaling[adapter] * down.shape[0]
            layers[name] = LoraLayer(down, up, alpha)
    return LoraFile(layers)
