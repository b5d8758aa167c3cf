"""What `avdiff generate` is given: pictures, sound and film from files, as the pipeline wants
them.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from avdiff.clip import ClipSpec, as_fps
from avdiff.media.container import MediaError
from avdiff.media.read import read_clip
from avdiff.media.stills import read_still
from avdiff.media.write import write_clip
from avdiff.pipelines.conditioning import Retake
from avdiff.pipelines.streaming import streams

if TYPE_CHECKING:
    from avdiff.cli.main import Wish


def conditioning_from_files(pipe: Any, wish: Wish, arguments: dict[str, Any]) -> dict[str, Any]:  # noqa: C901
    """Picture, sound or film that the user gave, with the length they ask for.

    A film keeps its own sound where it is extended or changed, and gets a new one where not.

    Raises:
        ValueError: options that do not go together, or files without what is wanted of them.
    """
    changed = [name for name in ("extend", "retake", "mask") if getattr(wish, name) is not None]
    if wish.audio is not None and wish.video is not None and not changed:
        raise ValueError("audio and video are both given: nothing is left to generate")
    for name in changed:
        if wish.video is None and (name != "retake" or wish.audio is None):
            raise ValueError(
                f"{name}={getattr(wish, name)}: needs --video, the film that it is done to"
            )
    if wish.extend is not None and len(changed) > 1:
        raise ValueError(f"extend and {changed[1]} are both given: needs one of them")
    size = (arguments.get("height", 128), arguments.get("width", 128))
    fps = as_fps(arguments.get("frame_rate", 25))
    clock = pipe.clock
    rate = pipe.audio_vae.config.sample_rate
    parts: dict[str, Any] = {}
    for name in ("image", "last_image"):
        if getattr(wish, name) is not None:
            parts[name] = _to_video(_read_image(name, getattr(wish, name), size))[:, 0]
    sound = None
    if wish.video is not None:
        film = read_clip(wish.video, fps=fps, size=size, max_seconds=wish.seconds, sample_rate=rate)
        if film.frames is None:
            raise ValueError(f"video={wish.video}: has no pictures in it")
        whole = 1 + (len(film.frames) - 1) // clock.video_stride * clock.video_stride
        parts |= {
            "video": _to_video(film.frames[:whole])[None],
            "num_frames": whole,
            "seconds": None,
        }
        sound = film.audio if changed else None
    if wish.audio is not None:
        sound = read_clip(wish.audio, sample_rate=rate, max_seconds=wish.seconds).audio
        if sound is None:
            raise ValueError(f"audio={wish.audio}: has no sound in it")
    if sound is not None:
        seconds = parts["num_frames"] / fps if "num_frames" in parts else sound.shape[1] / rate
        clip = ClipSpec.from_seconds(seconds, fps, sample_rate=rate, clock=clock)
        waveform = torch.zeros(1, pipe.audio_vae.config.audio_channels, clip.num_samples)
        sound = sound[:, : clip.num_samples].mean(axis=0)
        waveform[..., : len(sound)] = torch.from_numpy(sound)
        parts |= {"audio": waveform, "num_frames": clip.num_frames, "seconds": None}
    if wish.retake is not None:
        parts["retake"] = _span(wish.retake)
    if wish.mask is not None:
        parts["mask"] = torch.from_numpy(
            _read_image("mask", wish.mask, size)[0].mean(axis=-1) / 255
        ).float()
    return parts


def continue_clip(
    pipe: Any, wish: Wish, arguments: dict[str, Any], facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the given film and what follows it, piece by piece in constant memory; returns length
    and size.
    """
    video = arguments["video"]
    fps = as_fps(arguments.get("frame_rate", 25))
    arguments = {k: v for k, v in arguments.items() if k not in ("num_frames", "seconds")}
    if "audio" not in arguments:
        arguments["generate_audio"] = False  # a silent film stays silent
    total = ClipSpec.from_seconds(
        video.shape[2] / fps + Fraction(str(wish.extend)), fps, clock=pipe.clock
    )
    frames, sound = streams(pipe.stream(wish.prompt, total.seconds, **arguments))
    rate = None if sound is None else pipe.vocoder.config.sampling_rate
    write_clip(str(wish.output), frames, fps, sound, rate, facts)
    return {
        "seconds": round(float(total.seconds), 3),
        "frames": total.num_frames,
        "height": video.shape[3],
        "width": video.shape[4],
    }


def _span(text: str) -> Retake:
    """ "1.5:2" -> Retake(1.5, 2.0)."""
    try:
        start, end = (float(part) for part in text.split(":"))
        return Retake(start, end)
    except ValueError as error:
        raise ValueError(f"retake={text}: needs START:END in seconds, such as 0.5:1.25") from error


def _read_image(name: str, path: str, size: tuple[int, int]) -> np.ndarray:
    """(1, H, W, 3) uint8, cropped at the centre and scaled."""
    try:
        return read_still(path, size)[None]
    except MediaError as error:
        raise ValueError(f"{name}={path}: {str(error).removeprefix(f'path={path}: ')}") from error


def _to_video(frames: np.ndarray) -> torch.Tensor:
    """(F, H, W, 3) uint8 -> (3, F, H, W) float in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1
