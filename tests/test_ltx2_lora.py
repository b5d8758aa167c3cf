"""LoRA files of an LTX-2: what avdiff writes is read by diffusers, and every spelling that is
about is read here, with an alpha that is not the rank.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import LTX2Pipeline
from safetensors.torch import load_file, save_file
from torch import nn

from avdiff.cli.lora import app
from avdiff.families.ltx2.lora import (
    LoraFile,
    LoraLayer,
    merge_lora,
    read_lora,
    still_modalities,
    summarize,
    write_lora,
)
from avdiff.families.ltx2.names import branch_of, owner_of, to_diffusers, to_native
from tests import tiny_ltx2

SIZE = dict(prompt="A woman", height=64, width=96, num_frames=9, max_sequence_length=16)
PLAIN = dict(
    guidance_scale=1.0,
    stg_scale=0.0,
    modality_scale=1.0,
    guidance_rescale=0.0,
    audio_guidance_scale=1.0,
    audio_stg_scale=0.0,
    audio_modality_scale=1.0,
    audio_guidance_rescale=0.0,
)


def made(ranks: tuple[int, ...] = (4,), alpha: float = 10.0) -> LoraFile:
    """Updates of every linear layer in the blocks of the tiny 2.3."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    modules = tiny_ltx2.loaded().transformer.named_modules()
    linear = [(n, m) for n, m in modules if isinstance(m, nn.Linear) and "blocks" in n]
    for index, (name, module) in enumerate(linear):
        rank = ranks[index % len(ranks)]
        down = 0.2 * torch.randn(rank, module.in_features, generator=generator)
        up = 0.2 * torch.randn(module.out_features, rank, generator=generator)
        layers[name] = LoraLayer(down, up, alpha)
    return LoraFile(layers)


def fresh() -> LTX2Pipeline:
    pipe = LTX2Pipeline.from_pretrained(tiny_ltx2.folder())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: LTX2Pipeline) -> torch.Tensor:
    steps = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    out = pipe(**SIZE, **PLAIN, **steps, output_type="latent")
    return torch.cat([out.frames.flatten(), out.audio.flatten()])


@pytest.mark.parametrize("ranks", [(4,), (2, 4, 4)])
def test_both_written_files_load_in_diffusers_as_the_merged_weights(tmp_path, ranks) -> None:
    lora = made(ranks)
    merged = fresh()
    plain = latents(merged)
    assert merge_lora(merged.transformer, lora) == len(lora.layers)
    expected = latents(merged)
    assert float((expected - plain).abs().max()) > 0.1
    for kind in ("diffusers", "native"):
        path = write_lora(lora, tmp_path / f"{kind}.safetensors", kind)
        pipe = fresh()
        pipe.load_lora_weights(path.parent, weight_name=path.name)
        assert float((latents(pipe) - expected).abs().max()) <= 5e-6, kind
        assert not [key for key in load_file(path) if key.endswith(".alpha")]


def test_the_native_file_needs_no_alpha_to_be_merged_by_hand(tmp_path) -> None:
    """ltx-core adds strength * B @ A and reads neither alpha nor metadata."""
    lora = made((4, 2))
    tensors = load_file(write_lora(lora, tmp_path / "x.safetensors", "native"))
    for name, layer in lora.layers.items():
        key = f"diffusion_model.{to_native(name)}"
        delta = tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        assert float((delta - layer.delta()).abs().max()) <= 5e-6


