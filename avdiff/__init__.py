"""avdiff: joint audio-video diffusion with a shared core, in the manner of diffusers.

Names are imported on first use, so that `import avdiff` costs nothing: neither torch nor diffusers is loaded by it.
A class saved in a checkpoint is recorded as `["avdiff", "ClassName"]` and found again through this table: its file may
move but its name may not change.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
PRESENTER = os.path.join(
    os.path.dirname(__file__), "bundled"
)  # the embedded model: AVDiffPipeline.from_pretrained(PRESENTER)

_HOME = {
    "AVAudioVAE": "avdiff.models.audio_vae",
    "AVDiffPipeline": "avdiff.pipelines.pipeline_av",
    "AVPipelineOutput": "avdiff.pipelines.output",
    "AVTransformer": "avdiff.models.transformer",
    "AVVideoVAE": "avdiff.models.video_vae",
    "AVVocoder": "avdiff.models.vocoder",
    "CaptionEncoder": "avdiff.models.text_encoder",
    "ClipSpec": "avdiff.clip",
    "FaceReader": "avdiff.models.face_reader",
    "Guidance": "avdiff.guidance",
    "ImpactReader": "avdiff.models.impact_reader",
    "Joint": "avdiff.latents",
    "JointFlowMatchScheduler": "avdiff.schedulers.joint_flow_match",
    "JointLatents": "avdiff.latents",
    "LipNetwork": "avdiff.models.lip_network",
    "PhoneRecogniser": "avdiff.models.recogniser",
    "PhoneTimer": "avdiff.models.reader",
    "PromptWorld": "avdiff.models.prompt_world",
    "PronunciationReader": "avdiff.models.reader",
    "Retake": "avdiff.pipelines.given",
    "read_clip": "avdiff.data.media",
    "streams": "avdiff.pipelines.long",
    "write_clip": "avdiff.data.media",
    # diffusers looks up the base classes of a saved component by name in the library that it is recorded under.
    "ModelMixin": "diffusers",
    "SchedulerMixin": "diffusers",
}
__all__ = ["PRESENTER", "__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'avdiff' has no attribute {name!r}")
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
    from avdiff.data.media import read_clip as read_clip
    from avdiff.data.media import write_clip as write_clip
    from avdiff.guidance import Guidance as Guidance
    from avdiff.latents import Joint as Joint
    from avdiff.latents import JointLatents as JointLatents
    from avdiff.models.audio_vae import AVAudioVAE as AVAudioVAE
    from avdiff.models.face_reader import FaceReader as FaceReader
    from avdiff.models.impact_reader import ImpactReader as ImpactReader
    from avdiff.models.lip_network import LipNetwork as LipNetwork
    from avdiff.models.prompt_world import PromptWorld as PromptWorld
    from avdiff.models.reader import PhoneTimer as PhoneTimer
    from avdiff.models.reader import PronunciationReader as PronunciationReader
    from avdiff.models.recogniser import PhoneRecogniser as PhoneRecogniser
    from avdiff.models.text_encoder import CaptionEncoder as CaptionEncoder
    from avdiff.models.transformer import AVTransformer as AVTransformer
    from avdiff.models.video_vae import AVVideoVAE as AVVideoVAE
    from avdiff.models.vocoder import AVVocoder as AVVocoder
    from avdiff.pipelines.given import Retake as Retake
    from avdiff.pipelines.long import streams as streams
    from avdiff.pipelines.output import AVPipelineOutput as AVPipelineOutput
    from avdiff.pipelines.pipeline_av import AVDiffPipeline as AVDiffPipeline
    from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler as JointFlowMatchScheduler
