"""Conditioning: which tokens are given, what they hold, and the state that denoising starts from.

A given token keeps noise level 0 while the rest is denoised around it, so one network does every
task:

    image, last_image             the first and the last latent frame
    video, audio                  as much as was given; a longer clip continues them
    video and/or audio + retake   all but a span of time
    video + mask                  all but a region of the picture
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import torch

from avdiff.clip import ClipSpec
from avdiff.latents import Joint, JointLatents, pack_audio, pack_video
from avdiff.models.codec import ClipLayout, LatentCodec

if TYPE_CHECKING:
    from avdiff.pipelines.request import GenerationRequest


@dataclass(frozen=True)
class Retake:
    """A span of a given clip that is made anew.

    Args:
        start, end: seconds from the clip's start; tokens that touch the span are made anew.
        video, audio: whether this modality is, of those that are given.
    """

    start: float
    end: float
    video: bool = True
    audio: bool = True

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | Fraction):
                raise ValueError(f"retake {name}={value!r}: needs seconds, a number")
        for name in ("video", "audio"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"retake {name}={getattr(self, name)!r}: needs True or False")
        if not 0 <= self.start < self.end:
            raise ValueError(f"retake from {self.start} to {self.end} s: needs 0 <= start < end")
        if not (self.video or self.audio):
            raise ValueError("retake of neither video nor audio: nothing would be made anew")


@dataclass(frozen=True)
class Conditioning:
    """What is given of one modality.

    Args:
        tokens: (B, N, C) packed and normalized, zero where nothing is given. mask: bool (N,), True
            where a token is given.
        source: the frames (B, 3, F, H, W) or samples (B, C, S) that were given; None for images,
            whose place in the clip is as the codec renders it.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    source: torch.Tensor | None = None

    def without(self, regenerated: torch.Tensor, device: torch.device) -> Conditioning:
        """The same without the tokens of a bool mask (N,), its own mask on a device."""
        return Conditioning(self.tokens, (self.mask & ~regenerated).to(device), self.source)


def encode_conditioning(
    codec: LatentCodec, clip: ClipSpec, request: GenerationRequest, device: torch.device
) -> Joint[Conditioning]:
    """Encode what the call was given; None for a modality of which nothing was.

    Raises:
        ValueError: what was given does not fit the clip or the batch.
    """
    video = _encode_pictures(codec, clip, request, device)
    audio = _encode_sound(codec, clip, request, device)
    regenerated = Joint(
        torch.zeros(clip.video_tokens, dtype=torch.bool),
        torch.zeros(clip.audio_tokens, dtype=torch.bool),
    )
    if request.retake is not None:
        regenerated = retaken_tokens(codec.layout(clip), request.retake)
    if request.mask is not None and video is not None:
        assert regenerated.video is not None
        masked = regenerated.video | masked_tokens(request.mask, clip)
        regenerated = Joint(masked, regenerated.audio)
    return Joint(video, audio).map(lambda part, anew: part.without(anew, device), regenerated)


def _encode_pictures(
    codec: LatentCodec, clip: ClipSpec, request: GenerationRequest, device: torch.device
) -> Conditioning | None:
    frames, rows, columns = clip.video_grid
    cell = rows * columns
    pieces = []
    source = None if request.video is None else request.video[:, :, : clip.num_frames]
    if source is not None:
        pieces.append((0, codec.encode_video(source)))
    if request.image is not None:
        pieces.append((0, codec.encode_video(_batched(request.image)[:, :, None])))
    if request.last_image is not None:
        if frames < 2:
            raise ValueError(
                f"last_image in a clip of {clip.num_frames} frame: needs a longer clip"
            )
        # A latent frame other than the first stands for a group of frames: a still of that length.
        still = _batched(request.last_image)[:, :, None]
        still = still.expand(-1, -1, 1 + clip.clock.video_stride, -1, -1)
        pieces.append((cell * (frames - 1), codec.encode_video(still)[:, -cell:]))
    return _place(pieces, request.batch, clip.video_tokens, source, device)


def _batched(image: torch.Tensor) -> torch.Tensor:
    return image if image.ndim == 4 else image[None]


