"""What a pipeline call returns, and how given frames and samples come back in it as they were."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL.Image import Image

from avdiff.clip import ClipSpec
from avdiff.latents import Joint, JointLatents
from avdiff.models.codec import LatentCodec
from avdiff.pipelines.conditioning import Conditioning
from avdiff.pipelines.deflicker import smooth_flicker

if TYPE_CHECKING:
    from avdiff.pipelines.request import GenerationRequest

SEAM = 0.01  # seconds over which given sound is cross-faded into new sound


@dataclass
class AVPipelineOutput(BaseOutput):
    """Sound and picture of a batch of clips.

    Args:
        frames: list (one per clip) of lists of PIL images, or (B, F, H, W, 3) numpy in [0, 1], or
            (B, F, 3, H, W) torch in [0, 1]; as "latent" what `vae.decode` takes, (B, C, F, h, w);
            as "tokens" packed and normalized (B, N_v, C_v); None when no video was asked for.
        audio: (B, channels, samples) fp32 in [-1, 1]; as "latent" what `audio_vae.decode` takes,
            as "tokens" (B, N_a, C_a); None without sound.
        sampling_rate: Hz. frame_rate: exact.
    """

    frames: list[list[Image]] | np.ndarray | torch.Tensor | None = None
    audio: torch.Tensor | None = None
    sampling_rate: int = 24000
    frame_rate: Fraction = Fraction(25)


def decode_output(
    codec: LatentCodec,
    state: JointLatents,
    clip: ClipSpec,
    conditioning: Joint[Conditioning],
    request: GenerationRequest,
) -> Joint[torch.Tensor]:
    """Tokens to video (B, 3, F, H, W) and waveform (B, channels, S) in [-1, 1], or to what
    "latent" and "tokens" ask for.

    Frames and samples that were given come back as they were given, but for frames of which only a
    region was, and for images: these are as the codec renders them.
    """
    layout = codec.layout(clip)
    if request.output_type == "tokens":
        return state.latents
    if request.output_type == "latent":
        return Joint(
            None if state.video is None else codec.video_latents(state.video, layout),
            None if state.audio is None else codec.audio_latents(state.audio),
        )
    video = audio = None
    if state.video is not None:
        kept = _kept_frames(conditioning.video, clip)
        frames = None if kept.all() else codec.decode_video(state.video, layout)
        source = None if conditioning.video is None else conditioning.video.source
        video = _with_given_frames(
            frames, source, kept, state.video.device, request.deflicker_strength
        )
    if state.audio is not None:
        weight = _kept_samples(conditioning.audio, clip)
        waveform = None if (weight == 1).all() else codec.decode_audio(state.audio, layout)
        source = None if conditioning.audio is None else conditioning.audio.source
        audio = _with_given_sound(waveform, source, weight, state.audio.device)
    return Joint(video, audio)


def _with_given_frames(
    frames: torch.Tensor | None,
    source: torch.Tensor | None,
    kept: torch.Tensor,
    device: torch.device,
    deflicker_strength: float,
) -> torch.Tensor:
    """Generated frames (None where all are given), those of `kept` as they were given, the others
    without flicker.
    """
    if source is None or not kept.any():
        assert frames is not None
        return smooth_flicker(frames, deflicker_strength)
    source = source.to(device, torch.float32)
    if frames is None:
        return source
    index = kept.nonzero()[:, 0].to(device)
    given = source.index_select(2, index)
    # Given frames help to steady the others and stay as they are.
    steadied = smooth_flicker(frames.index_copy(2, index, given), deflicker_strength)
    return steadied.index_copy(2, index, given)


def _with_given_sound(
    waveform: torch.Tensor | None,
    source: torch.Tensor | None,
    weight: torch.Tensor,
    device: torch.device,
) -> torch.Tensor:
    """Generated sound (None where all is given), faded into the given one by `weight` (S,)."""
    if source is None:
        assert waveform is not None
        return waveform
    source = source.to(device, torch.float32)
    source = torch.nn.functional.pad(source, (0, len(weight) - source.shape[-1]))
    weight = weight.to(device)
    if waveform is None:
        return source
    return torch.where(weight == 1, source, weight * source + (1 - weight) * waveform)


def _kept_frames(part: Conditioning | None, clip: ClipSpec) -> torch.Tensor:
    """Bool (F,): frames all of whose tokens are of given frames."""
    if part is None or part.source is None:
        return torch.zeros(clip.num_frames, dtype=torch.bool)
    latent = part.mask.unflatten(0, (clip.latent_frames, -1)).all(1).cpu()
    kept = torch.cat([latent[:1], latent[1:].repeat_interleave(clip.clock.video_stride)])
    return kept & (torch.arange(clip.num_frames) < part.source.shape[2])


def _kept_samples(part: Conditioning | None, clip: ClipSpec) -> torch.Tensor:
    """(S,) weight of the given sound: 1 where it is kept, falling to 0 within `SEAM` of what is
    made anew.
    """
    if part is None or part.source is None:
        return torch.zeros(clip.num_samples)
    kept = part.mask.cpu().float().repeat_interleave(clip.clock.audio_stride)[: clip.num_samples]
    if kept.all():
        return kept
    reach = round(SEAM * clip.sample_rate)
    near = torch.nn.functional.pad(1 - kept, (reach, reach))
    # The ramp lies on the kept side, as beyond the seam there may be no given sound.
    return kept * (
        1 - torch.nn.functional.avg_pool1d(near[None], 2 * reach + 1, 1)[0].mul(2).clamp(max=1)
    )
