"""From a request to files: the pipeline's call, the clip, its thumbnail and its sprite sheet."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from avdiff.clip import ClipSpec
from avdiff.media.read import read_clip
from avdiff.media.write import write_clip
from avdiff.pipelines.conditioning import Retake
from avdiff.serve.requests import ClipRequest

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

SPRITES = 16  # pictures of a sprite sheet
SHEET_COLUMNS = 4
VIDEO_NAME = "video.mp4"
SOUND_NAME = "speech.wav"
THUMBNAIL_NAME = "thumbnail.webp"
SHEET_NAME = "spritesheet.jpg"

OnStep = Callable[[int, int], None]  # (steps done, steps in all); raises to stop


@dataclass(frozen=True)
class Rendered:
    """What was made: frames (F, H, W, 3) in [0, 1] or None, sound (C, S) or None."""

    frames: np.ndarray | None
    frame_rate: Fraction
    audio: np.ndarray | None
    sample_rate: int


def render(
    pipe: AVDiffPipeline,
    request: ClipRequest,
    inputs: dict[str, Path],
    source: Path | None,
    source_prompt: str | None,
    on_step: OnStep,
) -> Rendered:
    """Run the pipeline for a request.

    Args:
        inputs: uploaded files by role. source: the clip that is continued or changed, and the
            prompt that it was made of, None for an upload.

    Raises:
        ValueError: one sentence that names what does not fit.
    """
    arguments = call_arguments(pipe, request)
    arguments |= conditioning(pipe, request, inputs, source, source_prompt, arguments)

    def after_step(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(step + 1, pipe.num_timesteps)
        return {}

    result = pipe(
        request.prompt,
        output_type="np",
        generator=torch.Generator("cpu").manual_seed(request.seed),
        callback_on_step_end=after_step,
        **arguments,
    )
    frames = None if result.frames is None else np.asarray(result.frames[0])
    audio = None if result.audio is None else result.audio[0].float().cpu().numpy()
    return Rendered(frames, Fraction(result.frame_rate), audio, int(result.sampling_rate or 0))


def call_arguments(pipe: AVDiffPipeline, request: ClipRequest) -> dict[str, Any]:
    """Arguments of the call that a request says itself; what it leaves out the pipeline decides."""
    names = (
        "seconds",
        "height",
        "width",
        "language",
        "negative_prompt",
        "guidance_scale",
        "audio_guidance_scale",
        "num_inference_steps",
        "deflicker_strength",
        "generate_audio",
    )
    arguments = {n: v for n in names if (v := getattr(request, n)) is not None}
    if request.kind == "speech":
        arguments["generate_video"] = False
    return arguments


def conditioning(
    pipe: AVDiffPipeline,
    request: ClipRequest,
    inputs: dict[str, Path],
    source: Path | None,
    source_prompt: str | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Pictures, sound and film that are given, as the pipeline wants them."""
    film = inputs.get("video", source)
    if film is not None:
        return _from_film(pipe, request, film, source_prompt, inputs.get("mask"))
    size = (arguments.get("height", 128), arguments.get("width", 128))
    given: dict[str, Any] = {
        name: _picture(inputs[name], size) for name in ("image", "last_image") if name in inputs
    }
    if "audio" in inputs:
        rate = pipe.audio_vae.config.sample_rate
        sound = read_clip(inputs["audio"], sample_rate=rate, max_seconds=request.seconds).audio
        if sound is None:
            raise ValueError("audio: has no sound in it")
        given["audio"], clip = _sound(pipe, sound, Fraction(sound.shape[1], rate), Fraction(25))
        arguments.pop("seconds", None)
        given["num_frames"] = clip.num_frames
    return given


def changed_span(before: str, after: str, language: str | None, seconds: float) -> Retake:
    """The part of a clip whose words differ between two prompts.

    Raises:
        ValueError: no words in one of them, or the same words.
    """
    from avdiff.corpus.captions import parse_prompt
    from avdiff.g2p.pronounce import read

    old_words = parse_prompt(before)[1]
    new_words = parse_prompt(after)[1]
    if not old_words or not new_words:
        raise ValueError("retake: needs a span or a mask where the prompts have no words in quotes")
    old = read(old_words, language)
    new = read(new_words, language)
    old_texts = [word.text for word in old.words]
    new_texts = [word.text for word in new.words]
    first = 0
    while first < min(len(old_texts), len(new_texts)) and old_texts[first] == new_texts[first]:
        first += 1
    last = 0
    most = min(len(old_texts), len(new_texts)) - first
    while last < most and old_texts[-1 - last] == new_texts[-1 - last]:
        last += 1
    if first == len(old_texts) == len(new_texts):
        raise ValueError("prompt: says the same words as the clip; needs other words or a span")
    pace = seconds / old.duration
    start = old.words[min(first, len(old.words) - 1)].start * pace
    end = old.words[len(old.words) - 1 - last].end * pace if last < len(old.words) else start
    return Retake(max(0.0, start - 0.04), min(seconds, max(end, start + 0.1) + 0.04))


