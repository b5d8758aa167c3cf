"""LTX-2 (2.0, 2.3, 2.5) behind avdiff's own scheduler, guidance and masks.

Start with `denoiser.py`; `layout.py`, `codec.py` and `texts.py` are the other three parts,
`levels.py` has the noise levels of sampling and training, `names.py` the names of weights,
`lora.py` their files, `graft.py` what can be added to a frozen model. The pipeline is
`avdiff.pipelines.pipeline_ltx2`. Facts are from Lightricks/LTX-2 (ltx-core 1.2.0) and diffusers
0.42.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from avdiff.families.ltx2.names import branch_of, owner_of
from avdiff.families.protocols import Family

if TYPE_CHECKING:
    import os

__all__ = ["FAMILY", "branch_of", "owner_of"]

PIPELINE = "avdiff.pipelines.pipeline_ltx2"  # by name: pipelines are a floor above


def load(model: str | os.PathLike[str], **options: Any) -> Any:
    """An `LTX2JointPipeline` from a folder or a hub name."""
    return import_module(PIPELINE).LTX2JointPipeline.from_pretrained(model, **options)


FAMILY = Family(
    name="LTX-2",
    class_names=("LTX2Pipeline", "LTX2ImageToVideoPipeline", "LTX2ConditionPipeline"),
    abilities=frozenset({"audio", "extend", "image", "perturbed", "retake", "video"}),
    load=load,
    branch_of=branch_of,
    owner_of=owner_of,
    shard_classes=("LTX2VideoTransformerBlock",),
)
