"""Clips of any length in constant memory: segment after segment, each continuing the end of the
last.

A segment is an ordinary call whose first second or so is given: the frames and the sound that were
made last, encoded anew. Nothing but this overlap is kept, so memory does not grow with the clip.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

from avdiff.clip import ClipSpec, Clock, as_fps
from avdiff.latents import Joint
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import track_from_phones
from avdiff.pipelines.conditioning import SEAM
from avdiff.pipelines.prompt import understand


@dataclass(frozen=True)
class Segment:
    """The next piece of a long clip: frames (F, H, W, 3) in [0, 1] and samples (C, S) in [-1, 1],
    fp32 on CPU; None for a modality that is left out. Sound comes `SEAM` later than its frames, as
    it is cross-faded into what follows.
    """

    frames: torch.Tensor | None
    audio: torch.Tensor | None


class LongMixin:
    """The half of `AVDiffPipeline` that makes long clips."""

    clock: Clock
    audio_vae: Any
    _event_seeds: Any

    def stream(
        self,
        prompt: str,
        seconds: float,
        segment: float = 4.0,
        overlap: float = 1.0,
        video: torch.Tensor | None = None,
        audio: torch.Tensor | None = None,
        frame_rate: Fraction | float = 25,
        generate_video: bool = True,
        generate_audio: bool = True,
        language: str | None = None,
        **options: Any,
    ) -> Iterator[Segment]:
        """Make one clip piece by piece; write it with
        `write_clip(path, *streams(pipe.stream(...)), ...)`.

        Args:
            prompt: its words are laid on the clock of the whole clip, after the given part.
            seconds: length of the whole clip. segment, overlap: seconds of one call and of what it
                is given.
            video, audio: as in `__call__`, the beginning of the clip, which comes first in the
                result. Sound that is longer than the film drives it.
            options: of `__call__`.

        Raises:
            ValueError: the clip is no longer than what is given, or what is given lacks a modality
                that is asked for.
        """
        fps = as_fps(frame_rate)
        rate = self.audio_vae.config.sample_rate
        stride = self.clock.video_stride
        frame = dict(fps=fps, sample_rate=rate, clock=self.clock)
        frame |= {name: options[name] for name in ("height", "width") if name in options}
        shown = 0 if video is None else video.shape[2]
        driven = audio is not None and (
            video is None or audio.shape[-1] > round(shown / fps * rate)
        )
        if not driven and shown and generate_audio and audio is None:
            raise ValueError(
                "video without sound is continued without sound: needs audio, or "
                "generate_audio=False"
            )
        begin = 0.0 if driven else float(shown / fps)
        seeds = (
            None if shown or audio is not None else self._event_seeds(options.get("generator"), 1)
        )
        request = understand(
            [prompt], frame, seconds, None, language, begin=begin, event_seeds=seeds
        )
        total = request.clip.num_frames
        words = request.phones[0]
        if total <= shown:
            raise ValueError(
                f"seconds={seconds}: what is given lasts {float(shown / fps):g} s, needs more"
            )
        if (
            driven
            and audio is not None
            and request.clip.num_samples - audio.shape[-1] >= stride * rate / fps
        ):
            raise ValueError(
                f"seconds={seconds}: the sound that drives the picture lasts "
                f"{audio.shape[-1] / rate:g} s"
            )
        kept, most = (1 + stride * max(0, round(s * fps / stride)) for s in (overlap, segment))
        if most <= kept:
            raise ValueError(f"overlap={overlap}: needs less than segment={segment}")
        return self._segments(
            prompt,
            frame,
            total,
            most,
            kept,
            words,
            None if video is None else video[:1],
            None if audio is None else audio[:1],
            driven,
            Joint(generate_video, generate_audio),
            options,
        )

    def _segments(
        self,
        prompt: str,
        frame: dict[str, Any],
        total: int,
        most: int,
        kept: int,
        words: Sequence[Phone],
        video: torch.Tensor | None,
        audio: torch.Tensor | None,
        driven: bool,
        wanted: Joint[bool],
        options: dict[str, Any],
    ) -> Iterator[Segment]:
        fps = frame["fps"]
        rate = frame["sample_rate"]

        def at(frames: int) -> int:  # samples up to a frame
            return round(frames / fps * rate)

        done = 0 if video is None else video.shape[2]
        held = round(SEAM * rate)
        told = 0  # samples handed out
        if done:
            sound = None if audio is None else audio[..., : at(done)]
            told = 0 if sound is None else max(0, at(done) - held)
            yield _piece(video, None if sound is None else sound[..., :told])
        while done < total:
            context = min(kept, done)
            count = min(most, total - done + context)
            start = done - context
            clip = ClipSpec(count, **frame)
            heard = audio
            if audio is not None:
                heard = (
                    audio[..., at(start) : at(start + count)]
                    if driven
                    else audio[..., at(start) - at(done) :]
                )
            out = self(  # type: ignore[operator]
                prompt,
                num_frames=count,
                frame_rate=fps,
                generate_video=wanted.video,
                generate_audio=wanted.audio,
                video=None if video is None else video[:, :, -context:],
                audio=heard,
                track=track_from_phones([_window(words, float(start / fps), clip)], clip)
                if words
                else None,
                speech_start=0.0,
                output_type="pt",
                **options,
            )
            done = start + count
            frames = (
                None if out.frames is None else out.frames.permute(0, 2, 1, 3, 4).mul(2).sub(1)
            )  # (1, 3, F, H, W)
            if frames is not None:
                video = frames[:, :, -kept:]
            new = None
            if out.audio is not None:
                stop = at(done) if done >= total else at(done) - held
                new = out.audio[..., told - at(start) : stop - at(start)]
                told = stop
                audio = audio if driven else out.audio[..., at(done - min(kept, done)) - at(done) :]
            yield _piece(None if frames is None else frames[:, :, context:], new)


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
    clip has a script.
    """
    inside = [p for p in words if p.end > start and p.start < start + float(clip.seconds)]
    moved = [p._replace(start=max(0.0, p.start - start), end=p.end - start) for p in inside]
    return moved or [Phone("", 0.0, float(clip.seconds), 0)]
