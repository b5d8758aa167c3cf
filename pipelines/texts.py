"""Captions to features, and what each pass of a run reads of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from avdiff.models.conditions import Conditions, Positions
from avdiff.pipelines.conditioning import per_clip
from avdiff.pipelines.denoise import ConditionCache
from avdiff.pipelines.request import GenerationRequest, TextFeatures

if TYPE_CHECKING:
    from avdiff.pipelines.pipeline_av import AVDiffPipeline
    from avdiff.pipelines.prompt import ClipPlan


def caption_features(
    pipe: AVDiffPipeline, text: str | list[str], device: torch.device | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, L, D) and mask (B, L) of captions.

    Raises:
        ValueError: the pipeline has no text encoder.
    """
    if pipe.text_encoder is None or pipe.tokenizer is None:
        raise ValueError(
            "this pipeline has no text encoder: pass prompt_embeds and prompt_attention_mask"
        )
    device = device or pipe._execution_device
    tokens = pipe.tokenizer(
        [text] if isinstance(text, str) else text,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
        max_length=pipe.text_encoder.config.max_length,
    )
    mask = tokens.attention_mask.to(device)
    return pipe.text_encoder(tokens.input_ids.to(device), mask), mask


def repeat_rows(
    values: torch.Tensor | None, times: int, dtype: torch.dtype | None = None
) -> torch.Tensor | None:
    """Each row of features or masks so many times, in a dtype."""
    if values is None or (times == 1 and dtype is None):
        return values
    return values.to(dtype or values.dtype).repeat_interleave(times, dim=0)


def pass_conditions(
    pipe: AVDiffPipeline, request: GenerationRequest, plan: ClipPlan
) -> ConditionCache[Conditions]:
    """What the passes of a run read: captions, words on the clock, positions."""
    embeds, mask, negative, negative_mask = pipe.encode_prompt(
        plan.descriptions,
        request.negative_prompts,
        request.text.embeds,
        request.text.mask,
        request.negative_text.embeds,
        request.negative_text.mask,
    )
    device = pipe._execution_device
    batch = request.batch
    positions = Positions.of(plan.clip, device)
    track = None if plan.track is None else plan.track.to(device)

    def features(values: torch.Tensor | None, mask: torch.Tensor | None) -> TextFeatures:
        if values is None or mask is None:
            return TextFeatures()
        return TextFeatures(per_clip(values, batch), per_clip(mask, batch))

    def prepare(name: str, text: TextFeatures) -> Conditions:
        own = track
        if track is not None and name == "no_text":
            own = track.without()
        return pipe.transformer.prepare(
            text.embeds,
            text.mask,
            positions,
            own,
            batch,
            attention_kwargs=request.attention_kwargs,
        )

    read = {"cond": features(embeds, mask), "no_text": features(negative, negative_mask)}
    return ConditionCache(prepare, read)
