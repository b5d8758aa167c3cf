"""Denoising: the loop, what each pass reads, the guided estimate, and the caller's callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.hooks import FirstBlockCacheConfig

from avdiff.guidance import Guidance
from avdiff.latents import Joint, JointLatents
from avdiff.pipelines.schedule import TIMESTEPS, Schedule, make_schedule
from avdiff.pipelines.validation import text_guidance

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline
    from avdiff.pipelines.request import GenerationRequest, TextFeatures


class Joinable(Protocol):
    """Conditions of a pass that can be stacked with those of another."""

    @staticmethod
    def cat(parts: Any) -> Any: ...


C = TypeVar("C", bound=Joinable)


class ConditionCache(Generic[C]):
    """What the passes of a run read, prepared when a pass first needs it and kept for all steps:
    captions, the look-ups of phonemes, rotary phases.

    Args:
        prepare: (name of a pass, its features) -> conditions of that pass.
        features: caption features (B, L, D) and masks (B, L) of "cond" and "no_text"; a pass of
            another name reads those of "cond".
    """

    def __init__(
        self, prepare: Callable[[str, TextFeatures], C], features: dict[str, TextFeatures]
    ) -> None:
        self._prepare = prepare
        self._features = features
        self._made: dict[tuple[str, ...], C] = {}

    def for_passes(self, names: tuple[str, ...]) -> C:
        """Conditions of passes that run as one batch, in this order."""
        if names not in self._made:
            if len(names) > 1:
                parts = [self.for_passes((name,)) for name in names]
                self._made[names] = type(parts[0]).cat(parts)
            else:
                read = "no_text" if names[0] == "no_text" else "cond"
                self._made[names] = self._prepare(read, self._features[read])
        return self._made[names]

    def features(self, name: str) -> torch.Tensor | None:
        """Caption features (B, L, D) of a pass."""
        return self._features[name].embeds

    def change(self, name: str, text: torch.Tensor) -> None:
        """Other caption features for a pass from now on."""
        mask = self._features[name].mask
        if mask is None or mask.shape != text.shape[:2]:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        self._features[name] = replace(self._features[name], embeds=text, mask=mask)
        self._made.clear()


def denoise(
    pipe: AVDiffPipeline,
    state: JointLatents,
    mask: Joint[torch.Tensor],
    conditions: ConditionCache[Any],
    request: GenerationRequest,
) -> JointLatents:
    """Walk from noise to data.

    Args:
        pipe: its transformer estimates, its scheduler steps; its `_guidance_scale`,
            `_audio_guidance_scale` and `_interrupt` may be set by the callback.
        state: tokens at the first noise level. mask: what of them is given and stays as it is, bool
            (B,) or (B, N).
    """
    device = state.sigmas.video if state.sigmas.video is not None else state.sigmas.audio
    assert device is not None
    schedule = make_schedule(pipe.scheduler, request.steps, request.sigmas, device.device)
    pipe._num_timesteps = request.steps
    with pipe.progress_bar(total=request.steps) as progress:
        for index in range(request.steps):
            if pipe.interrupt:
                continue
            pipe._current_timestep = schedule.timesteps[index] * TIMESTEPS
            token_sigma = _token_sigma(schedule, index, mask, request.batch)
            guidance = _guidance_now(pipe, request.guidance, state, mask)
            names = guidance.passes(index / request.steps)
            estimates = run_passes(pipe, names, guidance, state, token_sigma, conditions)
            state = schedule.step(guidance.combine(estimates), index, state, mask)
            if request.callback is not None:
                state = run_callback(pipe, request, index, state, conditions)
            progress.update()
    return state


def _token_sigma(
    schedule: Schedule, index: int, mask: Joint[torch.Tensor], batch: int
) -> Joint[torch.Tensor]:
    """Noise levels (B,) or (B, N) of one step, 0 where the mask is True."""

    def level(given: torch.Tensor, sigmas: torch.Tensor) -> torch.Tensor:
        sigma = sigmas[index].expand(batch)
        return (sigma if given.ndim == 1 else sigma[:, None]) * (~given).to(sigma.dtype)

    return mask.map(level, schedule.sigmas)


def _guidance_now(
    pipe: AVDiffPipeline,
    guidance: Guidance,
    state: JointLatents,
    mask: Joint[torch.Tensor],
) -> Guidance:
    """The call's guidance with the text scales that a callback may have set, and without scales
    that change nothing.
    """
    now = (pipe._guidance_scale, pipe._audio_guidance_scale)
    asked = (guidance.text.video, guidance.text.audio)
    # A scale that a callback sets is a scale of a call, where 0 is off.
    text = guidance.text if now == asked else text_guidance(*now)
    generated = [modality for modality, given in mask.items() if not bool(given.all())]
    both = state.video is not None and state.audio is not None
    return replace(guidance, text=text).only(generated, heard=both)


def run_passes(
    pipe: AVDiffPipeline,
    names: tuple[str, ...],
    guidance: Guidance,
    state: JointLatents,
    token_sigma: Joint[torch.Tensor],
    conditions: ConditionCache[Any],
) -> dict[str, Joint[torch.Tensor]]:
    """Estimates of the clean tokens by pass: passes that differ in their text alone run as one
    batch.
    """
    together = tuple(name for name in names if name != "isolated")
    estimates = _forward(pipe, together, state.latents, token_sigma, conditions)
    if "isolated" in names:
        latents = state.latents
        # A modality that is not guided by the other need not run alone; the first-block cache
        # compares both.
        if not isinstance(pipe.transformer._cache_config, FirstBlockCacheConfig):
            latents = Joint(
                state.video if guidance.cross.video != 1 else None,
                state.audio if guidance.cross.audio != 1 else None,
            )
        estimates |= _forward(pipe, ("isolated",), latents, token_sigma, conditions)
    return estimates


def _forward(
    pipe: AVDiffPipeline,
    names: tuple[str, ...],
    latents: Joint[torch.Tensor],
    token_sigma: Joint[torch.Tensor],
    conditions: ConditionCache[Any],
) -> dict[str, Joint[torch.Tensor]]:
    """Estimates of some passes by one call of the transformer."""
    count = len(names)
    tokens = latents.map(lambda x: torch.cat([x] * count))
    sigma = latents.map(lambda _, level: torch.cat([level] * count), token_sigma)
    with pipe.transformer.cache_context("+".join(names)):
        out = pipe.transformer(
            tokens.video,
            tokens.audio,
            sigma.video,
            sigma.audio,
            conditions=conditions.for_passes(names),
            isolated=names == ("isolated",),
            attention_kwargs=pipe.attention_kwargs,
        )
    rows = Joint(out.video, out.audio).map(lambda estimate: estimate.float().chunk(count))
    return {
        name: Joint(
            None if rows.video is None else rows.video[number],
            None if rows.audio is None else rows.audio[number],
        )
        for number, name in enumerate(names)
    }


FEATURES = {"prompt_embeds": "cond", "negative_prompt_embeds": "no_text"}


def run_callback(
    pipe: AVDiffPipeline,
    request: GenerationRequest,
    index: int,
    state: JointLatents,
    conditions: ConditionCache[Any],
) -> JointLatents:
    """Hand the named tensors to the caller and take back what it changed.

    Raises:
        ValueError: the callback returned something else.
    """
    assert request.callback is not None
    tensors: dict[str, torch.Tensor | None] = {"latents": state.video, "audio_latents": state.audio}
    tensors |= {name: conditions.features(key) for name, key in FEATURES.items()}
    scales = (pipe._guidance_scale, pipe._audio_guidance_scale)
    handed = {name: tensors[name] for name in request.callback_names}
    returned = request.callback(pipe, index, pipe._current_timestep, dict(handed))
    changed = _checked_return(returned, tensors)
    if isinstance(request.callback, PipelineCallback | MultiPipelineCallbacks):
        # diffusers' own callbacks know one scale, and where guidance ends it ends for the sound too
        ended = pipe._guidance_scale == 0 != scales[0]
        pipe._audio_guidance_scale = 0.0 if ended else scales[1]
    for name, key in FEATURES.items():
        if name in changed and changed[name] is not tensors[name]:
            conditions.change(key, changed[name])
    return replace(
        state,
        video=changed.get("latents", state.video),
        audio=changed.get("audio_latents", state.audio),
    )


def _checked_return(
    returned: Any, tensors: dict[str, torch.Tensor | None]
) -> dict[str, torch.Tensor]:
    """The tensors that a callback gave back, those that are None left out."""
    if returned is None:
        return {}
    if not isinstance(returned, dict) or not set(returned) <= set(tensors):
        said = sorted(returned, key=str) if isinstance(returned, dict) else repr(returned)[:60]
        raise ValueError(
            f"callback_on_step_end returned {said}: needs a dict with some of {sorted(tensors)}, "
            "or None"
        )
    changed = {}
    for name, value in returned.items():
        old = tensors[name]
        if value is None or (old is not None and value is old):
            continue
        if not isinstance(value, torch.Tensor):
            raise ValueError(
                f"callback_on_step_end returned {name} of type {type(value).__name__}: needs a "
                "tensor"
            )
        # diffusers' callbacks keep the last row of what they take for [negative, positive]
        if old is not None and old.shape[0] > 1 and torch.equal(value, old[-1:]):
            continue
        # captions may become longer or shorter, clips may not
        sizes = list(value.shape)
        if "embeds" in name and old is not None and value.ndim == 3:
            sizes[1] = old.shape[1]
        if old is not None and sizes != list(old.shape):
            raise ValueError(
                f"callback_on_step_end returned {name} of shape {tuple(value.shape)}: needs "
                f"{tuple(old.shape)}"
            )
        if old is None and "latents" in name:
            raise ValueError(f"callback_on_step_end returned {name}: this clip has none")
        changed[name] = value if old is None else value.to(old.device)
    return changed
