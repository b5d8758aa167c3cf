"""Training an LTX-2 on its own cache: ltx-trainer's loss, exact resume, frozen streams, files."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from diffusers import LTX2Pipeline, LTX2VideoTransformer3DModel
from safetensors.torch import load_file

from avdiff.data.cache import LatentCache, write_cache
from avdiff.families.ltx2.cache import LTX2CacheMakers, LTX2CaptionFeatures
from avdiff.families.ltx2.quantize import loading_config, quantize_int8
from avdiff.latents import Joint
from avdiff.train.joint import ltx2_recipe as options
from avdiff.train.joint.ltx2_plan import fused_attention, kept_bytes, meta_transformer
from avdiff.train.joint.ltx2_task import collate, noised, row_losses
from avdiff.train.joint.ltx2_train import is_for_ltx2, setup
from avdiff.train.loop.fit import FitOptions, fit
from tests import tiny_ltx2


class Films:
    """Two random films with stereo sound."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict:
        g = torch.Generator().manual_seed(index)
        return {
            "video": torch.randint(0, 255, (9, 64, 96, 3), generator=g, dtype=torch.uint8),
            "audio": 0.1 * torch.randn(2, 6000, generator=g),
            "caption": "a film",
            "fps": Fraction(24),
            "sample_rate": 16000,
        }


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    own = tiny_ltx2.loaded()
    makers = LTX2CacheMakers(own.codec, LTX2CaptionFeatures(own.texts, 16))
    return write_cache(Films(), makers, folder, {"source": "films"})


def recipe(cache, output, rank=2, steps=4, **changes):
    made = options.LTX2Recipe(
        options.LTX2ModelOptions(str(tiny_ltx2.folder()), dtype="float32"),
        options.LTX2DataOptions((str(cache),)),
        options.LTX2ObjectiveOptions(tasks={"joint": 0.5, "image": 0.5}),
        options.LTX2AdapterOptions(rank, lora_alpha=6.0 if rank else None),
        FitOptions(
            str(output),
            max_train_steps=steps,
            train_batch_size=1,
            learning_rate=1e-2,
            lr_scheduler="constant",
            ema_decay=0.5,
            checkpointing_steps=2,
        ),
    )
    return replace(made, **changes)


def test_a_cache_knows_its_clock_and_keeps_stereo(cache) -> None:
    held = LatentCache([cache])
    assert held.clip(0).clock.video_stride == 8
    assert held[0]["audio"].shape == (9, 32)
    assert held[0]["video"].shape == (12, 16)


def test_loss_is_the_trainers_formula_written_out(cache, tmp_path) -> None:
    task = setup(recipe(cache, tmp_path))
    batch = collate([task.dataset[0], task.dataset[1]])
    rows = [torch.Generator().manual_seed(i) for i in range(2)]
    n = noised(batch.tokens, task.layout(batch.clip), {"image": 1.0}, rows)
    with torch.no_grad():
        out = task.predict(batch, n)
    losses = row_losses(out, n)
    eps = n.target.video + batch.tokens.video
    sigma = n.sigma.video[..., None]
    assert torch.allclose(n.noisy.video, (1 - sigma) * batch.tokens.video + sigma * eps)
    assert torch.equal(n.noisy.video[:, :6], batch.tokens.video[:, :6])
    expected = (out.video - n.target.video)[:, 6:].square().mean((1, 2))
    assert torch.allclose(losses.video, expected, atol=1e-6)


@pytest.mark.parametrize("rank", [0, 2])
def test_resumed_equals_uninterrupted_and_the_export_loads(cache, tmp_path, rank) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    checked = recipe(cache, whole, rank)
    checked = replace(checked, model=replace(checked.model, gradient_checkpointing=True))
    fit(setup(checked), checked.training)
    for steps, resume in ((2, None), (4, "latest")):
        training = replace(
            checked.training,
            output_dir=str(parts),
            max_train_steps=steps,
            resume_from_checkpoint=resume,
        )
        part = replace(checked, training=training)
        fit(setup(part), training)
    names = sorted(p.name for p in (whole / "checkpoint-4").glob("*.safetensors"))
    assert names
    for name in names:
        a = load_file(whole / "checkpoint-4" / name)
        b = load_file(parts / "checkpoint-4" / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    if rank:
        LTX2Pipeline.from_pretrained(tiny_ltx2.folder()).load_lora_weights(
            whole / "final", weight_name="pytorch_lora_weights.safetensors"
        )
        assert (whole / "final" / "whole_native.safetensors").is_file()
    else:
        LTX2Pipeline.from_pretrained(whole / "final")


def test_training_the_picture_leaves_the_sound_bit_for_bit(cache, tmp_path) -> None:
    objective = options.LTX2ObjectiveOptions(("video",), {"a2v": 1.0})
    made = recipe(cache, tmp_path, 0, 2, objective=objective)
    task = setup(made)
    before = {k: v.clone() for k, v in task.transformer.state_dict().items()}
    fit(task, made.training)
    moved = {k for k, v in task.transformer.state_dict().items() if not torch.equal(v, before[k])}
    assert "transformer_blocks.0.attn1.to_q.weight" in moved
    assert not [k for k in moved if "audio_attn" in k or "video_to_audio" in k or "audio_ff" in k]


def test_int8_base_is_within_one_percent() -> None:
    model = LTX2VideoTransformer3DModel.from_pretrained(tiny_ltx2.folder(), subfolder="transformer")
    own = tiny_ltx2.loaded()
    layout = own.codec.layout(own.codec.clip(9, Fraction(24), 64, 96))
    text = own.texts(["a film"], 16)
    z = layout.noise(1, torch.Generator().manual_seed(0), torch.device("cpu"))
    level = torch.tensor([0.5])
    denoiser = type(own.denoiser)(model)
    with torch.no_grad():
        plain = denoiser(z, Joint(level, level), text, layout)
        assert quantize_int8(model) > 20
        coarse = denoiser(z, Joint(level, level), text, layout)
    error = (coarse.video - plain.video).norm() / plain.video.norm()
    assert 0 < float(error) < 0.01
    with pytest.raises(ValueError, match="nf4: needs"):
        loading_config("nf4")


def test_planned_activations_are_those_that_are_kept() -> None:
    config = tiny_ltx2.transformer_config("2.3")
    clip = tiny_ltx2.loaded().codec.clip(17, Fraction(24), 64, 96)
    real = kept_bytes(LTX2VideoTransformer3DModel(**config), clip, 1, "cpu")
    with fused_attention():
        planned = kept_bytes(meta_transformer(config), clip, 1, "meta")
    assert planned == pytest.approx(real, rel=0.01)


def test_recipes_are_recognized_by_their_family() -> None:
    assert is_for_ltx2(["ltx2_lora.toml"])
    assert not is_for_ltx2(["lora.toml"])


def test_the_cache_command_reads_clips_on_the_clock_of_the_folder() -> None:
    from avdiff import PRESENTER
    from avdiff.data.clips import ClipOptions
    from avdiff.families.ltx2.cache import load_makers

    assert load_makers(PRESENTER, False) is None
    makers = load_makers(tiny_ltx2.folder(), True)
    made = ClipOptions(buckets="96x64x17", **makers.clip_settings())
    assert (made.fps, made.channels, made.clock.video_stride) == (24, 2, 8)
    assert makers.text is not None
    assert load_makers(tiny_ltx2.folder(), False).text is None
