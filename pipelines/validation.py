"""What a call of the pipeline may be given: one sentence for each value that cannot work, before
anything is computed.

`validate` goes over the arguments by name and returns the request that all later steps read.
Lengths, sizes and rates that belong to the clock are checked by `ClipSpec`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL.Image import Image

from avdiff.clip import ClipSpec
from avdiff.guidance import Guidance, TextGuidance
from avdiff.latents import Joint
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.conditioning import Retake
from avdiff.pipelines.request import FrameFormat, GenerationRequest, TextFeatures
from avdiff.pipelines.schedule import check_scheduler, check_sigmas

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline

MAX_GUIDANCE = 100  # beyond it the estimate is noise in any precision
OUTPUT_TYPES = ("pil", "np", "pt", "latent", "tokens")
# The largest whole numbers that are no slip of the keyboard.
WHOLE = {"num_inference_steps": 10_000, "num_videos_per_prompt": 1_000}
KINDS: dict[str, tuple[type, str]] = {
    "guidance": (Guidance, "an avdiff.Guidance, or None"),
    "phoneme_track": (PhonemeTrack, "a PhonemeTrack, or None"),
    "retake": (Retake, "an avdiff.Retake, or None"),
    "attention_kwargs": (dict, "a dict, or None"),
    "language": (str, "a code such as 'en', or None"),
}
UNCHANGED = (  # of the call, as they are in the request
    "seconds",
    "num_frames",
    "image",
    "last_image",
    "video",
    "audio",
    "retake",
    "mask",
    "language",
    "phoneme_track",
    "speech_start",
    "check_prompt",
    "generator",
    "latents",
    "audio_latents",
    "output_type",
    "attention_kwargs",
)
FLAGS = ("generate_video", "generate_audio", "check_prompt", "return_dict")


def validate(pipe: AVDiffPipeline, values: dict[str, Any]) -> GenerationRequest:
    """Check the arguments of a call by their names.

    Args:
        values: of every argument, as `inspect.signature` binds them.

    Raises:
        ValueError: names the argument, its value and what fits.
    """
    values = dict(values)
    for name in ("image", "last_image"):
        if isinstance(values[name], Image):
            values[name] = picture_tensor(values[name])
    _check_numbers(values)
    _check_kinds(values)
    _check_texts(values)
    _check_callback(pipe, values)
    _check_embeddings(pipe, values)
    for name in ("latents", "audio_latents"):
        if values[name] is not None:
            _check_tensor(name, values[name], "(batch, tokens, values)", 3, 4, 5)
    _check_media(pipe, values)
    check_scheduler(pipe.scheduler)
    sigmas = check_sigmas(pipe.scheduler, values["sigmas"], values["timesteps"])
    batch = _batch_size(values)
    _check_generators(values["generator"], batch)
    _check_track(pipe, values["phoneme_track"], batch)
    return _filled_in(pipe, values, batch, sigmas)


def _filled_in(
    pipe: AVDiffPipeline,
    values: dict[str, Any],
    batch: int,
    sigmas: Sequence[float] | torch.Tensor | Joint[torch.Tensor] | None,
) -> GenerationRequest:
    """The request of checked values, with the pipeline's defaults where a call says nothing."""
    defaults = pipe.sampling_defaults.of(values, pipe.sampling_defaults)
    scales = (defaults.guidance_scale, defaults.audio_guidance_scale)
    steps = defaults.num_inference_steps
    if sigmas is not None:
        steps = len(next(v for _, v in sigmas.items()) if isinstance(sigmas, Joint) else sigmas)
    callback = values["callback_on_step_end"]
    names = getattr(callback, "tensor_inputs", values["callback_on_step_end_tensor_inputs"])
    return GenerationRequest(
        prompts=_repeated(values["prompt"], values["num_videos_per_prompt"]),
        negative_prompts=_negatives(values["negative_prompt"], batch),
        text=TextFeatures(values["prompt_embeds"], values["prompt_attention_mask"]),
        negative_text=TextFeatures(
            values["negative_prompt_embeds"], values["negative_prompt_attention_mask"]
        ),
        batch=batch,
        generate=Joint(values["generate_video"], values["generate_audio"]),
        frame=FrameFormat(
            values["frame_rate"],
            values["height"],
            values["width"],
            pipe.audio_vae.config.sample_rate,
            pipe.clock,
        ),
        steps=steps,
        sigmas=sigmas,
        guidance=values["guidance"] or Guidance(text=text_guidance(*scales)),
        deflicker_strength=defaults.deflicker_strength,
        callback=callback,
        callback_names=list(names),
        **{name: values[name] for name in UNCHANGED},
    )


