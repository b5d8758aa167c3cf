"""diffusers' machinery on our classes: LoRA, offload, attention backends, caches, casting,
compilation.
"""

from __future__ import annotations

import copy
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, QuantoConfig, TaylorSeerCacheConfig, TorchAoConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from peft import get_peft_model_state_dict
from tiny import fill_zeros, tiny_pipeline

from avdiff.models import presets
from avdiff.models.blocks import DualBlock
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train.joint.lora import add_lora, lora_layers
from avdiff.train.recipe import AdapterOptions


@pytest.fixture(scope="module")
def base() -> AVDiffPipeline:
    return tiny_pipeline()


@pytest.fixture
def pipe(base) -> AVDiffPipeline:
    """A pipeline with a transformer of its own, which a test may change."""
    own = AVDiffPipeline(**{**base.components, "transformer": copy.deepcopy(base.transformer)})
    own.set_progress_bar_config(disable=True)
    return own


def call(pipe: AVDiffPipeline, **changes):
    options = dict(
        num_inference_steps=2,
        seconds=0.6,
        output_type="tokens",
        guidance_scale=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    return pipe("A man with a beard", **{**options, **changes})


def differ(a, b) -> float:
    return float(max((a.frames - b.frames).abs().max(), (a.audio - b.audio).abs().max()))


def distance(a, b) -> float:
    """Mean difference of the pictures in units of their spread: about 1 for two clips that have
    nothing in common.
    """
    return float((a.frames - b.frames).abs().mean() / b.frames.std())


# -- LoRA -------------------------------------------------------------------------------------


def trained(
    transformer: AVTransformer, seed: int = 0, targets: tuple[str, ...] = ("all",)
) -> AVTransformer:
    """The transformer with an adapter as the trainer makes it, and values in it."""
    add_lora(transformer, AdapterOptions(rank=2, lora_targets=targets))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(transformer).values():
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.1)
    return transformer


def test_what_the_trainer_exports_loads_through_the_pipeline(base, pipe, tmp_path) -> None:
    plain = call(pipe)
    trained(pipe.transformer).save_lora_adapter(tmp_path)
    adapted = call(pipe)
    assert differ(adapted, plain) > 1e-3
    pipe.unload_lora_weights()
    assert differ(call(pipe), plain) < 1e-5
    pipe.load_lora_weights(tmp_path, adapter_name="style")
    assert pipe.get_list_adapters() == {
        "transformer": ["style"]
    } and pipe.get_active_adapters() == ["style"]
    assert differ(call(pipe), adapted) < 1e-5
    # the scale of a call reaches what is prepared ahead of the steps too: words, memory
    assert differ(call(pipe, attention_kwargs={"scale": 0.0}), plain) < 1e-4
    pipe.set_adapters(["style"], [0.5])
    half = call(pipe)
    assert differ(half, plain) > 1e-4 and differ(half, adapted) > 1e-4
    pipe.set_adapters(["style"], [1.0])
    pipe.disable_lora()
    assert differ(call(pipe), plain) < 1e-5
    pipe.enable_lora()
    pipe.fuse_lora()
    assert pipe.num_fused_loras == 1 and differ(call(pipe), adapted) < 1e-3
    pipe.unfuse_lora()
    assert differ(call(pipe), adapted) < 1e-3
    pipe.delete_adapters("style")
    assert differ(call(pipe), plain) < 1e-4


def test_adapters_are_saved_and_combined(pipe, tmp_path) -> None:
    for i, targets in enumerate((("video",), ("audio", "cross"))):
        model = trained(copy.deepcopy(pipe.transformer), i, targets)
        pipe.save_lora_weights(
            tmp_path / str(i),
            get_peft_model_state_dict(model),
            transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        )
    for i in range(2):
        pipe.load_lora_weights(tmp_path / str(i), adapter_name=str(i))
    outputs = {}
    for names in (["0"], ["1"], ["0", "1"]):
        pipe.set_adapters(names)
        outputs["".join(names)] = call(pipe)
    assert min(differ(outputs["01"], outputs[n]) for n in "01") > 1e-4
    state = pipe.lora_state_dict(tmp_path / "0")
    assert all(name.startswith("transformer.") for name in state)
    with pytest.raises(ValueError, match="needs a LoRA"):
        pipe.load_lora_weights({"transformer.proj_in_video.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="pickled weights can run code"):
        pipe.load_lora_weights(tmp_path / "0", use_safetensors=False)


# -- offload ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [dict(offload_type="block_level", num_blocks_per_group=1), dict(offload_type="leaf_level")],
)
def test_group_offload_changes_nothing(pipe, kind) -> None:
    plain = call(pipe)
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, **kind)
    pipe.vae = copy.deepcopy(pipe.vae)
    pipe.vae.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert differ(call(pipe), plain) == 0.0


def test_weights_may_rest_elsewhere_between_uses(pipe) -> None:
    """Sequential offload: every weight is on the meta device unless the layer that owns it is
    running.
    """
    plain = call(pipe)
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))
    resting = {p.device.type for n, p in pipe.transformer.named_parameters()}
    assert resting == {"meta"}
    assert differ(call(pipe), plain) == 0.0


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says that it needs what is here")
def test_offload_of_the_pipeline_says_that_it_needs_an_accelerator(pipe) -> None:
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(RuntimeError, match="requires accelerator"):
            offload()


# -- attention backends -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_attention_backends_agree(pipe, backend: str) -> None:
    plain = call(pipe)
    active, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        pipe.transformer.set_attention_backend(backend)
        assert differ(call(pipe), plain) < 1e-3
    finally:
        pipe.transformer.reset_attention_backend()
        _AttentionBackendRegistry.set_active_backend(
            active
        )  # which the reset leaves, for the whole process


