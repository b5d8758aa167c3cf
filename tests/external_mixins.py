"""diffusers' own test mixins on our classes, from a checkout of its repository (its wheel has no
tests).

    python -m pytest tests/external_mixins.py --diffusers PATH

Not collected by `make test`. The zero-initialised parts of a model are filled: a fresh one ignores
its blocks, and tests that look for a change in the output would find none. Without an accelerator
the tests that ask for one run on the CPU, but for those of `NEEDS_CARD`.
"""

from __future__ import annotations

import functools
from typing import Any

import diffusers
import pytest
import torch
from test_diffusers_mixins import CLIP, model_inputs, pipe_inputs
from tiny import fill_zeros, tiny_audio_vae, tiny_components, tiny_vae

from avdiff.models import presets
from avdiff.models.codecs.audio_vae import AVAudioVAE
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline

pytest.importorskip(
    "tests.models.testing_utils", reason="needs --diffusers PATH, a source checkout of diffusers"
)

from tests.models import testing_utils as models
from tests.models.autoencoders.testing_utils import NewAutoencoderTesterMixin
from tests.pipelines import testing_utils as pipelines
from tests.testing_utils import torch_device

# Of the tests that ask for an accelerator, those that a CPU cannot stand in for.
NEEDS_CARD = {
    "test_model_parallelism": "two accelerators",
    "test_cpu_offload": "device 0",
    "test_disk_offload_with_safetensors": "device 0",
    "test_disk_offload_without_safetensors": "device 0",
    "test_cpu_offload_forward_pass_twice": "a default accelerator",
    # our tests have a stand-in
    "test_sequential_cpu_offload_forward_pass": "a device other than the CPU to run on",
    "test_sequential_offload_forward_pass_twice": "a device other than the CPU to run on",
}


def no(reason: str) -> Any:
    """In place of a test that cannot apply."""

    def test(self) -> None:
        pytest.skip(f"not applicable: {reason}")

    return test


def on_cpu(mixin: type) -> type:
    """The mixin without its skips for machines without an accelerator."""
    if torch_device != "cpu":
        return mixin
    for owner in mixin.__mro__:
        for item in (owner, *vars(owner).values()):
            if getattr(item, "pytestmark", None):
                item.pytestmark = [mark for mark in item.pytestmark if mark.name != "skipif"]
    skipped = {
        name: no(f"needs {what}") for name, what in NEEDS_CARD.items() if hasattr(mixin, name)
    }
    return type(mixin.__name__, (mixin,), skipped)


def filled(kind: type) -> type:
    """`kind` with values in its zero-initialised parameters, and group offload without streams
    where there are none.
    """

    @functools.wraps(kind.__init__)
    def init(self, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        if not any(p.is_meta for p in self.parameters()):
            fill_zeros(self)

    def enable_group_offload(self, *args: Any, **options: Any) -> None:
        if torch_device == "cpu":
            options.update(use_stream=False, record_stream=False)
        kind.enable_group_offload(self, *args, **options)

    return type(
        kind.__name__, (kind,), {"__init__": init, "enable_group_offload": enable_group_offload}
    )


class Transformer(models.BaseModelTesterConfig):
    model_class = filled(AVTransformer)
    main_input_name = "hidden_states"
    output_shape = (CLIP.video_tokens, 64)

    def get_init_dict(self) -> dict:
        return presets.tiny()

    def get_dummy_inputs(self) -> dict:
        return model_inputs()


class VideoVAE(models.BaseModelTesterConfig):
    model_class = filled(AVVideoVAE)
    main_input_name = "sample"
    output_shape = (3, 5, 64, 64)

    def get_init_dict(self) -> dict:
        return _options(tiny_vae())

    def get_dummy_inputs(self) -> dict:
        return dict(
            sample=torch.rand(2, *self.output_shape, generator=torch.Generator().manual_seed(0)) * 2
            - 1
        )


class AudioVAE(models.BaseModelTesterConfig):
    model_class = filled(AVAudioVAE)
    main_input_name = "sample"
    output_shape = (1, 16, 100)

    def get_init_dict(self) -> dict:
        return _options(tiny_audio_vae())

    def get_dummy_inputs(self) -> dict:
        return dict(
            sample=torch.randn(2, *self.output_shape, generator=torch.Generator().manual_seed(0))
        )


def _options(model: Any) -> dict:
    return {name: value for name, value in model.config.items() if not name.startswith("_")}


# -- models -----------------------------------------------------------------------------------


class TestTransformer(Transformer, on_cpu(models.ModelTesterMixin)):
    pass


class TestTransformerTraining(Transformer, on_cpu(models.TrainingTesterMixin)):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"AVTransformer"})


