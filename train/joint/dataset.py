"""Cached clips on their way into training: a caption is chosen, text is dropped, words are laid on
the clock.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avdiff.clip import ClipSpec
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.events.scene import onset_phones
from avdiff.data.cache import CaptionFeatures
from avdiff.models.conditions import Positions
from avdiff.phonetics.track import smooth_warp, track_from_phones
from avdiff.train.recipe import DataOptions

# bytes: Latin and Chinese captions of the corpus are shorter, most of its Hindi ones longer
LONG_CAPTION = 192
MANY_CAPTIONS = 256  # long captions that make a bucket of their own


class TrainingClips(Dataset):
    """Items of a latent cache with the random choices of training made.

    Args:
        cache: `LatentCache`, or anything with its items and `clip(index)`. options: shares of text
            that is dropped; None for validation: first caption, nothing dropped, nothing warped.
            onset_track: strokes of events are laid on the clock like words.
    """

    def __init__(self, cache: Any, options: DataOptions | None, onset_track: bool = False) -> None:
        self.cache = cache
        self.options = options
        self.onset_track = onset_track

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.cache[index]
        clip = self.cache.clip(index)
        captions = item.get("captions") or [item.get("caption", "")]
        row = {m: item[m] for m in ("video", "audio") if m in item}
        row |= {"clip": clip, "phones": item["phones"], "warp": np.zeros(clip.mel_frames)}
        if self.onset_track and "audio" in row and item.get("contacts"):
            row["phones"] = onset_phones(item["contacts"])
        chosen = 0
        silent = False
        if self.options is not None:
            rng = np.random.default_rng(
                random.getrandbits(63)
            )  # the feed seeds `random` for every row
            chosen = int(rng.integers(len(captions)))
            row["warp"] = smooth_warp(clip, rng)
            both = rng.random() < self.options.text_dropout
            silent = both or rng.random() < self.options.caption_dropout
            if both or rng.random() < self.options.phoneme_dropout:
                row["phones"] = ()
        if "text" in item:
            row["text"] = item["text"][chosen][:0] if silent else item["text"][chosen]
        return {**row, "caption": "" if silent else parse_prompt(captions[chosen])[0]}

    def groups(self) -> list[tuple[Any, ...]]:
        """Bucket of each item: clips of one size and length, with the same modalities. Long
        captions are apart where there are many of them, since every caption of a micro-batch is
        padded to its longest.
        """
        keys: list[tuple[Any, ...]] = [
            (self.cache.clip(i), *_held(self.cache, i)) for i in range(len(self.cache))
        ]
        records = [record for _, record in getattr(self.cache, "items", ())]
        long = {i for i, record in enumerate(records) if longest_caption(record) > LONG_CAPTION}
        many = {
            key for key, count in Counter(keys[i] for i in long).items() if count >= MANY_CAPTIONS
        }
        return [
            (*key, "long captions") if i in long and key in many else key
            for i, key in enumerate(keys)
        ]


def longest_caption(record: Mapping[str, Any]) -> int:
    """Bytes of an item's longest caption."""
    return max(len(c.encode()) for c in record.get("captions") or [record.get("caption", "")])


def _held(cache: Any, index: int) -> tuple[str, ...]:
    """Modalities of an item, without reading its tensors where the cache can tell."""
    if hasattr(cache, "modalities"):
        return tuple(cache.modalities(index))
    return tuple(m for m in ("video", "audio") if m in cache[index])


class Collate:
    """Rows -> batch: video (B, N_v, C_v) and audio (B, N_a, C_a) where present, input_ids and
    attention_mask (B, L), script (with video_frames warped), clip; with `features` also text (B, L,
    D), the cached features of captions.
    """

    def __init__(self, tokenizer: Any, max_length: int, features: bool = False) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.features = features

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        clip: ClipSpec = rows[0]["clip"]
        tokens = self.tokenizer(
            [r["caption"] for r in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids = tokens["input_ids"].long()
        mask = tokens["attention_mask"].long()
        if ids.shape[1] == 0:  # nobody says anything: one place that nobody looks at
            ids, mask = (torch.zeros(len(rows), 1, dtype=torch.long) for _ in range(2))
        text = {}
        if self.features and ids.shape[1]:
            rows_of_text = [
                torch.nn.functional.pad(r["text"], (0, 0, 0, ids.shape[1] - len(r["text"])))
                for r in rows
            ]
            text = {"text": torch.stack(rows_of_text)}
        present = [m for m in ("video", "audio") if m in rows[0]]
        batch: dict[str, Any] = {m: torch.stack([r[m] for r in rows]).float() for m in present}
        track = track_from_phones([r["phones"] for r in rows], clip, [r["warp"] for r in rows])
        return {
            **batch,
            **text,
            "input_ids": ids,
            "attention_mask": mask,
            "track": track,
            "clip": clip,
        }


def caption_features(frozen: bool, encoder: CaptionFeatures, *caches: Any) -> bool:
    """Whether captions are read from the caches: the text encoder is `frozen` and all caches hold
    its features.

    Raises:
        ValueError: features of another text encoder.
    """
    made_by = [getattr(cache, "text_encoder", None) for cache in caches if cache is not None]
    if not frozen or not all(made_by):
        return False
    own = encoder.fingerprint()
    if any(other != own for other in made_by):
        raise ValueError(
            f"the caches hold text features of encoder {made_by[0]}, this model's is {own}: "
            "make them again with `avdiff data cache --text`, or without"
        )
    return True


@lru_cache(maxsize=64)
def positions_of(clip: ClipSpec, device: str) -> Positions:
    """Positions of a clip, made once."""
    return Positions.of(clip, device)


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch on another device."""
    return {k: v.to(device) if hasattr(v, "to") else v for k, v in batch.items()}


def same_shape(clips: TrainingClips, count: int, size: int) -> Iterable[list[int]]:
    """The first `count` clips in batches of equal shape."""
    by_group: dict[Any, list[int]] = {}
    for index, group in enumerate(clips.groups()[:count]):
        by_group.setdefault(group, []).append(index)
    for members in by_group.values():
        yield from (members[i : i + size] for i in range(0, len(members), size))