# -- caches -----------------------------------------------------------------------------------


def block_calls(pipe: AVDiffPipeline) -> list[int]:
    """Counts how often the self-attention of each block runs."""
    counts = [0] * len(pipe.transformer.transformer_blocks)
    for i, block in enumerate(pipe.transformer.transformer_blocks):

        def note(module, args, i=i):
            counts[i] += 1

        block.video.self_attn.to_q.register_forward_pre_hook(note)
    return counts


def test_first_block_cache_skips_blocks_and_keeps_the_passes_apart(pipe) -> None:
    plain = call(pipe, num_inference_steps=6)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    assert (
        differ(call(pipe, num_inference_steps=6), plain) < 1e-5
    )  # nothing is close enough: nothing is skipped
    pipe.transformer.disable_cache()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    counts = block_calls(pipe)
    cached = call(pipe, num_inference_steps=6)
    assert counts[0] == 6 and 1 <= counts[1] < 6
    assert 0 < distance(cached, plain) < 1
    assert (
        differ(call(pipe, num_inference_steps=6), cached) == 0.0
    )  # a run leaves nothing behind for the next
    with pytest.raises(ValueError, match="needs both"):
        call(pipe, generate_audio=False)
    pipe.transformer.disable_cache()
    assert differ(call(pipe, num_inference_steps=6), plain) == 0.0


def test_taylorseer_predicts_attention(pipe) -> None:
    plain = call(pipe, num_inference_steps=6)
    pipe.transformer.enable_cache(
        TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1)
    )
    counts = block_calls(pipe)
    cached = call(pipe, num_inference_steps=6)
    assert counts == [4, 4]
    assert 0 < distance(cached, plain) < 1
    assert call(pipe, generate_audio=False).audio is None
    pipe.transformer.disable_cache()
    assert differ(call(pipe, num_inference_steps=6), plain) == 0.0


# -- precision --------------------------------------------------------------------------------


def test_layerwise_casting_stores_linear_layers_in_fp8(pipe) -> None:
    plain = call(pipe)
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    types = {n: p.dtype for n, p in pipe.transformer.named_parameters()}
    assert types["transformer_blocks.0.video.self_attn.to_q.weight"] == torch.float8_e4m3fn
    for kept in ("router", "memory", "norm", "time.", "table", "proj_in_video"):
        assert {t for n, t in types.items() if kept in n} == {torch.float32}, kept
    out = call(pipe)
    assert torch.isfinite(out.frames).all() and 0 < differ(out, plain) < 1


def test_half_precision_keeps_router_and_clock_wide(base, tmp_path) -> None:
    model = fill_zeros(AVTransformer(**{**presets.tiny(), "video_experts": 4}))
    own = AVDiffPipeline(**{**base.components, "transformer": model})
    own.save_pretrained(tmp_path)
    half = AVDiffPipeline.from_pretrained(
        tmp_path, dtype={"transformer": torch.bfloat16, "default": torch.float32}
    )
    half.set_progress_bar_config(disable=True)
    own.set_progress_bar_config(disable=True)
    wide = {n for n, p in half.transformer.named_parameters() if p.dtype == torch.float32}
    assert (
        wide == {n for n, _ in model.named_parameters() if "router" in n or n.startswith("time.")}
        and wide
    )
    assert half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.float32
    assert distance(call(half), call(own)) < 0.1


@pytest.mark.parametrize(
    ("config", "package"),
    [
        (lambda: QuantoConfig(weights_dtype="int8"), "optimum"),
        (lambda: TorchAoConfig("int8wo"), "torchao"),
    ],
)
def test_quantization_runs_or_says_what_is_missing(pipe, tmp_path, config, package: str) -> None:
    pipe.transformer.save_pretrained(tmp_path)
    if find_spec(package) is None:
        with pytest.raises((ImportError, NameError, TypeError), match=package):
            AVTransformer.from_pretrained(tmp_path, quantization_config=config())
        return
    pipe.transformer = AVTransformer.from_pretrained(tmp_path, quantization_config=config())
    assert torch.isfinite(call(pipe).frames).all()


# -- compilation and tiles --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_compile_without_a_graph_break(pipe, dtype: torch.dtype) -> None:
    """In fp32 a block with experts breaks its graph: torch knows the shapes of `grouped_mm` in half
    precision alone.
    """
    changes = (
        {"shared_experts": 0, "num_layers": 1, "shared_layers": ()}
        if dtype == torch.float32
        else {}
    )
    torch.manual_seed(0)
    pipe.transformer = fill_zeros(AVTransformer(**{**presets.tiny(), **changes})).eval().to(dtype)
    plain = call(pipe, num_inference_steps=1)
    torch.compiler.reset()
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert all(
        b._compiled_call_impl is not None
        for b in pipe.transformer.modules()
        if isinstance(b, DualBlock)
    )
    assert differ(call(pipe, num_inference_steps=1), plain) < (
        1e-4 if dtype == torch.float32 else 0.1
    )
    torch.compiler.reset()


def test_tiles_of_the_vae(pipe) -> None:
    options = dict(
        height=192, width=192, num_inference_steps=1, output_type="np", generate_audio=False
    )
    whole = call(pipe, **options)
    pipe.vae.enable_tiling(128, 64)
    tiled = call(pipe, **options)
    pipe.vae.disable_tiling()
    assert tiled.frames.shape == whole.frames.shape
    assert np.abs(tiled.frames - whole.frames).mean() < 0.05
