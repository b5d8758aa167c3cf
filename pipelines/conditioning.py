"""What a call is given: which tokens are known, what they hold, and how the given parts come back
in the result.

A known token keeps noise level 0 while the rest is denoised around it, so one network does every
task:

    image, last_image             the first and the last latent frame
    video, audio                  as much as was given; a longer clip continues them
    video and/or audio + retake   all but a span of time
    video + mask                  all but a region of the picture
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from avdiff.clip import ClipSpec, Clock, as_fps
from avdiff.latents import Joint, JointLatents
from avdiff.models.conditions import Positions
from avdiff.pipelines.deflicker import smooth_flicker

SEAM = 0.01  # seconds over which given sound is cross-faded into new sound


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
        if not 0 <= self.start < self.end:
            raise ValueError(f"retake from {self.start} to {self.end} s: needs 0 <= start < end")
        if not (self.video or self.audio):
            raise ValueError("retake of neither video nor audio: nothing would be made anew")


@dataclass(frozen=True)
class Part:
    """What is known of one modality.

    Args:
        tokens: (B, N, C) packed and normalized, zero where unknown. known: bool (N,).
        source: the frames (B, 3, F, H, W) or samples (B, C, S) that were given; None for images,
            whose place in the clip is as the codec renders it.
    """

    tokens: torch.Tensor
    known: torch.Tensor
    source: torch.Tensor | None = None


class ConditioningMixin:
    """The half of `AVDiffPipeline` that deals with given parts."""

    transformer: Any
    scheduler: Any
    video_processor: Any
    clock: Clock
    _execution_device: Any
    encode_video: Any
    encode_audio: Any
    decode_video: Any
    decode_audio: Any

    def _given(
        self,
        clip: ClipSpec,
        batch: int,
        image: torch.Tensor | None,
        last_image: torch.Tensor | None,
        audio: torch.Tensor | None,
        video: torch.Tensor | None,
        retake: Retake | None,
        mask: torch.Tensor | None,
    ) -> Joint[Part]:
        """Known tokens of both modalities; None where nothing is given."""
        if image is not None and video is not None:
            raise ValueError(
                "image and video are both given: an image is the first frame of a video to be "
                "generated"
            )
        if mask is not None and video is None:
            raise ValueError("mask without video: needs the video whose masked region is made anew")
        if retake is not None and video is None and audio is None:
            raise ValueError(
                "retake without video and audio: needs a clip of which a span is made anew"
            )
        seen = self._seen(clip, batch, image, last_image, video)
        heard = None if audio is None else self._heard(clip, batch, audio)
        known = Joint(None if seen is None else seen.known, None if heard is None else heard.known)
        if retake is not None:
            known = known.map(lambda k, anew: k & ~anew, _touched(clip, retake))
        if mask is not None and known.video is not None:
            known = Joint(known.video & ~masked_tokens(mask, clip), known.audio)
        return Joint(seen, heard).map(
            lambda p, k: Part(p.tokens, k.to(self._execution_device), p.source), known
        )

    def _length(
        self,
        seconds: float | Fraction | None,
        num_frames: int | None,
        frame: dict[str, Any],
        audio: torch.Tensor | None,
        video: torch.Tensor | None,
        speech_start: float | None,
    ) -> tuple[float | Fraction | None, int | None, float]:
        """Length of the clip, that of what is given if none is asked for, and where its words
        begin: after the sound that the clip continues, else at 0.
        """
        heard = Fraction(0 if audio is None else audio.shape[-1], frame["sample_rate"])
        length = num_frames / as_fps(frame["fps"]) if num_frames is not None else seconds
        if length is None and video is not None:
            num_frames = video.shape[2]
        elif length is None and audio is not None:
            seconds = heard
        if speech_start is None:
            continued = length is not None and length - heard > self.clock.video_stride / as_fps(
                frame["fps"]
            )
            speech_start = float(heard) if continued else 0.0
        return seconds, num_frames, speech_start

    def _seen(
        self,
        clip: ClipSpec,
        batch: int,
        image: torch.Tensor | None,
        last_image: torch.Tensor | None,
        video: torch.Tensor | None,
    ) -> Part | None:
        frames, rows, columns = clip.video_grid
        cell = rows * columns
        pieces = []
        source = None if video is None else video[:, :, : clip.num_frames]
        if source is not None:
            pieces.append((0, self.encode_video(source)))
        if image is not None:
            pieces.append(
                (0, self.encode_video((image if image.ndim == 4 else image[None])[:, :, None]))
            )
        if last_image is not None:
            if frames < 2:
                raise ValueError(
                    f"last_image in a clip of {clip.num_frames} frame: needs a longer clip"
                )
            still = last_image if last_image.ndim == 4 else last_image[None]
            still = still[:, :, None].expand(-1, -1, 1 + self.clock.video_stride, -1, -1)
            pieces.append((cell * (frames - 1), self.encode_video(still)[:, -cell:]))
        return self._part(pieces, batch, clip.video_tokens, source)

    def _heard(self, clip: ClipSpec, batch: int, audio: torch.Tensor) -> Part | None:
        """Whole tokens of the sound; if it lacks less than a latent frame of the clip's length,
        silence fills it.
        """
        missing = clip.num_samples - audio.shape[-1]
        if 0 < missing < self.clock.video_stride * clip.sample_rate / clip.fps:
            audio = torch.nn.functional.pad(audio, (0, missing))
        audio = audio[..., : clip.num_samples]
        tokens = self.encode_audio(audio)
        if audio.shape[-1] < clip.num_samples:
            tokens = tokens[:, : audio.shape[-1] // self.clock.audio_stride]
        if not tokens.shape[1]:
            seconds = self.clock.audio_stride / clip.sample_rate
            raise ValueError(f"audio of {audio.shape[-1]} samples: needs at least {seconds:g} s")
        return self._part([(0, tokens)], batch, clip.audio_tokens, audio)

    def _part(
        self,
        pieces: list[tuple[int, torch.Tensor]],
        batch: int,
        count: int,
        source: torch.Tensor | None,
    ) -> Part | None:
        if not pieces:
            return None
        tokens = pieces[0][1].new_zeros(batch, count, pieces[0][1].shape[-1], dtype=torch.float32)
        known = torch.zeros(count, dtype=torch.bool)
        for start, piece in pieces:
            tokens[:, start : start + piece.shape[1]] = per_clip(piece, batch)
            known[start : start + piece.shape[1]] = True
        return Part(
            tokens.to(self._execution_device),
            known,
            None if source is None else per_clip(source, batch),
        )

    def _event_seeds(
        self, generator: torch.Generator | list[torch.Generator] | None, batch: int
    ) -> list[int] | None:
        """A seed for the strokes of each clip's event; None where the model knows no script of
        events.
        """
        if not self.transformer.config.onset_track:
            return None
        if isinstance(generator, list):
            return [g.initial_seed() for g in generator]
        first = int(torch.randint(2**62, ())) if generator is None else generator.initial_seed()
        return [first + i for i in range(batch)]

    def prepare_latents(
        self,
        clip: ClipSpec,
        batch: int,
        generator: torch.Generator | list[torch.Generator] | None,
        positions: Positions,
        generate: Joint[bool],
        given: Joint[Part],
        latents: torch.Tensor | None = None,
        audio_latents: torch.Tensor | None = None,
    ) -> tuple[JointLatents, Joint[torch.Tensor]]:
        """Noise for what is generated, clean tokens for the given, and the mask of given tokens:
        bool (B, N), or (B,) where a modality is given or generated as a whole.

        Raises:
            ValueError: generators or latents do not fit the batch, or everything is given.
        """
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator is a list of {len(generator)}: needs one generator for each of the "
                f"{batch} clips"
            )
        device = self._execution_device
        c = self.transformer.config

        def state(
            wanted: bool,
            tokens: int,
            channels: int,
            start: torch.Tensor | None,
            part: Part | None,
            frames: int,
        ):
            if not wanted and part is None:
                return None, None
            noise = start
            if noise is None:
                noise = randn_tensor((batch, tokens, channels), generator, device, torch.float32)
                noise = self.scheduler.share_frames(noise, frames)
            if noise.shape != (batch, tokens, channels):
                raise ValueError(
                    f"latents of shape {tuple(noise.shape)}: this call needs "
                    f"{(batch, tokens, channels)}"
                )
            noise = noise.to(device, torch.float32)
            if part is None:
                return noise, torch.zeros(batch, dtype=torch.bool, device=device)
            noise = torch.where(part.known[None, :, None], part.tokens, noise)
            # One level for a whole clip is the common case, and much cheaper to modulate than one
            # for each token.
            whole = bool((part.known == part.known[0]).all())
            return noise, part.known[0].expand(batch) if whole else part.known.expand(batch, -1)

        video, video_known = state(
            bool(generate.video),
            clip.video_tokens,
            c.video_channels,
            latents,
            given.video,
            positions.grid[0],
        )
        audio, audio_known = state(
            bool(generate.audio), clip.audio_tokens, c.audio_channels, audio_latents, given.audio, 1
        )
        known = Joint(video_known, audio_known)
        if all(bool(k.all()) for _, k in known.items()):
            raise ValueError("all of the clip is given: nothing is left to generate")
        seconds = Joint(positions.video[:, 0], positions.audio[:, 0])
        return JointLatents(video, audio, known.map(lambda m: (~m).float()), seconds), known

    def _decode(
        self,
        state: JointLatents,
        clip: ClipSpec,
        given: Joint[Part],
        output_type: str,
        deflicker_strength: float,
    ) -> tuple[Any, Any]:
        """Tokens to frames, without flicker, and waveform. Frames and samples that were given come
        back as they were given, but for frames of which only a region was, and for images: these
        are as the codec renders them.
        """
        if output_type == "latent":
            return state.video, state.audio
        frames = waveform = None
        if state.video is not None:
            kept = _kept_frames(given.video, clip)
            frames = self.decode_video(state.video, clip) if not kept.all() else torch.zeros(())
            if kept.any() and given.video is not None and given.video.source is not None:
                source = given.video.source.to(state.video.device, torch.float32)
                index = kept.nonzero()[:, 0].to(source.device)
                own = source.index_select(2, index)
                frames = source if kept.all() else frames.index_copy(2, index, own)
                if not kept.all():  # given frames help to steady the others and stay as they are
                    frames = smooth_flicker(frames, deflicker_strength).index_copy(2, index, own)
            else:
                frames = smooth_flicker(frames, deflicker_strength)
            frames = self.video_processor.postprocess_video(frames, output_type=output_type)
        if state.audio is not None:
            weight = _kept_samples(given.audio, clip)
            waveform = self.decode_audio(state.audio, clip) if not (weight == 1).all() else None
            if given.audio is not None and given.audio.source is not None:
                source = given.audio.source.to(state.audio.device, torch.float32)
                source = torch.nn.functional.pad(source, (0, clip.num_samples - source.shape[-1]))
                weight = weight.to(source.device)
                waveform = (
                    source
                    if waveform is None
                    else torch.where(weight == 1, source, weight * source + (1 - weight) * waveform)
                )
        return frames, waveform


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


def _touched(clip: ClipSpec, retake: Retake) -> Joint[torch.Tensor]:
    """Bool masks (N_v,), (N_a,) of the tokens whose time touches the span."""
    if retake.start >= clip.seconds:
        raise ValueError(
            f"retake from {retake.start} s: the clip ends at {float(clip.seconds):g} s"
        )
    _, rows, columns = clip.video_grid
    begins = [
        0.0,
        *((1 + j * clip.clock.video_stride) / float(clip.fps) for j in range(clip.latent_frames)),
    ]
    step = clip.clock.audio_stride / clip.sample_rate

    def hits(edges: list[float], wanted: bool) -> torch.Tensor:
        return torch.tensor(
            [wanted and a < retake.end and b > retake.start for a, b in pairwise(edges)]
        )

    video = hits(begins, retake.video).repeat_interleave(rows * columns)
    return Joint(video, hits([i * step for i in range(clip.audio_tokens + 1)], retake.audio))


def _kept_frames(part: Part | None, clip: ClipSpec) -> torch.Tensor:
    """Bool (F,): frames all of whose tokens are known from given frames."""
    if part is None or part.source is None:
        return torch.zeros(clip.num_frames, dtype=torch.bool)
    latent = part.known.unflatten(0, (clip.latent_frames, -1)).all(1).cpu()
    kept = torch.cat([latent[:1], latent[1:].repeat_interleave(clip.clock.video_stride)])
    return kept & (torch.arange(clip.num_frames) < part.source.shape[2])


def _kept_samples(part: Part | None, clip: ClipSpec) -> torch.Tensor:
    """(S,) weight of the given sound: 1 where it is kept, falling to 0 within `SEAM` of what is
    made anew.
    """
    if part is None or part.source is None:
        return torch.zeros(clip.num_samples)
    kept = part.known.cpu().float().repeat_interleave(clip.clock.audio_stride)[: clip.num_samples]
    if kept.all():
        return kept
    reach = round(SEAM * clip.sample_rate)
    near = torch.nn.functional.pad(1 - kept, (reach, reach))
    # The ramp lies on the kept side, as beyond the seam there may be no given sound.
    return kept * (
        1 - torch.nn.functional.avg_pool1d(near[None], 2 * reach + 1, 1)[0].mul(2).clamp(max=1)
    )


def per_clip(rows: Any, batch: int) -> Any:
    """Repeat given rows so that there is one for each of the `batch` clips.

    Raises:
        ValueError: the batch is no multiple of the rows.
    """
    if batch % rows.shape[0]:
        raise ValueError(
            f"{rows.shape[0]} given for {batch} clips: needs one for all, or one for each prompt"
        )
    return rows.repeat_interleave(batch // rows.shape[0], dim=0)
