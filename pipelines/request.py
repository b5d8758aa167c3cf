"""GenerationRequest: a call of the pipeline, checked and filled in, as all later steps read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch

from avdiff.clip import ClipSpec, Clock
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.conditioning import Retake

# Description of the call's arguments: part of `help(AVDiffPipeline.__call__)`.
ARGUMENTS = """
        Args:
            prompt: description; words to speak stand in double quotes. negative_prompt: what
                guidance leads from.
            seconds or num_frames: length (num_frames = 1 + k * video stride); with neither, as long
                as what is given, or as the words take. A clip that is longer than what is given
                continues it.
            height, width: pixels. frame_rate: frames per second.
            num_inference_steps: denoising steps. sigmas: falling noise levels in (0, 1] instead,
                before the time shift of each modality; a `Joint` of them holds the levels
                themselves. timesteps: the same, times 1000.
            guidance_scale, audio_guidance_scale: text guidance of video and audio; 0 and 1 are
                none. guidance: a whole `Guidance`. Where they are not given, `sampling_defaults`
                decide.
            deflicker_strength: changes of a pixel from frame to frame, of 255, that count as
                flicker and are averaged over time; 0 leaves the frames as they are decoded.
            image, last_image: (3, H, W) or (B, 3, H, W) in [-1, 1], or a PIL picture of the clip's
                size; first and last frame, as the codec renders them.
            video: (B, 3, F, H, W) in [-1, 1]. audio: (B, C, S) at the audio VAE's rate. Both come
                back as they were given, but for 10 ms of sound ahead of what is new.
            retake: a span of the given clip that is made anew. mask: (H, W) or (F, H, W), above 0.5
                where the given video is made anew; the rest of such a frame is as the codec renders
                it.
            phoneme_track: spoken words on the clock instead of the prompt's. speech_start: seconds
                at which the words begin; by default after the sound that is continued.
            check_prompt: refuse prompts beyond the pipeline's `prompt_domain`, if it has one.
            latents, audio_latents: starting noise, packed (B, N, C) or as latents.
            output_type: "pil", "np", "pt"; "latent" for what the VAEs decode; "tokens" for packed
                and normalized latents.
            callback_on_step_end: (pipeline, step, timestep, tensors) -> tensors that it changed;
                one of diffusers' own names its tensors itself.

        Raises:
            ValueError: one sentence that names the argument, its value and what fits.
"""


@dataclass(frozen=True)
class FrameFormat:
    """A clip's size and rates without its length."""

    fps: Fraction | float | str = Fraction(25)
    height: int = 128
    width: int = 128
    sample_rate: int = 24000
    clock: Clock = field(default_factory=Clock)

    def frames(self, num_frames: int) -> ClipSpec:
        """A clip of so many frames."""
        return ClipSpec(
            num_frames,
            self.fps,  # type: ignore[arg-type]
            self.height,
            self.width,
            self.sample_rate,
            self.clock,
        )

    def seconds(self, seconds: float | Fraction) -> ClipSpec:
        """The shortest clip that lasts so long."""
        return ClipSpec.from_seconds(
            seconds,
            self.fps,  # type: ignore[arg-type]
            height=self.height,
            width=self.width,
            sample_rate=self.sample_rate,
            clock=self.clock,
        )


@dataclass(frozen=True)
class TextFeatures:
    """Caption features (B, L, D) and masks (B, L) that came in place of prompts, or None."""

    embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """One call, for `batch` clips.

    Args:
        prompts, negative_prompts: one a clip, or None. text, negative_text: features in place of
            them.
        steps: denoising steps. sigmas: their noise levels, None for the scheduler's own.
        guidance: scales of each modality. image to audio: tensors in [-1, 1].
        callback: called after each step with the tensors named in `callback_names`.
        Everything else is as in the call.
    """

    prompts: list[str] | None
    negative_prompts: list[str] | None
    text: TextFeatures
    negative_text: TextFeatures
    batch: int
    generate: Joint[bool]
    frame: FrameFormat
    seconds: float | Fraction | None
    num_frames: int | None
    steps: int
    sigmas: Sequence[float] | torch.Tensor | Joint[torch.Tensor] | None
    guidance: Guidance
    deflicker_strength: float
    image: torch.Tensor | None
    last_image: torch.Tensor | None
    video: torch.Tensor | None
    audio: torch.Tensor | None
    retake: Retake | None
    mask: torch.Tensor | None
    language: str | None
    phoneme_track: PhonemeTrack | None
    speech_start: float | None
    check_prompt: bool
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    audio_latents: torch.Tensor | None
    output_type: str
    attention_kwargs: Mapping[str, Any] | None
    callback: Callable[..., Any] | None
    callback_names: list[str]

    @property
    def has_media(self) -> bool:
        """Whether pictures or sound are given."""
        given = (self.image, self.last_image, self.audio, self.video)
        return any(part is not None for part in given)
