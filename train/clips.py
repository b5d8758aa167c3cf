"""Cached clips on their way into training: a caption is chosen, text is dropped, words are laid on the clock."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avdiff.clip import ClipSpec
from avdiff.data.corpus.captions import parse_prompt
from avdiff.data.script import script_from_phones, smooth_warp
from avdiff.train.recipe import DataOptions


class TrainingClips(Dataset):
    """Items of a latent cache with the random choices of training made.

    Args:
        cache: `LatentCache`, or anything with its items and `clip(index)`. options: shares of text that is dropped;
            None for validation: first caption, nothing dropped, nothing warped.
    """

    def __init__(self, cache: Any, options: DataOptions | None) -> None:
        self.cache, self.options = cache, options

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item, clip = self.cache[index], self.cache.clip(index)
        captions = item.get("captions") or [item.get("caption", "")]
        row = {m: item[m] for m in ("video", "audio") if m in item}
        row |= {"clip": clip, "phones": item["phones"], "caption": captions[0], "warp": np.zeros(clip.mel_frames)}
        if self.options is not None:
            rng = np.random.default_rng(random.getrandbits(63))  # the feed seeds `random` for every row
            row |= {"caption": captions[rng.integers(len(captions))], "warp": smooth_warp(clip, rng)}
            both = rng.random() < self.options.text_dropout
            if both or rng.random() < self.options.caption_dropout:
                row["caption"] = ""
            if both or rng.random() < self.options.script_dropout:
                row["phones"] = ()
        return {**row, "caption": parse_prompt(row["caption"])[0]}

    def groups(self) -> list[tuple[Any, ...]]:
        """Bucket of each item: clips of one size and length, with the same modalities."""
        return [(self.cache.clip(i), *_held(self.cache, i)) for i in range(len(self.cache))]


def _held(cache: Any, index: int) -> tuple[str, ...]:
    """Modalities of an item, without reading its tensors where the cache can tell."""
    if hasattr(cache, "modalities"):
        return tuple(cache.modalities(index))
    return tuple(m for m in ("video", "audio") if m in cache[index])


class Collate:
    """Rows -> batch: video (B, N_v, C_v) and audio (B, N_a, C_a) where present, input_ids and attention_mask (B, L),
    script (with video_frames warped), clip."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        clip: ClipSpec = rows[0]["clip"]
        tokens = self.tokenizer([r["caption"] for r in rows], padding=True, truncation=True, max_length=self.max_length,
                                return_tensors="pt")
        ids, mask = tokens["input_ids"].long(), tokens["attention_mask"].long()
        if ids.shape[1] == 0:  # nobody says anything: one place that nobody looks at
            ids, mask = (torch.zeros(len(rows), 1, dtype=torch.long) for _ in range(2))
        present = [m for m in ("video", "audio") if m in rows[0]]
        batch: dict[str, Any] = {m: torch.stack([r[m] for r in rows]).float() for m in present}
        script = script_from_phones([r["phones"] for r in rows], clip, [r["warp"] for r in rows])
        return {**batch, "input_ids": ids, "attention_mask": mask, "script": script, "clip": clip}