def spelled(lora: LoraFile, how: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, layer in lora.layers.items():
        native = to_native(name)
        key = {
            "alpha": f"diffusion_model.{native}",
            "kohya": f"diffusion_model.{native}",
            "underscores": f"lora_unet_{native.replace('.', '_')}",
            "bare": name,
            "bare native": native,
            "peft": f"base_model.model.{name}",
        }[how]
        down, up = {
            "kohya": ("lora_down.weight", "lora_up.weight"),
            "underscores": ("lora_down.weight", "lora_up.weight"),
            "peft": ("lora_A.default.weight", "lora_B.default.weight"),
        }.get(how, ("lora_A.weight", "lora_B.weight"))
        folded = how in ("bare", "bare native", "peft")
        tensors[f"{key}.{down}"] = layer.down
        tensors[f"{key}.{up}"] = layer.up * layer.scale if folded else layer.up
        if not folded:
            tensors[f"{key}.alpha"] = torch.tensor(layer.alpha)
    return tensors


@pytest.mark.parametrize("how", ["alpha", "kohya", "underscores", "bare", "bare native", "peft"])
def test_every_spelling_is_read(tmp_path, how: str) -> None:
    lora = made()
    save_file(spelled(lora, how), tmp_path / "x.safetensors")
    found = read_lora(tmp_path / "x.safetensors")
    assert found.layers.keys() == lora.layers.keys()
    for name, layer in lora.layers.items():
        assert torch.allclose(found.layers[name].delta(), layer.delta(), atol=1e-6)


def test_our_pipeline_loads_what_diffusers_refuses(tmp_path) -> None:
    lora = made()
    save_file(spelled(lora, "alpha"), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="lora"):
        fresh().load_lora_weights(tmp_path, weight_name="x.safetensors")
    pipe = tiny_ltx2.LTX2JointPipeline.from_pretrained(tiny_ltx2.folder())
    pipe.load_lora_weights(tmp_path / "x.safetensors")
    name = "transformer_blocks.1.audio_attn1.to_q"
    layer = pipe.transformer.get_submodule(name)
    update = layer.scaling["default_0"] * (
        layer.lora_B["default_0"].weight @ layer.lora_A["default_0"].weight
    )
    assert torch.allclose(update, lora.layers[name].delta(), atol=1e-6)


def test_names_round_trip_and_agree_with_the_branches() -> None:
    for version in tiny_ltx2.VERSIONS:
        for name in tiny_ltx2.loaded(version).transformer.state_dict():
            assert to_diffusers(to_native(name)) == name
    cases = {
        "transformer_blocks.0.attn1.to_q": ("video", "video"),
        "transformer_blocks.0.attn2.to_q": ("text", "video"),
        "transformer_blocks.0.audio_attn2.to_q": ("text", "audio"),
        "transformer_blocks.0.audio_ff.net.2": ("audio", "audio"),
        "transformer_blocks.0.audio_to_video_attn.to_k": ("cross", "video"),
        "transformer_blocks.0.video_to_audio_attn.to_k": ("cross", "audio"),
        "av_cross_attn_audio_v2a_gate.linear": ("cross", "audio"),
        "av_cross_attn_video_a2v_gate.linear": ("cross", "video"),
        "audio_proj_in": ("audio", "audio"),
    }
    for name, (branch, owner) in cases.items():
        assert (branch_of(name), owner_of(name)) == (branch, owner), name


def test_command_line(tmp_path, capsys) -> None:
    lora = made()
    path = write_lora(lora, tmp_path / "a.safetensors", told={"trigger": "zxq"})

    def run(*words: object) -> str:
        app([str(word) for word in words], standalone_mode=False)
        return capsys.readouterr().out

    assert "diffusers -> native" in run("convert", path, "-o", tmp_path / "n.safetensors")
    assert read_lora(tmp_path / "n.safetensors").told["trigger"] == "zxq"
    assert '"ranks": [4]' in run("info", path, "--json")
    words = ("scale", path, "-o", tmp_path / "s.safetensors", "--strength", "audio=0")
    run(*words, "--strength", "0.5")
    scaled = read_lora(tmp_path / "s.safetensors")
    norms = {b: entry.norm for b, entry in summarize(scaled).items()}
    assert norms["audio"] == 0
    assert norms["video"] == pytest.approx(0.5 * summarize(lora)["video"].norm, rel=1e-5)
    assert still_modalities(lora) == []
    run("merge", path, "--model", tiny_ltx2.folder(), "-o", tmp_path / "merged")
    assert LTX2Pipeline.load_config(tmp_path / "merged")["_class_name"] == "LTX2Pipeline"
    with pytest.raises(ValueError, match="exists already"):
        run("merge", path, "--model", tiny_ltx2.folder(), "-o", tmp_path / "merged")
    with pytest.raises(ValueError, match="strength=x: needs a number"):
        run("scale", path, "-o", tmp_path / "t.safetensors", "--strength", "x")
    with pytest.raises(ValueError, match="this file has layers of"):
        run("scale", path, "-o", tmp_path / "t.safetensors", "--strength", "memory=1")


BROKEN = {
    "no such file": None,
    "is no matrix of a LoRA": {"diffusion_model.x.weight": torch.zeros(2, 2)},
    "names no linear layer": {"transformer.nothing.lora_A.weight": torch.zeros(2, 2)},
    "has no up matrix": {"transformer.proj_in.lora_A.weight": torch.zeros(2, 2)},
}


@pytest.mark.parametrize("message", BROKEN)
def test_what_is_no_lora_is_one_sentence(tmp_path: Path, message: str) -> None:
    if (tensors := BROKEN[message]) is not None:
        save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message):
        read_lora(tmp_path / "x.safetensors")