def text_guidance(video: float, audio: float) -> TextGuidance:
    """Text guidance of two scales as a call gives them: 0 is none, as everywhere in diffusers, and
    so is 1. The estimate without the text is `Guidance.without_text()`.
    """
    return TextGuidance(*(1.0 if scale == 0 else float(scale) for scale in (video, audio)))


def _batch_size(values: dict[str, Any]) -> int:
    prompt = values["prompt"]
    times = values["num_videos_per_prompt"]
    if prompt is None:
        return values["prompt_embeds"].shape[0] * times
    return (1 if isinstance(prompt, str) else len(prompt)) * times


def _repeated(prompt: str | list[str] | None, times: int) -> list[str] | None:
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else prompt
    return [text for text in prompts for _ in range(times)]


def _negatives(negative: str | list[str] | None, batch: int) -> list[str] | None:
    if negative is None:
        return None
    texts = [negative] if isinstance(negative, str) else negative
    if batch % len(texts):
        raise ValueError(
            f"negative_prompt has {len(texts)} texts for {batch} clips: give one, or one for each"
        )
    return _repeated(texts, batch // len(texts))


def _check_numbers(values: dict[str, Any]) -> None:
    for name, most in WHOLE.items():
        value = values[name]
        if value is None and name == "num_inference_steps":  # the pipeline's own
            continue
        if not _is_whole(value) or not 1 <= value <= most:
            raise ValueError(
                f"{name}={_short(value)}: needs a whole number of at least 1 and at most {most}"
            )
    for name in ("guidance_scale", "audio_guidance_scale"):
        value = values[name]
        if value is not None and (not _is_number(value) or abs(value) > MAX_GUIDANCE):
            raise ValueError(
                f"{name}={_short(value)}: needs a number from -{MAX_GUIDANCE} to {MAX_GUIDANCE}"
            )
    strength = values["deflicker_strength"]
    if strength is not None and not (_is_number(strength) and 0 <= strength <= 255):
        raise ValueError(
            f"deflicker_strength={_short(strength)}: needs a number from 0 to 255, or None"
        )
    start = values["speech_start"]
    if start is not None and not (_is_number(start) and start >= 0):
        raise ValueError(f"speech_start={_short(start)}: needs seconds of at least 0, or None")
    _check_length(values)


def _check_length(values: dict[str, Any]) -> None:
    frames = values["num_frames"]
    seconds = values["seconds"]
    if frames is not None and not _is_whole(frames):
        raise ValueError(f"num_frames={_short(frames)}: needs a whole number, or None")
    if seconds is not None and not _is_number(seconds):
        raise ValueError(f"seconds={_short(seconds)}: needs a number above 0, or None")
    if seconds is not None and frames is not None:
        raise ValueError(f"seconds={seconds} and num_frames={frames}: give one of them")


def _check_kinds(values: dict[str, Any]) -> None:
    for name, (kind, wanted) in KINDS.items():
        if values[name] is not None and not isinstance(values[name], kind):
            raise ValueError(f"{name}={_short(values[name])}: needs {wanted}")
    for name in FLAGS:
        if not isinstance(values[name], bool):
            raise ValueError(f"{name}={_short(values[name])}: needs True or False")
    if not (values["generate_video"] or values["generate_audio"]):
        raise ValueError(
            "generate_video and generate_audio are both False: nothing is left to generate"
        )
    if values["output_type"] not in OUTPUT_TYPES:
        raise ValueError(
            f"output_type={_short(values['output_type'])}: needs one of {', '.join(OUTPUT_TYPES)}"
        )


def _check_callback(pipe: AVDiffPipeline, values: dict[str, Any]) -> None:
    callback = values["callback_on_step_end"]
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end={_short(callback)}: needs a function")
    # diffusers' own callbacks say themselves which tensors they need
    names = getattr(callback, "tensor_inputs", values["callback_on_step_end_tensor_inputs"])
    known = pipe._callback_tensor_inputs
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"callback_on_step_end_tensor_inputs={_short(names)}: needs a list, some of {known}"
        )
    unknown = set(names) - set(known)
    if unknown:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: needs some of {known}"
        )


