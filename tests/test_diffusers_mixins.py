"""What diffusers' own test mixins ask of every model and pipeline, asked of ours.

`external_mixins.py` runs the originals from a checkout of diffusers.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import AttnProcessor
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.source_code_parsing_utils import ReturnNameVisitor
from tiny import fill_zeros, tiny_components

from avdiff.clip import ClipSpec
from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline

CLIP = ClipSpec(num_frames=9)


def make_model() -> AVTransformer:
    torch.manual_seed(0)
    return fill_zeros(AVTransformer(**presets.tiny()))


def model_inputs() -> dict:
    g = torch.Generator().manual_seed(0)
    return dict(
        hidden_states=torch.randn(2, CLIP.video_tokens, 64, generator=g),
        audio_hidden_states=torch.randn(2, CLIP.audio_tokens, 48, generator=g),
        timestep=torch.tensor([0.9, 0.3]),
        audio_timestep=torch.tensor([0.5, 0.7]),
        text=torch.randn(2, 5, 32, generator=g),
        text_mask=torch.ones(2, 5, dtype=torch.bool),
        positions=Positions.of(CLIP),
    )


@torch.no_grad()
def video(model: AVTransformer) -> torch.Tensor:
    return model(**model_inputs(), return_dict=False)[0]


@pytest.fixture(scope="module")
def components() -> dict:
    return tiny_components()


def make_pipe(components: dict, **changes) -> AVDiffPipeline:
    pipe = AVDiffPipeline(**{**components, **changes})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipe_inputs(**changes) -> dict:
    options = dict(
        prompt="A woman with red hair",
        num_inference_steps=2,
        seconds=0.4,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
        guidance_scale=2.0,
    )
    return {**options, **changes}


# -- models -----------------------------------------------------------------------------------


def test_variants_and_shards(tmp_path) -> None:
    model = make_model().eval()
    model.save_pretrained(tmp_path / "variant", variant="fp16")
    torch.testing.assert_close(
        video(AVTransformer.from_pretrained(tmp_path / "variant", variant="fp16")), video(model)
    )
    with pytest.raises(OSError, match="no file named"):
        AVTransformer.from_pretrained(tmp_path / "variant")
    model.save_pretrained(tmp_path / "shards", max_shard_size="200KB")
    assert (tmp_path / "shards" / SAFE_WEIGHTS_INDEX_NAME).is_file()
    torch.testing.assert_close(
        video(AVTransformer.from_pretrained(tmp_path / "shards")), video(model)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_survives_saving(tmp_path, dtype: torch.dtype) -> None:
    make_model().to(dtype).save_pretrained(tmp_path)
    again = AVTransformer.from_pretrained(tmp_path, dtype=dtype)
    assert again.dtype == dtype
    for name, p in again.named_parameters():
        kept = any(part in name.split(".") for part in AVTransformer._keep_in_fp32_modules)
        assert p.dtype == (torch.float32 if kept else dtype), name
    assert torch.isfinite(video(again)).all()


def test_two_calls_are_equal_and_a_tuple_holds_what_the_record_holds() -> None:
    model = make_model().eval()
    assert torch.equal(video(model), video(model))
    with torch.no_grad():
        record, pair = model(**model_inputs()), model(**model_inputs(), return_dict=False)
    assert (
        torch.equal(record.video, pair[0]) and torch.equal(record.audio, pair[1]) and len(pair) == 2
    )


def test_attributes_and_casts_warn_where_they_should(caplog) -> None:
    model = make_model()
    model.register_to_config(test_attribute=5)
    with pytest.warns(FutureWarning):
        assert model.test_attribute == 5
    with pytest.raises(AttributeError, match="has no attribute 'does_not_exist'"):
        _ = model.does_not_exist
    diffusers_logging.enable_propagation()
    with caplog.at_level(logging.WARNING, logger="diffusers.models.modeling_utils"):
        model.to(torch.float16)
    diffusers_logging.disable_propagation()
    assert "should be kept in float32: ['time', 'router']" in caplog.text


def test_attention_processors() -> None:
    model = make_model().eval()
    before = video(model)
    model.fuse_qkv_projections()
    assert torch.equal(video(model), before)
    model.unfuse_qkv_projections()
    own = model.attn_processors
    model.set_attn_processor({name: AttnProcessor() for name in own})
    assert all(type(p) is AttnProcessor for p in model.attn_processors.values())
    with pytest.raises(ValueError, match="number of processors"):
        model.set_attn_processor({next(iter(own)): AttnProcessor()})
    for module in model.modules():
        if isinstance(module, AttentionModuleMixin):
            processor = AttnProcessor()
            module.set_processor(processor)
            assert module.get_processor() is processor


def test_training_with_an_average() -> None:
    model = make_model().train()
    average = EMAModel(model.parameters())
    out = model(**model_inputs())
    (out.video.square().mean() + out.audio.square().mean()).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    average.step(model.parameters())
    assert not model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    flagged = {
        type(m).__name__ for m in model.modules() if getattr(m, "gradient_checkpointing", False)
    }
    assert flagged == {"AVTransformer"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_audio_codec_in_half_precision_takes_what_it_gives(components, dtype: torch.dtype) -> None:
    """Its moments are fp32, and its decoder takes them; with fp8 storage the layers work in the
    compute dtype.
    """
    mel = torch.randn(1, 1, 16, 100)
    vae = copy.deepcopy(components["audio_vae"])
    with torch.no_grad():
        wanted, got = vae(mel).sample, vae.to(dtype)(mel.to(dtype)).sample
        torch.testing.assert_close(got, wanted, atol=0.1, rtol=0.1)
        torch.testing.assert_close(vae(mel).sample, got, atol=0, rtol=0)
        vae.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
        assert torch.isfinite(vae(mel).sample).all()


def test_caption_features_from_stored_weights(components) -> None:
    """Every weight is used by its own layer, which is what lets it rest in fp8."""
    ids, mask = torch.randint(1, 200, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    encoder = copy.deepcopy(components["text_encoder"])
    with torch.no_grad():
        wanted = encoder(ids, mask)
        encoder.to(torch.bfloat16).enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
        assert (encoder(ids, mask).float() - wanted).abs().mean() < 0.2


def test_vocoder_stays_in_fp32(components) -> None:
    """`pipe.to(dtype)` must not change what it computes."""
    mel = torch.randn(1, 1, 8, 100)
    vocoder = copy.deepcopy(components["vocoder"])
    with torch.no_grad():
        wanted = vocoder(mel)
        vocoder.to(torch.bfloat16)
        assert vocoder.dtype == torch.bfloat16 and vocoder.enter.weight.dtype == torch.float32
        torch.testing.assert_close(vocoder(mel), wanted, atol=2e-2, rtol=0)


def test_mel_front_end_moves_an_offloaded_codec(components) -> None:
    calls = []

    class Hook(ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(type(module).__name__)
            return args, kwargs

    vae = copy.deepcopy(components["audio_vae"])
    add_hook_to_module(vae, Hook())
    vae.mel(torch.zeros(1, 1, 1920))
    assert calls == ["AVAudioVAE"]


# -- pipelines --------------------------------------------------------------------------------


def test_signature() -> None:
    parameters = inspect.signature(AVDiffPipeline.__call__).parameters
    wanted = [
        "prompt",
        "negative_prompt",
        "height",
        "width",
        "guidance_scale",
        "prompt_embeds",
        "negative_prompt_embeds",
        "num_inference_steps",
        "num_videos_per_prompt",
        "generator",
        "latents",
        "output_type",
        "return_dict",
        "callback_on_step_end",
        "callback_on_step_end_tensor_inputs",
        "attention_kwargs",
    ]
    for name in wanted:
        assert parameters[name].default is not inspect.Parameter.empty, name


def test_components_and_variants(components, tmp_path) -> None:
    pipe = make_pipe(components)
    assert set(pipe.components) == {*components, "prompt_domain"}
    pipe.save_pretrained(tmp_path, variant="fp16")
    index = json.loads((tmp_path / "model_index.json").read_text())
    for name, part in components.items():
        if isinstance(part, torch.nn.Module):
            assert name in index and any(".fp16." in f.name for f in (tmp_path / name).iterdir()), (
                name
            )
    again = AVDiffPipeline.from_pretrained(tmp_path, variant="fp16")
    for a, b in zip(pipe.vae.parameters(), again.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="variant=fp16"):
        AVDiffPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


def test_optional_components_stay_away(components, tmp_path) -> None:
    embeds, mask, _, _ = make_pipe(components).encode_prompt("a man")
    bare = make_pipe(components, text_encoder=None, tokenizer=None)
    inputs = pipe_inputs(prompt=None, prompt_embeds=embeds, prompt_attention_mask=mask)
    before = bare(**inputs)
    bare.save_pretrained(tmp_path)
    again = AVDiffPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.text_encoder is None and again.tokenizer is None and again.prompt_domain is None
    after = again(**{**inputs, "generator": torch.Generator().manual_seed(0)})
    torch.testing.assert_close(after.frames, before.frames, atol=1e-4, rtol=0)


def test_prompts_are_encoded_by_a_pipeline_with_a_text_encoder_alone(
    components, monkeypatch
) -> None:
    monkeypatch.setattr(
        diffusers.pipelines, "AVDiffPipeline", AVDiffPipeline, raising=False
    )  # where it looks
    alone = AVDiffPipeline(
        **{n: c if n in ("text_encoder", "tokenizer") else None for n, c in components.items()}
    )
    visitor = ReturnNameVisitor()
    visitor.visit(visitor.get_ast_tree(cls=AVDiffPipeline))
    with torch.no_grad():
        encoded = dict(
            zip(visitor.return_names, alone.encode_prompt("A woman with red hair"), strict=True)
        )
    parameters = inspect.signature(AVDiffPipeline.__call__).parameters
    assert all(name in parameters for name in encoded)
    without = make_pipe(components, text_encoder=None, tokenizer=None)
    out = without(**{**pipe_inputs(prompt=None), **encoded})
    torch.testing.assert_close(
        out.frames, make_pipe(components)(**pipe_inputs()).frames, atol=1e-4, rtol=0
    )


def test_dtypes(components, tmp_path) -> None:
    parts = {
        n: copy.deepcopy(c) if isinstance(c, torch.nn.Module) else c for n, c in components.items()
    }
    pipe = make_pipe(parts)
    pipe.save_pretrained(tmp_path)
    pipe.to(dtype=torch.float16)
    assert all(
        m.dtype == torch.float16 for m in pipe.components.values() if isinstance(m, torch.nn.Module)
    )
    loaded = AVDiffPipeline.from_pretrained(
        tmp_path, dtype={"vae": torch.bfloat16, "default": torch.float16}
    )
    found = {n: m.dtype for n, m in loaded.components.items() if isinstance(m, torch.nn.Module)}
    assert found.pop("vae") == torch.bfloat16 and set(found.values()) == {torch.float16}
    mel = torch.randn(1, 1, 8, 100)
    torch.testing.assert_close(
        loaded.vocoder.read_pitch(mel[0]).hertz, components["vocoder"].read_pitch(mel[0]).hertz
    )
    assert loaded.vocoder(mel).dtype == torch.float32 and torch.isfinite(loaded.vocoder(mel)).all()


def test_half_precision_by_a_cast(components) -> None:
    parts = {
        n: copy.deepcopy(c) if isinstance(c, torch.nn.Module) else c for n, c in components.items()
    }
    out = make_pipe(parts).to(torch.bfloat16)(**pipe_inputs())
    assert torch.isfinite(out.frames).all() and torch.isfinite(out.audio).all()


def test_weights_of_every_part_may_rest_elsewhere(components) -> None:
    """Sequential offload: each weight is on the meta device unless the layer that owns it is
    running.
    """
    parts = {
        n: copy.deepcopy(c) if isinstance(c, torch.nn.Module) else c for n, c in components.items()
    }
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            cpu_offload(part, execution_device=torch.device("cpu"))
    sound = torch.randn(1, 1, 9600) * 0.1
    wanted, out = (
        make_pipe(p)(**pipe_inputs(audio=sound, seconds=0.56)) for p in (components, parts)
    )
    assert torch.equal(out.frames, wanted.frames) and torch.equal(out.audio, wanted.audio)


def test_callbacks_see_what_is_listed(components) -> None:
    pipe = make_pipe(components)

    def all_of_them(pipeline, index, timestep, tensors):
        assert sorted(tensors) == sorted(pipeline._callback_tensor_inputs)
        if index == pipeline.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        pipeline._guidance_scale += 1.0
        return tensors

    out = pipe(
        **pipe_inputs(
            output_type="tokens",
            callback_on_step_end=all_of_them,
            callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
        )
    )
    assert not out.frames.any() and out.audio.any()
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
