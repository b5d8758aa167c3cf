"""One denoising step: what each guidance pass is told, the guided estimate, and the caller's callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from avdiff.guidance import Guidance
from avdiff.latents import Joint, JointLatents
from avdiff.models.conditions import Conditions, Positions, Script


class StepMixin:
    """The inside of `AVDiffPipeline.__call__`'s loop."""

    transformer: Any
    _guidance: Guidance
    _execution_device: Any
    _current_timestep: torch.Tensor | None

    def _conditions(
        self,
        embeds: torch.Tensor,
        mask: torch.Tensor,
        negative: torch.Tensor | None,
        negative_mask: torch.Tensor | None,
        positions: Positions,
        script: Script | None,
        batch: int,
    ) -> dict[str, Conditions]:
        """What each guidance pass is told; the look-ups of phonemes and rotary phases happen here, once a prompt."""
        prepare, dtype = self.transformer.prepare, self.transformer.dtype
        if script is not None:
            script = script.to(self._execution_device)
        conditions = {"cond": prepare(embeds.to(dtype), mask, positions, script, batch)}
        if "no_text" in self._guidance.passes():
            quiet = None if script is None else script.without()
            conditions["no_text"] = prepare(
                None if negative is None else negative.to(dtype), negative_mask, positions, quiet, batch
            )
        conditions["isolated"] = conditions["cond"]
        return conditions

    def _estimate(
        self,
        state: JointLatents,
        known: Joint[torch.Tensor],
        sigmas: Joint[torch.Tensor],
        conditions: dict[str, Conditions],
        progress: float,
        attention_kwargs: dict | None,
    ) -> Joint[torch.Tensor]:
        """Guided estimate of the clean tokens at one step."""
        levels = known.map(lambda m, s: (s if m.ndim == 1 else s[:, None]) * (~m).to(s.dtype), sigmas)
        estimates = {}
        for name in self._guidance.passes(progress):
            with self.transformer.cache_context(name):
                out = self.transformer(
                    state.video,
                    state.audio,
                    levels.video,
                    levels.audio,
                    conditions=conditions[name],
                    isolated=name == "isolated",
                    attention_kwargs=attention_kwargs,
                )
            estimates[name] = Joint(out.video, out.audio).map(lambda x: x.float())
        return self._guidance.combine(estimates)

    def _callback(
        self,
        callback: Callable,
        names: list[str],
        index: int,
        state: JointLatents,
        conditions: dict[str, Conditions],
        prompt_embeds: torch.Tensor,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> tuple[JointLatents, dict[str, Conditions]]:
        """Hand the named tensors to the caller and take back what it changed."""
        tensors = {
            "latents": state.video,
            "audio_latents": state.audio,
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
        }
        handed = {}
        for name in names:
            handed[name] = tensors[name]
        changed = callback(self, index, self._current_timestep, handed) or {}
        state = replace(
            state, video=changed.get("latents", state.video), audio=changed.get("audio_latents", state.audio)
        )
        for name, key in (("prompt_embeds", "cond"), ("negative_prompt_embeds", "no_text")):
            if name in changed and changed[name] is not tensors[name] and key in conditions:
                text = torch.cat([conditions[key].text[:, :1], changed[name].to(conditions[key].text.dtype)], dim=1)
                conditions = {**conditions, key: replace(conditions[key], text=text)}
        return state, conditions