def _check_generators(generators: Any, batch: int) -> None:
    for one in generators if isinstance(generators, list) else [generators]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"generator={_short(one)}: needs a torch.Generator, or a list of them")
    if isinstance(generators, list) and (len(generators) != batch or None in generators):
        raise ValueError(
            f"generator is a list of {len(generators)}: needs one generator for each of the "
            f"{batch} clips"
        )


def _check_track(pipe: AVDiffPipeline, track: PhonemeTrack | None, batch: int) -> None:
    """Ids within the inventory, one row a clip; an id beyond it would be a crash in the table."""
    if track is None:
        return
    config = pipe.transformer.config
    if not config.num_phonemes:
        raise ValueError("phoneme_track: this model has num_phonemes=0 and reads none")
    limits = (("phonemes", config.num_phonemes), ("stress_tones", config.num_stress_tones))
    for name, count in limits:
        ids = getattr(track, name)
        if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.ndim != 2:
            raise ValueError(f"phoneme_track.{name}: needs a tensor of ids (batch, phonemes)")
        if ids.shape[0] != batch or not ids.shape[1]:
            raise ValueError(
                f"phoneme_track.{name} of shape {tuple(ids.shape)}: needs a row for each of the "
                f"{batch} clips"
            )
        if int(ids.min()) < 0 or int(ids.max()) >= count:
            raise ValueError(
                f"phoneme_track.{name} with ids from {int(ids.min())} to {int(ids.max())}: needs "
                f"0 to {count - 1}"
            )


def _check_texts(values: dict[str, Any]) -> None:
    prompt = values["prompt"]
    negative = values["negative_prompt"]
    if (prompt is None) == (values["prompt_embeds"] is None):
        raise ValueError("needs exactly one of prompt and prompt_embeds")
    if prompt is not None and not _is_texts(prompt):
        raise ValueError(
            f"prompt of type {type(prompt).__name__}: needs a text or a non-empty list of texts"
        )
    if negative is not None and not _is_texts(negative):
        raise ValueError(
            f"negative_prompt={_short(negative)}: needs a text, a non-empty list of texts, or None"
        )
    for text in [prompt] if isinstance(prompt, str) else prompt or []:
        if not text.strip():
            raise ValueError(f"prompt={text!r}: is empty, needs a description or words in quotes")


