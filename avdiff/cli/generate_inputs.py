"""What `avdiff generate` is given: pictures, sound and film from files, as the pipeline wants
them.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avdiff.clip import ClipSpec, as_fps
from avdiff.media.container import MediaError
from avdiff.media.read import Clip, read_clip
from avdiff.media.sound import CANCEL_ADVICE, channels_cancel
from avdiff.media.stills import read_still
from avdiff.media.write import write_clip
from avdiff.pipelines.conditioning import Retake
from avdiff.pipelines.streaming import streams
from avdiff.pixels import to_model

if TYPE_CHECKING:
    from avdiff.cli.generate import GenerationRequest
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

SHORTEST_SOUND = 0.04  # seconds: one frame
CHANGES = ("extend", "retake", "mask")  # what is done to a film that is given


def conditioning_from_files(
    pipe: AVDiffPipeline, request: GenerationRequest, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Picture, sound or film that the user gave, with the length they ask for.

    A film keeps its own sound where it is extended or changed, and gets a new one where not.

    Returns:
        keyword arguments of the pipeline, beside those of `arguments`.

    Raises:
        ValueError: options that do not go together, or files without what is wanted of them.
    """
    changes = [name for name in CHANGES if getattr(request, name) is not None]
    check_combination(request, changes)
    size = (arguments.get("height", 128), arguments.get("width", 128))
    fps = as_fps(arguments.get("frame_rate", 25))
    parts: dict[str, Any] = {}
    for name in ("image", "last_image"):
        path = getattr(request, name)
        if path is not None:
            parts[name] = _to_video(_read_image(name, path, size))[:, 0]
    sound = None
    if request.video is not None:
        film = _read_film(pipe, request, size, fps)
        parts |= {"video": film.video, "num_frames": film.video.shape[2], "seconds": None}
        sound = film.sound if changes else None
    if request.audio is not None:
        sound = _read_sound(pipe, request)
    if sound is not None:
        rate = pipe.audio_vae.config.sample_rate
        seconds = parts["num_frames"] / fps if "num_frames" in parts else sound.shape[1] / rate
        clip = ClipSpec.from_seconds(seconds, fps, sample_rate=rate, clock=pipe.clock)
        waveform = _fit_sound(sound, clip.num_samples, pipe.audio_vae.config.audio_channels)
        parts |= {"audio": waveform, "num_frames": clip.num_frames, "seconds": None}
    if request.retake is not None:
        parts["retake"] = _span(request.retake)
    if request.mask is not None:
        gray = _read_image("mask", request.mask, size)[0].mean(axis=-1)
        parts["mask"] = torch.from_numpy(gray / 255).float()
    return parts


def check_combination(request: GenerationRequest, changes: list[str]) -> None:
    """Refuse options that do not go together.

    Raises:
        ValueError: says which, and what is missing.
    """
    if request.audio is not None and request.video is not None and not changes:
        raise ValueError("audio and video are both given: nothing is left to generate")
    for name in changes:
        retakes_sound = name == "retake" and request.audio is not None
        if request.video is None and not retakes_sound:
            raise ValueError(
                f"{name}={getattr(request, name)}: needs --video, the film that it is done to"
            )
    if request.extend is not None and len(changes) > 1:
        raise ValueError(f"extend and {changes[1]} are both given: needs one of them")


@dataclass(frozen=True)
class Film:
    """A film that the user gave: (1, 3, F, H, W) in [-1, 1], and (C, S) sound if it has any."""

    video: torch.Tensor
    sound: np.ndarray | None


def _read_film(
    pipe: AVDiffPipeline, request: GenerationRequest, size: tuple[int, int], fps: Fraction
) -> Film:
    """The film, cut to a number of frames that the video VAE takes: 8 k + 1."""
    rate = pipe.audio_vae.config.sample_rate
    film = read_clip(
        str(request.video), fps=fps, size=size, max_seconds=request.seconds, sample_rate=rate
    )
    if film.frames is None:
        raise ValueError(f"video={request.video}: has no pictures in it")
    _print_notes(str(request.video), film)
    stride = pipe.clock.video_stride
    whole = 1 + (len(film.frames) - 1) // stride * stride
    return Film(_to_video(film.frames[:whole])[None], film.audio)


def _read_sound(pipe: AVDiffPipeline, request: GenerationRequest) -> np.ndarray:
    """(C, S) at the codec's rate."""
    rate = pipe.audio_vae.config.sample_rate
    clip = read_clip(str(request.audio), sample_rate=rate, max_seconds=request.seconds)
    sound = clip.audio
    if sound is None:
        raise ValueError(f"audio={request.audio}: has no sound in it")
    if sound.shape[1] < SHORTEST_SOUND * rate:
        raise ValueError(
            f"audio={request.audio}: lasts {sound.shape[1] / rate:.4f} s; needs at least "
            f"{SHORTEST_SOUND} s"
        )
    if channels_cancel(sound):
        raise ValueError(f"audio={request.audio}: {CANCEL_ADVICE}")
    _print_notes(str(request.audio), clip)
    return sound


def _print_notes(path: str, clip: Clip) -> None:
    """What was done to a file that was read: HDR made SDR, one of several sound tracks taken..."""
    for note in clip.notes:
        print(f"{path}: {note}", file=sys.stderr)


def _fit_sound(sound: np.ndarray, num_samples: int, channels: int) -> torch.Tensor:
    """(C, S) -> (1, channels, num_samples): mixed down, cut or followed by silence."""
    waveform = torch.zeros(1, channels, num_samples)
    mono = sound[:, :num_samples].mean(axis=0)
    waveform[..., : len(mono)] = torch.from_numpy(mono)
    return waveform


def continue_clip(
    pipe: AVDiffPipeline,
    request: GenerationRequest,
    arguments: dict[str, Any],
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Write the given film and what follows it, piece by piece in constant memory; returns length
    and size.
    """
    video = arguments["video"]
    fps = as_fps(arguments.get("frame_rate", 25))
    arguments = {k: v for k, v in arguments.items() if k not in ("num_frames", "seconds")}
    if "audio" not in arguments:
        arguments["generate_audio"] = False  # a silent film stays silent
    total_seconds = video.shape[2] / fps + Fraction(str(request.extend))
    total = ClipSpec.from_seconds(total_seconds, fps, clock=pipe.clock)
    frames, sound = streams(pipe.stream(request.prompt, total.seconds, **arguments))
    rate = None if sound is None else pipe.vocoder.config.sampling_rate
    write_clip(str(request.output), frames, fps, sound, rate, facts)
    height, width = video.shape[3:]
    seconds = round(float(total.seconds), 3)
    return {"seconds": seconds, "frames": total.num_frames, "height": height, "width": width}


def _span(text: str) -> Retake:
    """ "1.5:2" -> Retake(1.5, 2.0)."""
    try:
        start, end = (float(part) for part in text.split(":"))
        return Retake(start, end)
    except ValueError as error:
        raise ValueError(f"retake={text}: needs START:END in seconds, such as 0.5:1.25") from error


def _read_image(name: str, path: str, size: tuple[int, int]) -> np.ndarray:
    """(1, H, W, 3) uint8, cropped at the center and scaled."""
    try:
        return read_still(path, size)[None]
    except MediaError as error:
        raise ValueError(f"{name}={path}: {str(error).removeprefix(f'path={path}: ')}") from error


def _to_video(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> (3, F, H, W) float in [-1, 1]."""
    return to_model(frames).permute(3, 0, 1, 2)
