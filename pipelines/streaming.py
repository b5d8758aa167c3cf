"""Clips of any length in constant memory: segment after segment, each continuing the end of the
last.

A segment is an ordinary call whose first second or so is given: the frames and the sound that were
made last, encoded anew. Nothing but this overlap is kept, so memory does not grow with the clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from avdiff.clip import ClipSpec, as_fps
from avdiff.latents import Joint
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import track_from_phones
from avdiff.pipelines.output import SEAM
from avdiff.pipelines.prompt import ClipLength, plan_clip
from avdiff.pipelines.request import FrameFormat

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

# Arguments of a call that a stream sets itself, or that make no sense for a clip in pieces.
OWN_ARGUMENTS = {
    "num_frames",
    "phoneme_track",
    "speech_start",
    "output_type",
    "return_dict",
    "retake",
    "mask",
    "last_image",
    "latents",
    "audio_latents",
    "num_videos_per_prompt",
    "prompt_embeds",
    "prompt_attention_mask",
}


@dataclass(frozen=True)
class Segment:
    """The next piece of a long clip: frames (F, H, W, 3) in [0, 1] and samples (C, S) in [-1, 1],
    fp32 on CPU; None for a modality that is left out. Sound comes `SEAM` later than its frames, as
    it is cross-faded into what follows.
    """

    frames: torch.Tensor | None
    audio: torch.Tensor | None


@dataclass(frozen=True)
class _Stream:
    """What all segments of a long clip share.

    Args:
        frame: size and rates. total: frames of the whole clip. longest, overlap: frames of a
            segment and of what it is given. words: of the whole clip, in its seconds.
        driven: whether the sound is given as a whole. generate: modalities that are asked for.
        options: of the pipeline's call.
    """

    prompt: str
    frame: FrameFormat
    total: int
    longest: int
    overlap: int
    words: Sequence[Phone]
    driven: bool
    generate: Joint[bool]
    options: dict[str, Any]

    def samples(self, frames: int) -> int:
        """Samples up to a frame."""
        return round(frames / as_fps(self.frame.fps) * self.frame.sample_rate)  # type: ignore[arg-type]


def stream_clip(
    pipe: AVDiffPipeline,
    prompt: str,
    seconds: float,
    segment: float,
    overlap: float,
    video: torch.Tensor | None,
    audio: torch.Tensor | None,
    options: dict[str, Any],
) -> Iterator[Segment]:
    """Check what `AVDiffPipeline.stream` was given, and make the clip piece by piece."""
    own = sorted(set(options) & OWN_ARGUMENTS)
    if own:
        raise ValueError(f"{own[0]}: a stream sets it itself, or cannot follow it; leave it out")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt of type {type(prompt).__name__}: a stream needs one text")
    for name, value in (("seconds", seconds), ("segment", segment), ("overlap", overlap)):
        if isinstance(value, bool | str) or not hasattr(value, "__float__"):
            raise ValueError(f"{name}={value!r:.60}: needs seconds, a number")
    # one check of all that the segments will be called with, before the first of them
    request = pipe.request(prompt=prompt, seconds=seconds, video=video, audio=audio, **options)
    frame = replace(request.frame, fps=as_fps(request.frame.fps))  # type: ignore[arg-type]
    shown = 0 if video is None else video.shape[2]
    longer = audio is not None and audio.shape[-1] > round(shown / frame.fps * frame.sample_rate)
    driven = audio is not None and (video is None or longer)
    if shown and request.generate.audio and audio is None:
        raise ValueError(
            "video without sound is continued without sound: needs audio, or generate_audio=False"
        )
    given = bool(shown) or audio is not None
    plan = plan_clip(
        [prompt],
        frame,
        ClipLength(seconds, None, 0.0 if driven else float(shown / frame.fps)),
        request.language,
        event_seeds=None if given else pipe._event_seeds(request.generator, 1),
    )
    _check_lengths(plan.clip, seconds, shown, audio if driven else None)
    stride = frame.clock.video_stride
    kept, longest = (
        1 + stride * max(0, round(length * frame.fps / stride)) for length in (overlap, segment)
    )
    if longest <= kept:
        raise ValueError(f"overlap={overlap}: needs less than segment={segment}")
    stream = _Stream(
        prompt,
        frame,
        plan.clip.num_frames,
        longest,
        kept,
        plan.phones[0],
        driven,
        request.generate,
        options,
    )
    first = None if video is None else video[:1]
    return _segments(pipe, stream, first, None if audio is None else audio[:1])


def _check_lengths(
    clip: ClipSpec, seconds: float, shown: int, driving: torch.Tensor | None
) -> None:
    if clip.num_frames <= shown:
        raise ValueError(
            f"seconds={seconds}: what is given lasts {float(shown / clip.fps):g} s, needs more"
        )
    step = clip.clock.video_stride * clip.sample_rate / clip.fps
    if driving is not None and clip.num_samples - driving.shape[-1] >= step:
        raise ValueError(
            f"seconds={seconds}: the sound that drives the picture lasts "
            f"{driving.shape[-1] / clip.sample_rate:g} s"
        )


def _segments(
    pipe: AVDiffPipeline,
    stream: _Stream,
    video: torch.Tensor | None,
    audio: torch.Tensor | None,
) -> Iterator[Segment]:
    at = stream.samples
    done = 0 if video is None else video.shape[2]
    seam = round(SEAM * stream.frame.sample_rate)
    sent = 0  # samples handed out
    if done:
        sound = None if audio is None else audio[..., : at(done)]
        sent = 0 if sound is None else max(0, at(done) - seam)
        yield _piece(video, None if sound is None else sound[..., :sent])
    while done < stream.total:
        context = min(stream.overlap, done)
        count = min(stream.longest, stream.total - done + context)
        start = done - context
        known = audio
        if audio is not None and stream.driven:
            known = audio[..., at(start) : at(start + count)]
        elif audio is not None:
            known = audio[..., at(start) - at(done) :]
        past = None if video is None else video[:, :, -context:]
        frames, sound = _next_segment(pipe, stream, start, count, past, known)
        done = start + count
        if frames is not None:
            video = frames[:, :, -stream.overlap :]
        new = None
        if sound is not None:
            stop = at(done) if done >= stream.total else at(done) - seam
            new = sound[..., sent - at(start) : stop - at(start)]
            sent = stop
            if not stream.driven:
                audio = sound[..., at(done - min(stream.overlap, done)) - at(done) :]
        yield _piece(None if frames is None else frames[:, :, context:], new)


def _next_segment(
    pipe: AVDiffPipeline,
    stream: _Stream,
    start: int,
    count: int,
    video: torch.Tensor | None,
    audio: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """One call: (1, 3, F, H, W) in [-1, 1] and (1, C, S) of the `count` frames from `start`."""
    clip = stream.frame.frames(count)
    track = None
    if stream.words:
        words = _window(stream.words, float(start / clip.fps), clip)
        track = track_from_phones([words], clip)
    out = pipe(
        stream.prompt,
        num_frames=count,
        video=video,
        audio=audio,
        phoneme_track=track,
        speech_start=0.0,
        output_type="pt",
        **stream.options,
    )
    frames = None if out.frames is None else out.frames.permute(0, 2, 1, 3, 4).mul(2).sub(1)
    return frames, out.audio


def streams(
    segments: Iterable[Segment],
) -> tuple[Iterator[torch.Tensor] | None, Iterator[torch.Tensor] | None]:
    """(pictures (H, W, 3), pieces of sound (C, S)) of a stream of segments, to be read side by
    side: what one reader is ahead of the other is kept meanwhile, and no more.
    """
    source = iter(segments)
    frames: deque[torch.Tensor] = deque()
    sounds: deque[torch.Tensor] = deque()

    def put(segment: Segment) -> None:
        if segment.frames is not None:
            frames.append(segment.frames)
        if segment.audio is not None and segment.audio.shape[-1]:
            sounds.append(segment.audio)

    def take(queue: deque[torch.Tensor]) -> Iterator[torch.Tensor]:
        while True:
            while not queue:
                segment = next(source, None)
                if segment is None:
                    return
                put(segment)
            yield queue.popleft()

    head = next(source)
    put(head)
    pictures = (picture for part in take(frames) for picture in part)
    return (None if head.frames is None else pictures), (
        None if head.audio is None else take(sounds)
    )


def _piece(video: torch.Tensor | None, audio: torch.Tensor | None) -> Segment:
    """(1, 3, F, H, W) in [-1, 1] and (1, C, S) -> Segment."""
    frames = (
        None
        if video is None
        else (video[0].float().cpu().permute(1, 2, 3, 0) / 2 + 0.5).clamp(0, 1)
    )
    return Segment(frames, None if audio is None else audio[0].float().cpu())


def _window(words: Sequence[Phone], start: float, clip: ClipSpec) -> list[Phone]:
    """The phones of a segment that begins at `start` seconds; silence if there are none, as the
    clip has a phoneme track.
    """
    inside = [p for p in words if p.end > start and p.start < start + float(clip.seconds)]
    moved = [p._replace(start=max(0.0, p.start - start), end=p.end - start) for p in inside]
    return moved or [Phone("", 0.0, float(clip.seconds), 0)]
