"""What a call of the pipeline may be given: one sentence for each value that cannot work, before
anything is computed.

`checked` goes over the arguments by name. Lengths, sizes and rates that belong to the clock are
checked by `ClipSpec`.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL.Image import Image

from avdiff.clip import ClipSpec
from avdiff.guidance import Guidance
from avdiff.latents import Joint
from avdiff.phonetics.track import PhonemeTrack
from avdiff.pipelines.conditioning import Retake

MAX_GUIDANCE = 100  # beyond it the estimate is noise in any precision
WHOLE = {
    "num_inference_steps": 10_000,
    "num_videos_per_prompt": 1_000,
}  # the largest that is no slip of the keyboard


def checked(call: Callable[..., Any]) -> Callable[..., Any]:
    """Check the arguments of `AVDiffPipeline.__call__` by their names before it runs.

    Raises:
        ValueError: names the argument, its value and what fits.
    """
    signature = inspect.signature(call)

    @functools.wraps(call)
    def checked_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        for name in ("image", "last_image"):
            if isinstance(bound.arguments[name], Image):
                bound.arguments[name] = picture_tensor(bound.arguments[name])
        check_call(self, bound.arguments)
        return call(*bound.args, **bound.kwargs)

    return checked_call


def check_call(pipe: Any, values: dict[str, Any]) -> None:  # noqa: C901
    """The checks of `checked` on a dict of arguments."""
    for name, most in WHOLE.items():
        value = values[name]
        if value is None and name == "num_inference_steps":  # the pipeline's own
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise ValueError(
                f"{name}={_short(value)}: needs a whole number of at least 1 and at most {most}"
            )
    for name in ("guidance_scale", "audio_guidance_scale"):
        value = values[name]
        if value is not None and (not _is_number(value) or abs(value) > MAX_GUIDANCE):
            raise ValueError(
                f"{name}={_short(value)}: needs a number from -{MAX_GUIDANCE} to {MAX_GUIDANCE}"
            )
    steady = values["deflicker_strength"]
    if steady is not None and not (_is_number(steady) and 0 <= steady <= 255):
        raise ValueError(
            f"deflicker_strength={_short(steady)}: needs a number from 0 to 255, or None"
        )
    start = values["speech_start"]
    if start is not None and not (_is_number(start) and start >= 0):
        raise ValueError(f"speech_start={_short(start)}: needs seconds of at least 0, or None")
    frames = values["num_frames"]
    if frames is not None and (not isinstance(frames, int) or isinstance(frames, bool)):
        raise ValueError(f"num_frames={_short(frames)}: needs a whole number, or None")
    if values["seconds"] is not None and not _is_number(values["seconds"]):
        raise ValueError(f"seconds={_short(values['seconds'])}: needs a number above 0, or None")
    for name, kinds, wanted in (
        ("guidance", Guidance, "an avdiff.Guidance, or None"),
        ("track", PhonemeTrack, "a Script, or None"),
        ("retake", Retake, "an avdiff.Retake, or None"),
        ("attention_kwargs", dict, "a dict, or None"),
        ("language", str, "a code such as 'en', or None"),
    ):
        if values[name] is not None and not isinstance(values[name], kinds):
            raise ValueError(f"{name}={_short(values[name])}: needs {wanted}")
    if not isinstance(values["output_type"], str):
        raise ValueError(
            f"output_type={_short(values['output_type'])}: needs 'pil', 'np', 'pt' or 'latent'"
        )
    _check_texts(values)
    callback = values["callback_on_step_end"]
    if callback is not None and not callable(callback):
        raise ValueError(f"callback_on_step_end={_short(callback)}: needs a function")
    generators = values["generator"]
    for one in generators if isinstance(generators, list) else [generators]:
        if one is not None and not isinstance(one, torch.Generator):
            raise ValueError(f"generator={_short(one)}: needs a torch.Generator, or a list of them")
    _check_embeddings(pipe, values)
    for name in ("latents", "audio_latents"):
        if values[name] is not None:
            _check_tensor(name, values[name], "(batch, tokens, values)", 3)
    _check_media(pipe, values)


def _check_texts(values: dict[str, Any]) -> None:
    negative = values["negative_prompt"]
    texts = [negative] if isinstance(negative, str) else negative
    if texts is not None and not (
        isinstance(texts, list) and texts and all(isinstance(t, str) for t in texts)
    ):
        raise ValueError(
            f"negative_prompt={_short(negative)}: needs a text, a non-empty list of texts, or None"
        )
    prompt = values["prompt"]
    for text in [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []:
        if isinstance(text, str) and not text.strip():
            raise ValueError(f"prompt={text!r}: is empty, needs a description or words in quotes")


def _check_embeddings(pipe: Any, values: dict[str, Any]) -> None:
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


def _check_media(pipe: Any, values: dict[str, Any]) -> None:
    """Picture, film and sound: their type, shape and range."""
    size = (values["height"], values["width"])
    video = values["video"]
    audio = values["audio"]
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


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool | str) and math.isfinite(value)
    except (TypeError, OverflowError):
        return False


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