def _encode_sound(
    codec: LatentCodec, clip: ClipSpec, request: GenerationRequest, device: torch.device
) -> Conditioning | None:
    """Whole tokens of the sound; if it lacks less than a latent frame of the clip's length,
    silence fills it.
    """
    audio = request.audio
    if audio is None:
        return None
    missing = clip.num_samples - audio.shape[-1]
    if 0 < missing < clip.clock.video_stride * clip.sample_rate / clip.fps:
        audio = torch.nn.functional.pad(audio, (0, missing))
    audio = audio[..., : clip.num_samples]
    tokens = codec.encode_audio(audio)
    if audio.shape[-1] < clip.num_samples:
        tokens = tokens[:, : audio.shape[-1] // clip.clock.audio_stride]
    if not tokens.shape[1]:
        seconds = clip.clock.audio_stride / clip.sample_rate
        raise ValueError(f"audio of {audio.shape[-1]} samples: needs at least {seconds:g} s")
    return _place([(0, tokens)], request.batch, clip.audio_tokens, audio, device)


def _place(
    pieces: list[tuple[int, torch.Tensor]],
    batch: int,
    count: int,
    source: torch.Tensor | None,
    device: torch.device,
) -> Conditioning | None:
    """Encoded pieces at their places among `count` tokens."""
    if not pieces:
        return None
    width = pieces[0][1].shape[-1]
    tokens = pieces[0][1].new_zeros(batch, count, width, dtype=torch.float32)
    mask = torch.zeros(count, dtype=torch.bool)
    for start, piece in pieces:
        stop = start + piece.shape[1]
        tokens[:, start:stop] = per_clip(piece, batch)
        mask[start:stop] = True
    kept = None if source is None else per_clip(source, batch)
    return Conditioning(tokens.to(device), mask, kept)


def initial_state(
    layout: ClipLayout,
    request: GenerationRequest,
    conditioning: Joint[Conditioning],
    device: torch.device,
    correlate: Callable[[torch.Tensor, int], torch.Tensor],
) -> tuple[JointLatents, Joint[torch.Tensor]]:
    """Noise for what is generated, clean tokens for what is given, and the conditioning mask: bool
    (B, N), or (B,) where a modality is given or generated as a whole.

    Args:
        correlate: white noise of the video and its number of frames -> noise that the frames have
            in part in common.

    Raises:
        ValueError: latents do not fit the clip, or everything is given.
    """
    clip = layout.clip
    start = Joint(request.latents, request.audio_latents)
    present = Joint(
        bool(request.generate.video or conditioning.video is not None),
        bool(request.generate.audio or conditioning.audio is not None),
    )
    undrawn = present.map(lambda here, given: here and given is None, start)
    white = layout.noise(request.batch, request.generator, device, undrawn)
    if white.video is not None:
        white = Joint(correlate(white.video, clip.video_grid[0]), white.audio)
    tokens: dict[str, torch.Tensor] = {}
    masks: dict[str, torch.Tensor] = {}
    for modality, here in present.items():
        if not here:
            continue
        noise = getattr(white, modality)
        if noise is None:
            noise = _packed(getattr(start, modality), modality, clip)
            wanted = (
                request.batch,
                *(getattr(n, modality) for n in (layout.tokens(), layout.widths())),
            )
            if noise.shape != wanted:
                raise ValueError(f"latents of shape {tuple(noise.shape)}: this call needs {wanted}")
        noise = noise.to(device, torch.float32)
        tokens[modality], masks[modality] = _with_given(noise, getattr(conditioning, modality))
    mask = Joint(**masks)
    if all(bool(given.all()) for _, given in mask.items()):
        raise ValueError("all of the clip is given: nothing is left to generate")
    seconds = Joint(clip.video_positions()[:, 0], clip.audio_positions()[:, 0])
    sigmas = mask.map(lambda given: (~given).float())
    state = JointLatents(
        tokens.get("video"), tokens.get("audio"), sigmas, seconds.map(lambda t: t.to(device))
    )
    return state, mask


def _packed(noise: torch.Tensor, modality: str, clip: ClipSpec) -> torch.Tensor:
    """Starting noise as tokens, where it came as latents (B, C, F, H, W) or (B, C, L, 1)."""
    if modality == "video" and noise.ndim == 5:
        return pack_video(noise, clip.clock.patch)
    return pack_audio(noise) if modality == "audio" and noise.ndim == 4 else noise


def _with_given(
    noise: torch.Tensor, part: Conditioning | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (B, N, C) with the given tokens in it, and the mask of these."""
    batch = noise.shape[0]
    if part is None:
        return noise, torch.zeros(batch, dtype=torch.bool, device=noise.device)
    tokens = torch.where(part.mask[None, :, None], part.tokens, noise)
    # One level for a whole clip is the common case, and much cheaper to modulate than one for each
    # token.
    whole = bool((part.mask == part.mask[0]).all())
    return tokens, part.mask[0].expand(batch) if whole else part.mask.expand(batch, -1)


def masked_tokens(mask: torch.Tensor, clip: ClipSpec) -> torch.Tensor:
    """Bool (N_v,): tokens with a pixel of the mask in them.

    Args:
        mask: (H, W) for all frames, or (F, H, W); above 0.5 (white) is made anew.
    """
    frames, rows, _ = clip.video_grid
    size = (clip.height, clip.width)
    if (
        mask.ndim not in (2, 3)
        or mask.shape[-2:] != size
        or (mask.ndim == 3 and len(mask) != clip.num_frames)
    ):
        raise ValueError(
            f"mask of shape {tuple(mask.shape)}: needs {size}, or {(clip.num_frames, *size)} for "
            "a mask by frame"
        )
    cell = clip.height // rows
    touched = (mask > 0.5).expand(clip.num_frames, *size).float()
    touched = torch.nn.functional.max_pool2d(touched[:, None], cell)[:, 0]  # (F, rows, columns)
    later = (
        touched[1:].unflatten(0, (frames - 1, clip.clock.video_stride)).amax(1)
        if frames > 1
        else touched[1:]
    )
    return torch.cat([touched[:1], later]).flatten() > 0.5


def retaken_tokens(layout: ClipLayout, retake: Retake) -> Joint[torch.Tensor]:
    """Bool masks (N_v,), (N_a,) of the tokens whose time touches the span."""
    clip = layout.clip
    if retake.start >= clip.seconds:
        raise ValueError(
            f"retake from {retake.start} s: the clip ends at {float(clip.seconds):g} s"
        )

    def hits(edges: torch.Tensor, anew: bool) -> torch.Tensor:
        begins, ends = edges.unbind(dim=1)
        return (begins < float(retake.end)) & (ends > float(retake.start)) & anew

    return layout.edges().map(hits, Joint(retake.video, retake.audio))


def per_clip(rows: torch.Tensor, batch: int) -> torch.Tensor:
    """Repeat given rows so that there is one for each of the `batch` clips.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    if batch % rows.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} given for {batch} clips: needs one for all, or one for each prompt"
        )
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)
