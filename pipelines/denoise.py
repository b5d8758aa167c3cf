"""One denoising step: what each pass is told, the guided estimate, and the caller's callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.hooks import FirstBlockCacheConfig

from avdiff.guidance import Guidance, TextGuidance
from avdiff.latents import Joint, JointLatents
from avdiff.models.conditions import Conditions, Positions
from avdiff.phonetics.track import PhonemeTrack


class Told:
    """What the passes of a run are told, prepared when a pass first needs it and kept for all
    steps: captions, the look-ups of phonemes, rotary phases.

    Args:
        prepare: of the transformer. embeds: captions (B, L, D) and masks (B, L) by pass, (None,
            None) for no caption.
        script: spoken words; the pass without text has none.
    """

    def __init__(
        self,
        prepare: Callable[..., Conditions],
        embeds: dict[str, tuple[torch.Tensor | None, torch.Tensor | None]],
        positions: Positions,
        track: PhonemeTrack | None,
        batch: int,
    ) -> None:
        self._prepare = prepare
        self.embeds = embeds
        self._script = track
        self._positions = positions
        self._batch = batch
        self._made: dict[tuple[str, ...], Conditions] = {}

    def to(self, names: tuple[str, ...]) -> Conditions:
        """Conditions of passes that run as one batch, in this order."""
        if names not in self._made:
            if len(names) > 1:
                self._made[names] = Conditions.cat([self.to((name,)) for name in names])
            else:
                text, mask = self.embeds["no_text" if names[0] == "no_text" else "cond"]
                track = self._script
                if track is not None and names[0] == "no_text":
                    track = track.without()
                self._made[names] = self._prepare(text, mask, self._positions, track, self._batch)
        return self._made[names]

    def change(self, name: str, text: torch.Tensor) -> None:
        """Another caption for a pass from now on."""
        mask = self.embeds[name][1]
        if mask is None or mask.shape != text.shape[:2]:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        self.embeds[name] = (text, mask)
        self._made.clear()


class StepMixin:
    """The inside of `AVDiffPipeline.__call__`'s loop."""

    transformer: Any
    _guidance: Guidance
    _guidance_scale: float
    _audio_guidance_scale: float
    _execution_device: Any
    _current_timestep: torch.Tensor | None

    def _estimate(
        self,
        state: JointLatents,
        known: Joint[torch.Tensor],
        sigmas: Joint[torch.Tensor],
        told: Told,
        progress: float,
        attention_kwargs: dict | None,
    ) -> Joint[torch.Tensor]:
        """Guided estimate of the clean tokens at one step: passes that differ in their text alone
        run as one batch.
        """
        levels = known.map(
            lambda m, s: (s if m.ndim == 1 else s[:, None]) * (~m).to(s.dtype), sigmas
        )
        generated = [m for m, k in known.items() if not bool(k.all())]
        both = state.video is not None and state.audio is not None
        scales = TextGuidance(
            self._guidance_scale, self._audio_guidance_scale
        )  # a callback may have changed them
        guidance = replace(self._guidance, text=scales).only(generated, heard=both)
        names = guidance.passes(progress)
        together = tuple(name for name in names if name != "isolated")
        estimates = self._forward(together, state.latents, levels, told, attention_kwargs)
        if "isolated" in names:
            latents = state.latents
            if not isinstance(
                self.transformer._cache_config, FirstBlockCacheConfig
            ):  # which needs both
                latents = Joint(
                    *(
                        x if getattr(guidance.cross, m) != 1 else None
                        for m, x in (("video", state.video), ("audio", state.audio))
                    )
                )
            estimates |= self._forward(("isolated",), latents, levels, told, attention_kwargs)
        return guidance.combine(estimates)

    def _forward(
        self,
        names: tuple[str, ...],
        latents: Joint[torch.Tensor],
        levels: Joint[torch.Tensor],
        told: Told,
        attention_kwargs: dict | None,
    ) -> dict[str, Joint[torch.Tensor]]:
        """Estimates of some passes by one call of the transformer."""
        n = len(names)
        x = latents.map(lambda t: torch.cat([t] * n))
        t = latents.map(lambda _, s: torch.cat([s] * n), levels)
        with self.transformer.cache_context("+".join(names)):
            out = self.transformer(
                x.video,
                x.audio,
                t.video,
                t.audio,
                conditions=told.to(names if names != ("isolated",) else ("cond",)),
                isolated=names == ("isolated",),
                attention_kwargs=attention_kwargs,
            )
        parts = Joint(out.video, out.audio).map(lambda e: e.float().chunk(n))
        return {name: parts.map(lambda chunks, i=i: chunks[i]) for i, name in enumerate(names)}

    def _callback(
        self, callback: Callable, names: list[str], index: int, state: JointLatents, told: Told
    ) -> JointLatents:
        """Hand the named tensors to the caller and take back what it changed."""
        tensors = {
            "latents": state.video,
            "audio_latents": state.audio,
            "prompt_embeds": told.embeds["cond"][0],
            "negative_prompt_embeds": told.embeds["no_text"][0],
        }
        handed = {}
        for name in names:
            handed[name] = tensors[name]
        changed = callback(self, index, self._current_timestep, handed) or {}
        for name, key in (("prompt_embeds", "cond"), ("negative_prompt_embeds", "no_text")):
            if changed.get(name) is not None and changed[name] is not tensors[name]:
                told.change(key, changed[name])
        return replace(
            state,
            video=changed.get("latents", state.video),
            audio=changed.get("audio_latents", state.audio),
        )