class TestTransformerAttention(Transformer, models.AttentionTesterMixin):
    pass


class TestTransformerLora(Transformer, models.LoraTesterMixin):
    pass


class TestTransformerMemory(Transformer, on_cpu(models.MemoryTesterMixin)):
    pass


class TestFirstBlockCache(Transformer, models.FirstBlockCacheTesterMixin):
    pass


class TestTaylorSeer(Transformer, models.TaylorSeerCacheTesterMixin):
    pass


class TestMagCache(Transformer, models.MagCacheTesterMixin):
    pass


class TestPyramidAttentionBroadcast(Transformer, models.PyramidAttentionBroadcastTesterMixin):
    pass


class TestFasterCache(Transformer, models.FasterCacheTesterMixin):
    test_faster_cache_inference = no(
        "halves a batch of guided pairs; our passes for guidance are apart"
    )


class TestVideoVAE(VideoVAE, on_cpu(models.ModelTesterMixin)):
    pass


class TestVideoVAETraining(VideoVAE, on_cpu(models.TrainingTesterMixin)):
    pass


class TestVideoVAEMemory(VideoVAE, on_cpu(models.MemoryTesterMixin)):
    pass


class TestVideoVAETiles(VideoVAE, NewAutoencoderTesterMixin):
    pass


class TestAudioVAE(AudioVAE, on_cpu(models.ModelTesterMixin)):
    pass


class TestAudioVAETraining(AudioVAE, on_cpu(models.TrainingTesterMixin)):
    pass


class TestAudioVAEMemory(AudioVAE, on_cpu(models.MemoryTesterMixin)):
    pass


class TestAudioVAETiles(AudioVAE, NewAutoencoderTesterMixin):
    pass


# -- pipeline ---------------------------------------------------------------------------------


class Pipeline(pipelines.BasePipelineTesterConfig):
    pipeline_class = AVDiffPipeline
    required_input_params_in_call_signature = frozenset(
        ["prompt", "height", "width", "guidance_scale"]
    )
    batch_input_params = frozenset(["prompt"])
    optional_input_params = frozenset(
        ["num_inference_steps", "generator", "latents", "output_type", "return_dict"]
    )
    output_shape = (11, 3, 128, 128)

    def get_dummy_components(self, num_layers: int | None = None) -> dict:
        return {**tiny_components(), "prompt_domain": None}

    def get_dummy_inputs(self, device: Any = None) -> dict:
        return pipe_inputs()

    def get_pipeline(self, **components: Any) -> AVDiffPipeline:
        """Its `save_pretrained` writes safetensors even when asked not to: pickled weights are
        refused on loading.
        """
        pipe = super().get_pipeline(**components)
        save = pipe.save_pretrained
        pipe.save_pretrained = lambda folder, safe_serialization=True, **options: save(
            folder, **options
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


class TestPipeline(Pipeline, on_cpu(pipelines.PipelineTesterMixin)):
    @pytest.fixture(autouse=True)
    def visible(self, monkeypatch) -> None:
        monkeypatch.setattr(diffusers.pipelines, "AVDiffPipeline", AVDiffPipeline, raising=False)

    def test_save_load_optional_components(self, tmp_path) -> None:
        """The original, with features of the prompt: without its optional parts the pipeline cannot
        read one.
        """
        embeds, mask, _, _ = self.get_pipeline().encode_prompt("A woman with red hair")
        self.get_dummy_inputs = lambda: pipe_inputs(
            prompt=None, prompt_embeds=embeds.detach(), prompt_attention_mask=mask
        )
        super().test_save_load_optional_components(tmp_path)


class TestPipelineMemory(Pipeline, on_cpu(pipelines.MemoryTesterMixin)):
    pass


class TestPipelineFirstBlockCache(Pipeline, pipelines.FirstBlockCacheTesterMixin):
    pass


class TestPipelineTaylorSeer(Pipeline, pipelines.TaylorSeerCacheTesterMixin):
    pass


class TestPipelineMagCache(Pipeline, pipelines.MagCacheTesterMixin):
    pass