def _is_texts(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and bool(texts) and all(isinstance(t, str) for t in texts)


def _check_embeddings(pipe: AVDiffPipeline, values: dict[str, Any]) -> None:
    width = pipe.transformer.config.text_dim
    for sign in ("", "negative_"):
        embeds = values[f"{sign}prompt_embeds"]
        mask = values[f"{sign}prompt_attention_mask"]
        if (embeds is None) != (mask is None):
            raise ValueError(
                f"{sign}prompt_embeds and {sign}prompt_attention_mask: needs both or neither"
            )
        if embeds is None:
            continue
        _check_tensor(f"{sign}prompt_embeds", embeds, "(batch, length, width)", 3)
        if embeds.shape[-1] != width or 0 in embeds.shape:
            raise ValueError(
                f"{sign}prompt_embeds of shape {tuple(embeds.shape)}: needs (batch, length, "
                f"{width})"
            )
        if not isinstance(mask, torch.Tensor) or mask.shape != embeds.shape[:2]:
            found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else _short(mask)
            raise ValueError(
                f"{sign}prompt_attention_mask of shape {found}: needs {tuple(embeds.shape[:2])}"
            )


def _check_media(pipe: AVDiffPipeline, values: dict[str, Any]) -> None:
    """Picture, film and sound: their type, shape and range."""
    size = (values["height"], values["width"])
    video = values["video"]
    audio = values["audio"]
    _check_together(values)
    for name in ("image", "last_image"):
        image = values[name]
        if image is not None:
            _check_tensor(name, image, "(3, height, width) or (batch, 3, height, width)", 3, 4)
            _check_pixels(name, image, image.shape[-3], size)
    if values["mask"] is not None:
        _check_tensor("mask", values["mask"], "(height, width) or (frames, height, width)", 2, 3)
    if video is not None:
        _check_tensor("video", video, "(batch, 3, frames, height, width)", 5)
        _check_pixels("video", video, video.shape[1], size)
        stride = pipe.clock.video_stride
        if (video.shape[2] - 1) % stride:
            raise ValueError(f"video of {video.shape[2]} frames: needs {stride}*k+1")
    if audio is not None:
        _check_tensor("audio", audio, "(batch, channels, samples)", 3)
        channels = pipe.audio_vae.config.audio_channels
        if audio.shape[1] != channels or 0 in audio.shape:
            raise ValueError(
                f"audio of shape {tuple(audio.shape)}: needs (batch, {channels}, samples)"
            )
        _check_range("audio", audio)


def _check_together(values: dict[str, Any]) -> None:
    """Arguments that need each other, or exclude each other."""
    if values["image"] is not None and values["video"] is not None:
        raise ValueError(
            "image and video are both given: an image is the first frame of a video to be generated"
        )
    if values["mask"] is not None and values["video"] is None:
        raise ValueError("mask without video: needs the video whose masked region is made anew")
    if values["retake"] is not None and values["video"] is None and values["audio"] is None:
        raise ValueError(
            "retake without video and audio: needs a clip of which a span is made anew"
        )


def _check_pixels(name: str, pixels: torch.Tensor, channels: int, size: tuple[Any, Any]) -> None:
    if channels != 3 or tuple(pixels.shape[-2:]) != size or 0 in pixels.shape:
        wanted = f"3 channels and {size[0]} x {size[1]} pixels, the clip's height and width"
        raise ValueError(f"{name} of shape {tuple(pixels.shape)}: needs {wanted}")
    _check_range(name, pixels)


def _check_range(name: str, values: torch.Tensor) -> None:
    low = float(values.min())
    high = float(values.max())
    if low < -1.01 or high > 1.01:  # a codec's overshoot by rounding is no mistake of the caller
        raise ValueError(
            f"{name} with values from {low:.4g} to {high:.4g}: needs values from -1 to 1"
        )


def picture_tensor(picture: Image) -> torch.Tensor:
    """A PIL picture of any mode -> (3, H, W) in [-1, 1]; transparency is ignored."""
    pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def _check_tensor(name: str, value: Any, shape: str, *ndims: int) -> None:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        found = (
            f"of {value.dtype}"
            if isinstance(value, torch.Tensor)
            else f"of type {type(value).__name__}"
        )
        raise ValueError(f"{name} {found}: needs a float tensor {shape}")
    if value.ndim not in ndims:
        raise ValueError(f"{name} of shape {tuple(value.shape)}: needs {shape}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name}: holds NaN or infinite values")


def check_memory(clip: ClipSpec, batch: int) -> None:
    """Refuse a clip whose finished frames alone (fp32) would not fit into the memory of this
    machine.
    """
    needed = 12 * batch * clip.num_frames * clip.height * clip.width
    present = (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if hasattr(os, "sysconf")
        else math.inf
    )
    if needed > present:
        raise ValueError(
            f"num_frames={clip.num_frames} of {clip.height} x {clip.width} for {batch} clip(s): "
            "the frames take "
            f"{needed / 2**30:.0f} GiB and this machine has {present / 2**30:.0f}; needs a "
            "shorter or smaller clip"
        )


def check_finite(latents: Joint[torch.Tensor]) -> None:
    """Refuse a run that ended in NaN or infinite values: decoded they would be black frames and
    silence.
    """
    for name, tokens in latents.items():
        if not bool(tokens.isfinite().all()):
            raise ValueError(
                f"the {name} latents hold NaN or infinite values after denoising: the weights are "
                "damaged, or the guidance or the dtype does not suit them"
            )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
