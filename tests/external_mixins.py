"""diffusers' own test mixins on our classes, from a checkout of its repository (its wheel has no tests).

    pip install parameterized requests-mock
    PYTHONPATH=/path/to/diffusers python -m pytest --noconftest tests/external_mixins.py

Not collected by `make test`. The transformer's zero-initialised parts are filled: a fresh one ignores its blocks, and
tests that look for a change in the output would find none. Does not apply: pickled weights
(`safe_serialization=False`), which are refused on loading.
"""

from __future__ import annotations

import functools

import diffusers
import torch
from test_diffusers_mixins import CLIP, model_inputs, pipe_inputs
from tests.models.testing_utils import (  # type: ignore[import-not-found]
    AttentionTesterMixin,
    BaseModelTesterConfig,
    FirstBlockCacheTesterMixin,
    LoraTesterMixin,
    MemoryTesterMixin,
    ModelTesterMixin,
    TaylorSeerCacheTesterMixin,
    TrainingTesterMixin,
)
from tests.pipelines.testing_utils.common import BasePipelineTesterConfig, PipelineTesterMixin
from tiny import tiny_components

from avdiff.models import presets
from avdiff.models.transformer import AVTransformer
from avdiff.pipelines.pipeline_av import AVDiffPipeline


@functools.wraps(AVTransformer.__init__)
def _filled(self, *args, **kwargs) -> None:
    AVTransformer.__init__(self, *args, **kwargs)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in self.parameters():
            if not p.is_meta and not p.any():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)


Filled = type("AVTransformer", (AVTransformer,), {"__init__": _filled})


class Config(BaseModelTesterConfig):
    model_class = Filled
    output_shape = (CLIP.video_tokens, 64)

    def get_init_dict(self) -> dict:
        return presets.tiny()

    def get_dummy_inputs(self) -> dict:
        return model_inputs()


class TestModel(Config, ModelTesterMixin, TrainingTesterMixin, AttentionTesterMixin):
    def test_gradient_checkpointing_is_applied(self) -> None:
        super().test_gradient_checkpointing_is_applied(expected_set={"AVTransformer"})


class TestLora(Config, LoraTesterMixin):
    pass


class TestMemory(Config, MemoryTesterMixin):
    pass


class TestFirstBlockCache(Config, FirstBlockCacheTesterMixin):
    pass


class TestTaylorSeer(Config, TaylorSeerCacheTesterMixin):
    pass


diffusers.pipelines.AVDiffPipeline = AVDiffPipeline  # where the test of `encode_prompt` looks for it


class TestPipeline(BasePipelineTesterConfig, PipelineTesterMixin):
    pipeline_class = AVDiffPipeline
    required_input_params_in_call_signature = frozenset(["prompt", "height", "width", "guidance_scale"])
    batch_input_params = frozenset(["prompt"])
    optional_input_params = frozenset(["num_inference_steps", "generator", "latents", "output_type", "return_dict"])
    output_shape = (11, 3, 128, 128)

    def get_dummy_components(self) -> dict:
        return {**tiny_components(), "world": None}

    def get_dummy_inputs(self) -> dict:
        return pipe_inputs()
