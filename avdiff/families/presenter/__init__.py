"""The family of this package's own models: `AVTransformer`, own codecs, caption encoder."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

from avdiff.families.protocols import ABILITIES, Family

__all__ = ["FAMILY", "branch_of", "owner_of"]

PIPELINE = "avdiff.pipelines.pipeline_av"  # by name: pipelines are a floor above

_BRANCHES = (  # the first that matches
    ("memory", r"(^|\.)memory\."),
    ("text", r"(^|\.)(text_encoder|text_register|text_attn|phoneme_encoder)(\.|$)"),
    ("shared", r"(^|\.)shared[._]"),
    ("cross", r"(^|\.)(cross_attn|cross_gate|cross_gate_proj)(\.|$)"),
    ("video", r"(^|\.|_)video(\.|$)"),
    ("audio", r"(^|\.|_)audio(\.|$)"),
)


def branch_of(name: str) -> str:
    """Branch of a weight by its name: video, audio, cross, shared, text, memory; "other" for none
    of them.
    """
    return next((branch for branch, pattern in _BRANCHES if re.search(pattern, name)), "other")


def owner_of(name: str) -> str:
    """ "video" or "audio" if only that branch of the transformer uses the weight, else "both"."""
    if re.search(r"(^|\.)(memory\.|shared[._])", name):
        return "both"
    for modality in ("video", "audio"):
        if re.search(rf"(^|\.|_){modality}(\.|$)", name):
            return modality
    return "both"


def load(model: Any, **options: Any) -> Any:
    """An `AVDiffPipeline` from a folder or a hub name."""
    return import_module(PIPELINE).AVDiffPipeline.from_pretrained(model, **options)


FAMILY = Family(
    name="the presenter",
    class_names=("AVDiffPipeline",),
    abilities=frozenset(ABILITIES) - {"perturbed"},
    load=load,
    branch_of=branch_of,
    owner_of=owner_of,
    shard_classes=("DualBlock", "CaptionEncoder"),
)
