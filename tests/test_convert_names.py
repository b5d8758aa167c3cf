"""Folders of before the renaming: refused in one sentence, and converted once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from avdiff.models.convert_names import (
    CLASSES,
    CONFIG_KEYS,
    WEIGHTS,
    convert_folder,
    new_weight_name,
)
from avdiff.models.prompt_domain import PromptDomain
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from tests.tiny import tiny_components

PROMPT = 'A woman says "good morning"'


def old_weight_name(name: str) -> str:
    for old, new in WEIGHTS.items():
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def make_old(folder: Path) -> None:
    """Give a folder of today the names of before."""
    keys = {new: old for old, new in CONFIG_KEYS.items()}
    classes = {new: old for old, new in CLASSES.items()}
    for path in [*folder.rglob("*config.json"), folder / "model_index.json"]:
        values = json.loads(path.read_text())
        old = {}
        for key, value in values.items():
            is_entry = isinstance(value, list) and all(isinstance(v, str) for v in value)
            known = [classes.get(v, v) for v in value] if is_entry else value
            old[keys.get(key, key)] = classes.get(known, known) if isinstance(known, str) else known
        path.write_text(json.dumps(old))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = {old_weight_name(name): value for name, value in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    (folder / "prompt_domain").rename(folder / "world")
    config = folder / "world" / "prompt_domain_config.json"
    config.rename(config.with_name("world_config.json"))


def call(pipe: AVDiffPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    pipe.set_progress_bar_config(disable=True)
    out = pipe(
        PROMPT,
        seconds=1,
        num_inference_steps=2,
        check_prompt=False,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    )
    return out.frames, out.audio


@pytest.fixture
def saved(tmp_path):
    """A pipeline with a prompt domain, saved; what it generates."""
    pipe = AVDiffPipeline(**tiny_components(), prompt_domain=PromptDomain(about="draws a face"))
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path / "model", call(pipe)


def test_an_old_folder_is_refused_converted_and_generates_the_same(saved) -> None:
    folder, before = saved
    make_old(folder)
    sentence = r"is a name of before the renaming; convert .*`python -m avdiff.models.convert_names"
    with pytest.raises(ValueError, match=sentence):
        AVDiffPipeline.from_pretrained(folder)
    for where in (dict(subfolder="transformer"), {}):
        with pytest.raises(ValueError, match=sentence):
            AVTransformer.from_pretrained(folder if where else folder / "transformer", **where)
    command = [sys.executable, "-m", "avdiff.models.convert_names", str(folder)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "files converted" in told
    after = call(AVDiffPipeline.from_pretrained(folder))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not convert_folder(folder)


def test_a_tokenizer_keeps_its_words(tmp_path) -> None:
    words = '{"world": 1, "impacts": 2}'
    for name in ("vocab.json", "tokenizer_config.json", "tokenizer.json"):
        (tmp_path / name).write_text(words)
    assert not convert_folder(tmp_path)
    assert (tmp_path / "vocab.json").read_text() == words


def test_an_old_lora_is_converted_with_its_metadata(tmp_path) -> None:
    path = tmp_path / "lora.safetensors"
    old = "transformer.hears.video.lora_A.weight"
    save_file({old: torch.ones(1, 2)}, path, {"modules": '["hears.video", "tick_time.audio"]'})
    assert convert_folder(tmp_path) == [path]
    with safe_open(path, framework="pt") as file:
        assert list(file.keys()) == ["transformer.cross_gate_proj.video.lora_A.weight"]
        assert file.metadata() == {"modules": '["cross_gate_proj.video", "shared_time_proj.audio"]'}
    assert new_weight_name("transformer_blocks.0.video.ff.proj_in.weight").startswith(
        "transformer_"
    )
