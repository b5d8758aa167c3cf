"""Start-up: what `avdiff generate` must not load, and that what is deferred is all there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from avdiff.deferred_imports import homes_of_names

# Modules that took a third of the start before; each stands for what comes with it.
NOT_FOR_GENERATE = {
    "avdiff.data",
    "avdiff.evaluation",
    "avdiff.evaluators",
    "avdiff.models.evaluators",
    "avdiff.train",
    "diffusers.models.autoencoders.autoencoder_kl_wan",
    "diffusers.models.autoencoders.ltx2_diffusion_decoder",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.models.transformers.transformer_wan",
    "diffusers.models.unets.unet_3d_condition",
    "diffusers.pipelines.stable_diffusion",
    "fugashi",
    "jieba",
    "matplotlib",
    "pandas",
    "skia",
    "tensorflow",
}

LOADED_BY_GENERATE = """
import json, sys
from avdiff.cli.main import main
from avdiff import AVDiffPipeline
import avdiff.cli.generate_inputs, avdiff.media.write
loaded = sorted(sys.modules)

from diffusers import AutoencoderKLWan, FluxTransformer2DModel, UNet3DConditionModel
from diffusers.models import unets
found = [AutoencoderKLWan.__module__, FluxTransformer2DModel.__name__, unets.UNet2DModel.__name__]
print(json.dumps({
    "loaded": loaded,
    "found": found,
    "module": unets.uvit_2d.__name__,
    "star": "UNet3DConditionModel" in unets.__all__ and "unet_2d" in dir(unets),
    "missing": hasattr(unets, "UNet5DModel"),
}))
"""


def test_generate_loads_what_it_uses_and_the_rest_is_there_when_asked_for() -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOADED_BY_GENERATE], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    said = json.loads(run.stdout)
    assert NOT_FOR_GENERATE & set(said["loaded"]) == set()
    assert said["found"] == [
        "diffusers.models.autoencoders.autoencoder_kl_wan",
        "FluxTransformer2DModel",
        "UNet2DModel",
    ]
    assert said["module"] == "diffusers.models.unets.uvit_2d"
    assert said["star"] and not said["missing"]


def test_an_init_that_does_more_is_run_as_it_is(tmp_path: Path) -> None:
    init = tmp_path / "__init__.py"
    init.write_text("from ..utils import here\nif here():\n    from .a import A, B\n")
    assert homes_of_names(init) == {"A": "a", "B": "a"}
    for more in ("from .a import *", "from .a import A as C", "x = 1", "def f(): ...", "f()"):
        init.write_text(f"from .a import A\n{more}\n")
        assert homes_of_names(init) is None, more