def _from_film(
    pipe: AVDiffPipeline,
    request: ClipRequest,
    film: Path,
    source_prompt: str | None,
    mask: Path | None,
) -> dict[str, Any]:
    """A film with its sound, continued or changed."""
    rate = pipe.audio_vae.config.sample_rate
    clip = read_clip(film, sample_rate=rate)
    if clip.frames is None:
        raise ValueError("video: has no pictures in it")
    stride = pipe.clock.video_stride
    count = 1 + (len(clip.frames) - 1) // stride * stride
    frames = torch.from_numpy(clip.frames[:count]).permute(3, 0, 1, 2).float() / 127.5 - 1
    frame_rate = Fraction(clip.fps or 25)
    seconds = Fraction(count) / frame_rate
    height, width = frames.shape[-2:]
    given: dict[str, Any] = {
        "video": frames[None],
        "frame_rate": frame_rate,
        "height": height,
        "width": width,
    }
    if clip.audio is not None:
        given["audio"], _ = _sound(pipe, clip.audio, seconds, frame_rate)
    else:
        given["generate_audio"] = False  # a silent film stays silent
    if request.kind == "extend":
        more = Fraction(str(request.seconds if request.seconds is not None else 2))
        spec = ClipSpec.from_seconds(seconds + more, frame_rate, clock=pipe.clock)
        return given | {"num_frames": spec.num_frames, "seconds": None}
    given |= {"num_frames": count, "seconds": None}
    if mask is not None:
        given["mask"] = _mask(mask, (height, width))
    if request.retake is not None:
        given["retake"] = Retake(*request.retake)
    elif mask is None:
        if source_prompt is None:
            raise ValueError("retake: needs a span or a mask for a film that was not made here")
        given["retake"] = changed_span(
            source_prompt, request.prompt, request.language, float(seconds)
        )
    return given


def _sound(
    pipe: AVDiffPipeline, sound: np.ndarray, seconds: Fraction, frame_rate: Fraction
) -> tuple[torch.Tensor, ClipSpec]:
    """Sound (C, S) -> (1, channels, S) of a whole clip, silence behind it."""
    rate = pipe.audio_vae.config.sample_rate
    clip = ClipSpec.from_seconds(seconds, frame_rate, sample_rate=rate, clock=pipe.clock)
    waveform = torch.zeros(1, pipe.audio_vae.config.audio_channels, clip.num_samples)
    mono = sound[:, : clip.num_samples].mean(axis=0)
    waveform[..., : len(mono)] = torch.from_numpy(mono)
    return waveform, clip


def _picture(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture file -> (1, 3, H, W) in [-1, 1], cropped at the centre and scaled."""
    from PIL import ImageOps

    with Image.open(path) as opened:
        fitted = ImageOps.fit(opened.convert("RGB"), (size[1], size[0]))
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float()[None] / 127.5 - 1


def _mask(path: Path, size: tuple[int, int]) -> torch.Tensor:
    """A picture file -> (H, W) in [0, 1], white where the film is made anew."""
    with Image.open(path) as opened:
        scaled = opened.convert("L").resize((size[1], size[0]))
    return torch.from_numpy(np.array(scaled)).float() / 255


def write_assets(
    rendered: Rendered, folder: Path, facts: dict[str, Any], clock: Callable[[], float] = time.time
) -> dict[str, Any]:
    """Write clip, thumbnail and sprite sheet into a folder that appears whole under its name.

    Returns:
        Length, size and the seconds that writing took.
    """
    began = clock()
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    temporary.mkdir(parents=True, exist_ok=True)
    shape: dict[str, Any] = {}
    if rendered.frames is None:
        assert rendered.audio is not None
        name = temporary / SOUND_NAME
        write_clip(name, None, None, rendered.audio, rendered.sample_rate, facts)
        shape["seconds"] = rendered.audio.shape[-1] / rendered.sample_rate
    else:
        frames = rendered.frames
        write_clip(
            temporary / VIDEO_NAME,
            frames,
            rendered.frame_rate,
            rendered.audio,
            rendered.sample_rate if rendered.audio is not None else None,
            facts,
        )
        _write_pictures(frames, temporary)
        shape = {
            "seconds": float(len(frames) / rendered.frame_rate),
            "height": frames.shape[1],
            "width": frames.shape[2],
            "frames": len(frames),
        }
    if folder.exists():
        _remove(folder)
    os.replace(temporary, folder)
    return shape | {"write_seconds": round(clock() - began, 4)}


def _write_pictures(frames: np.ndarray, folder: Path) -> None:
    """The middle picture, and a sheet of pictures spread over the clip."""
    pictures = np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    Image.fromarray(pictures[len(pictures) // 2]).save(folder / THUMBNAIL_NAME)
    chosen = np.linspace(0, len(pictures) - 1, min(SPRITES, len(pictures))).round().astype(int)
    height, width = pictures.shape[1:3]
    rows = -(-len(chosen) // SHEET_COLUMNS)
    sheet = Image.new("RGB", (SHEET_COLUMNS * width, rows * height))
    for place, index in enumerate(chosen):
        corner = (place % SHEET_COLUMNS * width, place // SHEET_COLUMNS * height)
        sheet.paste(Image.fromarray(pictures[index]), corner)
    sheet.save(folder / SHEET_NAME, quality=90)


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
