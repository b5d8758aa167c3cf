"""Cached clips on their way into training: a caption is chosen, text is dropped, words are laid on
the clock.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from avdiff.clip import ClipSpec
from avdiff.corpus.attribute_list import attribute_list, caption_with_list
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.events.scene import onset_phones
from avdiff.data.cache import CachedClip, CaptionFeatures
from avdiff.latents import MODALITIES, Joint
from avdiff.models.conditions import Positions
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import PhonemeTrack, smooth_warp, track_from_phones
from avdiff.train.loop.dataloader import SeededDataset
from avdiff.train.recipe import DataOptions

# bytes: Latin and Chinese captions of the corpus are shorter, most of its Hindi ones longer
LONG_CAPTION = 192
MANY_CAPTIONS = 256  # long captions that make a bucket of their own

# size and length, modalities, and a word for what else sets clips apart
BucketKey: TypeAlias = tuple[ClipSpec, *tuple[str, ...]]


class ClipCache(Protocol):
    """What training needs of a `LatentCache`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> CachedClip: ...

    def clip(self, index: int) -> ClipSpec:
        """Size and length of a clip."""
        ...


@dataclass(frozen=True)
class TrainingRow:
    """One clip as a step sees it.

    Args:
        clip: size and length. caption: what the model is told, "" where it is dropped.
        phones: words on the clock, in seconds; empty where they are dropped. warp: (M,) seconds by
            which the video branch reads them early or late.
        video: (N_v, C_v) latent tokens, None without picture. audio: (N_a, C_a), None without
            sound.
        text: (L, D) cached features of the caption, None where the cache holds none.
    """

    clip: ClipSpec
    caption: str
    phones: Sequence[Phone]
    warp: np.ndarray
    video: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    text: torch.Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A micro-batch of clips of one size and length.

    Args:
        clip: size and length of all rows. input_ids, attention_mask: (B, L) captions.
        track: words on the clock, the video branch's warped.
        video: (B, N_v, C_v), None without pictures. audio: (B, N_a, C_a), None without sound.
        text: (B, L, D) cached features of the captions, None where the encoder has to be run.
    """

    clip: ClipSpec
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    track: PhonemeTrack
    video: torch.Tensor | None = None
    audio: torch.Tensor | None = None
    text: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> Joint[torch.Tensor]:
        """Clean tokens of both modalities; None for one that the clips lack."""
        return Joint(self.video, self.audio)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """A copy on another device."""
        moved = self._tensors(lambda tensor: tensor.to(device, non_blocking=non_blocking))
        return replace(moved, track=self.track.to(device))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory, which the data loader asks for before a GPU reads it."""
        return self._tensors(lambda tensor: tensor.pin_memory())

    def _tensors(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        names = ("input_ids", "attention_mask", *MODALITIES, "text")
        held = {name: getattr(self, name) for name in names}
        return replace(
            self, **{name: change(tensor) for name, tensor in held.items() if tensor is not None}
        )


class TrainingClips(SeededDataset[TrainingRow]):
    """Items of a latent cache with the random choices of training made.

    Args:
        cache: `LatentCache`, or anything with its items and `clip(index)`. options: shares of text
            that is dropped; None for validation: first caption, nothing dropped, nothing warped.
            onset_track: onsets of events are laid on the clock like words.
    """

    def __init__(
        self, cache: ClipCache, options: DataOptions | None, onset_track: bool = False
    ) -> None:
        self.cache = cache
        self.options = options
        self.onset_track = onset_track

    def __len__(self) -> int:
        return len(self.cache)

    def sample(self, index: int, seed: int) -> TrainingRow:
        """Clip `index` as a step with this seed sees it."""
        item = self.cache[index]
        clip = self.cache.clip(index)
        phones: Sequence[Phone] = item["phones"]
        contacts = item.get("contacts")
        if self.onset_track and "audio" in item and contacts:
            phones = onset_phones(contacts)
        chosen = 0
        drop_caption = False
        warp = np.zeros(clip.mel_frames)
        captions = captions_of(item)
        if self.options is not None:
            rng = np.random.default_rng(random.Random(seed).getrandbits(63))
            chosen = int(rng.integers(len(captions)))
            warp = smooth_warp(clip, rng)
            drop_all = rng.random() < self.options.text_dropout
            drop_caption = drop_all or rng.random() < self.options.caption_dropout
            if drop_all or rng.random() < self.options.phoneme_dropout:
                phones = ()
            # drawn last and only where it is asked for: what other recipes draw stays as it was
            lists = self.options.attribute_lists
            if lists and rng.random() < lists:
                captions = [_completed(caption, item) for caption in captions]
        text = None
        if "text" in item:
            text = item["text"][chosen][:0] if drop_caption else item["text"][chosen]
        caption = "" if drop_caption else parse_prompt(captions[chosen])[0]
        return TrainingRow(clip, caption, phones, warp, item.get("video"), item.get("audio"), text)

    def groups(self) -> list[BucketKey]:
        """Bucket of each item: clips of one size and length, with the same modalities. Long
        captions are apart where there are many of them, since every caption of a micro-batch is
        padded to its longest.
        """
        keys: list[BucketKey] = [
            (self.cache.clip(i), *_modalities(self.cache, i)) for i in range(len(self.cache))
        ]
        records = [record for _, record in getattr(self.cache, "items", ())]
        long = {i for i, record in enumerate(records) if longest_caption(record) > LONG_CAPTION}
        counts = Counter(keys[i] for i in long)
        many = {key for key, count in counts.items() if count >= MANY_CAPTIONS}
        return [
            (*key, "long captions") if i in long and key in many else key
            for i, key in enumerate(keys)
        ]


def captions_of(record: CachedClip) -> list[str]:
    """All captions of an item; the only one where it holds no list."""
    return record.get("captions") or [record.get("caption") or ""]


def _completed(caption: str, item: CachedClip) -> str:
    """A caption of the corpus with the list of all that is drawn behind it, unless it has one."""
    attributes = item.get("attributes")
    if not attributes:
        return caption
    listed = attribute_list(attributes)
    return caption if listed in caption else caption_with_list(caption, listed)


def longest_caption(record: CachedClip) -> int:
    """Bytes of an item's longest caption."""
    return max(len(caption.encode()) for caption in captions_of(record))


def _modalities(cache: ClipCache, index: int) -> tuple[str, ...]:
    """Modalities of an item, without reading its tensors where the cache can tell."""
    if hasattr(cache, "modalities"):
        return tuple(cache.modalities(index))
    return tuple(m for m in MODALITIES if m in cache[index])


class Collate:
    """Rows -> `Batch`; with `features` captions come as the cache's features of them."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, features: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.features = features

    def __call__(self, rows: Sequence[TrainingRow]) -> Batch:
        clip = rows[0].clip
        tokens = self.tokenizer(
            [row.caption for row in rows],
            padding=True,
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        ids = tokens["input_ids"].long()
        mask = tokens["attention_mask"].long()
        if ids.shape[1] == 0:  # nobody says anything: one place that nobody looks at
            ids, mask = (torch.zeros(len(rows), 1, dtype=torch.long) for _ in range(2))
        text = _padded([row.text for row in rows], ids.shape[1]) if self.features else None
        track = track_from_phones([row.phones for row in rows], clip, [row.warp for row in rows])
        video = _stacked([row.video for row in rows])
        audio = _stacked([row.audio for row in rows])
        return Batch(clip, ids, mask, track, video, audio, text)


def _stacked(tokens: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """(N, C) of each row -> (B, N, C) fp32; a bucket has a modality in all its rows or in none."""
    present = [row for row in tokens if row is not None]
    return torch.stack(present).float() if present else None


def _padded(features: Sequence[torch.Tensor | None], length: int) -> torch.Tensor:
    """(L_i, D) of each row -> (B, length, D), zeros behind the end."""
    pad = torch.nn.functional.pad
    rows = [row for row in features if row is not None]
    return torch.stack([pad(row, (0, 0, 0, length - len(row))) for row in rows])


def caption_features(frozen: bool, encoder: CaptionFeatures, *caches: ClipCache | None) -> bool:
    """Whether captions are read from the caches: the text encoder is `frozen` and all caches hold
    its features.

    Raises:
        ValueError: features of another text encoder.
    """
    made_by = [getattr(cache, "text_encoder", None) for cache in caches if cache is not None]
    if not frozen or not all(made_by):
        return False
    fingerprint = encoder.fingerprint()
    if any(other != fingerprint for other in made_by):
        raise ValueError(
            f"the caches hold text features of encoder {made_by[0]}, this model's is "
            f"{fingerprint}: make them again with `avdiff data cache --text`, or without"
        )
    return True


@lru_cache(maxsize=64)
def positions_of(clip: ClipSpec, device: str) -> Positions:
    """Positions of a clip, made once."""
    return Positions.of(clip, device)


def same_shape(clips: TrainingClips, count: int, size: int) -> Iterable[list[int]]:
    """The first `count` clips in batches of equal shape."""
    by_group: dict[BucketKey, list[int]] = {}
    for index, group in enumerate(clips.groups()[:count]):
        by_group.setdefault(group, []).append(index)
    for members in by_group.values():
        yield from (members[i : i + size] for i in range(0, len(members), size))
