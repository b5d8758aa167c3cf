"""avdiff: joint audio-video diffusion with a shared core, in the manner of diffusers.

Names are imported on first use, so that `import avdiff` costs nothing: neither torch nor diffusers
is loaded by it. A class saved in a checkpoint is recorded as `["avdiff", "ClassName"]` and found
again through this table: its file may move but its name may not change.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from avdiff.deferred_imports import defer_imports, garbage_collection_paused

__version__ = "0.1.0"
PRESENTER = os.path.join(
    os.path.dirname(__file__), "bundled"
)  # the embedded model: AVDiffPipeline.from_pretrained(PRESENTER)

_HOME = {
    "AVAudioVAE": "avdiff.models.codecs.audio_vae",
    "AVDiffPipeline": "avdiff.pipelines.pipeline_av",
    "AVPipelineOutput": "avdiff.pipelines.output",
    "AVTransformer": "avdiff.models.transformer",
    "AVVideoVAE": "avdiff.models.codecs.video_vae",
    "AVVocoder": "avdiff.models.codecs.vocoder",
    "CaptionEncoder": "avdiff.models.text_encoder",
    "ClipSpec": "avdiff.clip",
    "FaceReader": "avdiff.models.evaluators.face_reader",
    "Guidance": "avdiff.guidance",
    "ContactDetector": "avdiff.models.evaluators.contact_detector",
    "Joint": "avdiff.latents",
    "JointFlowMatchScheduler": "avdiff.schedulers.joint_flow_match",
    "JointLatents": "avdiff.latents",
    "LipNetwork": "avdiff.models.evaluators.lip_network",
    "PhoneRecognizer": "avdiff.models.evaluators.phone_recognizer",
    "DurationPredictor": "avdiff.models.g2p.networks",
    "PromptDomain": "avdiff.models.prompt_domain",
    "Pronouncer": "avdiff.models.g2p.networks",
    "Retake": "avdiff.pipelines.conditioning",
    "load": "avdiff.families",
    "read_clip": "avdiff.media.read",
    "streams": "avdiff.pipelines.streaming",
    "write_clip": "avdiff.media.write",
    # diffusers looks up the base classes of a saved component by name in the library that it is
    # recorded under.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
__all__ = ["PRESENTER", "__version__", *sorted(_HOME)]


defer_imports()


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'avdiff' has no attribute {name!r}")
    with garbage_collection_paused():
        value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, whether imported yet or not."""
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from diffusers import ModelMixin as ModelMixin
    from diffusers import SchedulerMixin as SchedulerMixin

    from avdiff.clip import ClipSpec as ClipSpec
    from avdiff.families import load as load
    from avdiff.guidance import Guidance as Guidance
    from avdiff.latents import Joint as Joint
    from avdiff.latents import JointLatents as JointLatents
    from avdiff.media.read import read_clip as read_clip
    from avdiff.media.write import write_clip as write_clip
    from avdiff.models.codecs.audio_vae import AVAudioVAE as AVAudioVAE
    from avdiff.models.codecs.video_vae import AVVideoVAE as AVVideoVAE
    from avdiff.models.codecs.vocoder import AVVocoder as AVVocoder
    from avdiff.models.evaluators.contact_detector import ContactDetector as ContactDetector
    from avdiff.models.evaluators.face_reader import FaceReader as FaceReader
    from avdiff.models.evaluators.lip_network import LipNetwork as LipNetwork
    from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer as PhoneRecognizer
    from avdiff.models.g2p.networks import DurationPredictor as DurationPredictor
    from avdiff.models.g2p.networks import Pronouncer as Pronouncer
    from avdiff.models.prompt_domain import PromptDomain as PromptDomain
    from avdiff.models.text_encoder import CaptionEncoder as CaptionEncoder
    from avdiff.models.transformer import AVTransformer as AVTransformer
    from avdiff.pipelines.conditioning import Retake as Retake
    from avdiff.pipelines.output import AVPipelineOutput as AVPipelineOutput
    from avdiff.pipelines.pipeline_av import AVDiffPipeline as AVDiffPipeline
    from avdiff.pipelines.streaming import streams as streams
    from avdiff.schedulers.joint_flow_match import (
        JointFlowMatchScheduler as JointFlowMatchScheduler,
    )
