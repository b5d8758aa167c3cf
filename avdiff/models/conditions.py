"""What a joint model is told, and what can be computed from it once for all denoising steps.

Shape legend: B batch, P phonemes, M mel frames (10 ms for the presenter), N_v / N_a / N_s tokens of
video, audio and the shared stream, F latent frames, L caption tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from avdiff.latents import Joint

if TYPE_CHECKING:
    from avdiff.clip import ClipSpec
    from avdiff.core.engram import MemoryRead


@dataclass(frozen=True)
class Positions:
    """Where tokens sit: seconds (bin midpoints), video also in pixels; fp32. One grid for a whole
    batch.

    Args:
        video: (N_v, 3). audio: (N_a, 1). shared: (N_s, 1). grid: video tokens along (time, rows,
            columns).
    """

    video: torch.Tensor
    audio: torch.Tensor
    shared: torch.Tensor
    grid: tuple[int, int, int]

    @classmethod
    def of(
        cls, clip: ClipSpec, device: torch.device | str = "cpu", start: float = 0.0
    ) -> Positions:
        """Positions of a clip that begins at `start` seconds."""
        video = clip.video_positions()
        audio = clip.audio_positions()
        shared = clip.shared_positions()
        video[:, 0] += start
        return cls(video, audio + start, shared + start, clip.video_grid).to(device)

    def to(self, device: torch.device | str) -> Positions:
        """Copy on another device."""
        return replace(
            self,
            video=self.video.to(device),
            audio=self.audio.to(device),
            shared=self.shared.to(device),
        )


@dataclass(frozen=True)
class Conditions:
    """Everything that stays the same at all steps; made by `AVTransformer.prepare`.

    Args:
        text: (B, 1 + L, D_t) caption features after a learned register.
        text_mask: (B, 1, 1, 1 + L) bool.
        video_rope: RoPE phases of video tokens over (seconds, row, column).
        video_time_rope: over their seconds alone.
        audio_rope, shared_rope: over the seconds of audio and shared tokens.
        windows: bool masks (1, 1, queries, keys) by reading stream and read stream: video reads
            audio and shared, audio reads video and shared, shared reads all three.
        num_shared: N_s.
        video_phonemes: words on the clock for video tokens (B, N_v, D_v), None for none.
        audio_phonemes: for audio and shared tokens (B, N_a + N_s, D_a), None for none.
        memory: Engram reads by block, for audio and shared tokens (B, N_a + N_s, D_a).
        caption_masks: in place of `text_mask` where the branches do not read alike.
    """

    text: torch.Tensor
    text_mask: torch.Tensor
    video_rope: torch.Tensor
    video_time_rope: torch.Tensor
    audio_rope: torch.Tensor
    shared_rope: torch.Tensor
    windows: Mapping[str, Mapping[str, torch.Tensor]]
    num_shared: int
    video_phonemes: torch.Tensor | None = None
    audio_phonemes: torch.Tensor | None = None
    memory: Mapping[int, MemoryRead] | None = None
    caption_masks: Joint[torch.Tensor] | None = None

    def caption_mask(self, modality: str) -> torch.Tensor:
        """What of the caption a branch reads."""
        if self.caption_masks is None:
            return self.text_mask
        return getattr(self.caption_masks, modality)

    def rope(self, modality: str) -> torch.Tensor:
        """Phases of a branch's self-attention."""
        return self.video_rope if modality == "video" else self.audio_rope

    def time_rope(self, stream: str) -> torch.Tensor:
        """Phases of a stream in cross-attention: its seconds alone."""
        ropes = {
            "video": self.video_time_rope,
            "audio": self.audio_rope,
            "shared": self.shared_rope,
        }
        return ropes[stream]

    def unread(self, rows: Joint[torch.Tensor]) -> Conditions:
        """The same conditions where a branch reads no caption in `rows` (B,) bool; the register
        stays.
        """
        register = torch.zeros_like(self.text_mask)
        register[..., 0] = True

        def masked(row: torch.Tensor) -> torch.Tensor:
            return self.text_mask & (~row[:, None, None, None] | register)

        return replace(self, caption_masks=rows.map(masked))

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Join the batches of one clip's conditions; shorter captions are padded, and the padding
        masked.
        """
        first = parts[0]
        length = max(part.text.shape[1] for part in parts)

        def padded(x: torch.Tensor, dim: int) -> torch.Tensor:
            missing = length - x.shape[dim]
            return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x

        return replace(
            first,
            text=torch.cat([padded(part.text, 1) for part in parts]),
            text_mask=torch.cat([padded(part.text_mask, 3) for part in parts]),
            video_phonemes=_joined([part.video_phonemes for part in parts]),
            audio_phonemes=_joined([part.audio_phonemes for part in parts]),
            memory=_joined_memory([part.memory for part in parts if part.memory is not None]),
        )

    def narrowed(self, audio: bool, shared: bool) -> Conditions:
        """The same conditions for a forward without the audio branch or without the shared
        stream.
        """
        keep_shared = self.num_shared if shared else 0
        if audio and keep_shared == self.num_shared:
            return self
        num_audio = self.windows["audio"]["video"].shape[2]
        kept = slice(0 if audio else num_audio, num_audio + keep_shared)
        phonemes = None if self.audio_phonemes is None else self.audio_phonemes[:, kept]
        memory = self.memory
        if memory is not None:
            memory = {
                layer: replace(read, keys=read.keys[:, kept], values=read.values[:, kept])
                for layer, read in memory.items()
            }
        return replace(self, audio_phonemes=phonemes, memory=memory, num_shared=keep_shared)


def _joined(values: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Batches of one tensor as one; all of them have it or none has."""
    given = [value for value in values if value is not None]
    if len(given) not in (0, len(values)):
        raise ValueError(f"words in {len(given)} of {len(values)} batches: needs all or none")
    return torch.cat(given) if given else None


def _joined_memory(reads: Sequence[Mapping[int, MemoryRead]]) -> dict[int, MemoryRead] | None:
    """Batches of memory reads as one, layer by layer."""
    if not reads:
        return None
    return {
        layer: type(read).cat([by_layer[layer] for by_layer in reads])
        for layer, read in reads[0].items()
    }


def same_device(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x where the weight is: an offloaded model rests elsewhere (on "meta" until its own hook
    fetches it).
    """
    return x if weight.is_meta else x.to(weight.device)


# tolerance of comparisons on the clock: far below a token, far above fp32 rounding
MILLISECOND = 1e-3


def overlap_matrix(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """(T, S) row-stochastic weights that average source bins (midpoints, seconds) into target bins.

    A target takes the source bins whose midpoints lie within half its own spacing, or the nearest
    one.
    """

    def spacing(x: torch.Tensor) -> torch.Tensor:
        return (x[1:] - x[:-1]).median() if len(x) > 1 else torch.full((), 0.08, device=x.device)

    distance = (target[:, None] - source[None, :]).abs()
    reach = torch.maximum(spacing(target), spacing(source)) / 2
    if not len(target):
        return distance
    inside = (distance < reach - MILLISECOND) | (
        distance <= distance.min(dim=1, keepdim=True).values + 1e-6
    )
    return inside.float() / inside.sum(dim=1, keepdim=True)


def window_mask(queries: torch.Tensor, keys: torch.Tensor, seconds: float | None) -> torch.Tensor:
    """(1, 1, Q, K) bool: keys within `seconds` of the query, and always the nearest one; None lets
    all through.
    """
    distance = (queries[:, None] - keys[None, :]).abs()
    if seconds is None or not distance.numel():
        return torch.ones_like(distance, dtype=torch.bool)[None, None]
    nearest = distance <= distance.min(dim=1, keepdim=True).values + 1e-6
    return ((distance <= seconds + MILLISECOND) | nearest)[None, None]


def cross_windows(
    positions: Positions, seconds: float | None
) -> dict[str, dict[str, torch.Tensor]]:
    """`Conditions.windows`: what each stream may see of those that it reads, within `seconds`; all
    of it for None, and the shared stream always sees the whole of itself.
    """
    video, audio, shared = (x[:, 0] for x in (positions.video, positions.audio, positions.shared))
    return {
        "video": {
            "audio": window_mask(video, audio, seconds),
            "shared": window_mask(video, shared, seconds),
        },
        "audio": {
            "video": window_mask(audio, video, seconds),
            "shared": window_mask(audio, shared, seconds),
        },
        "shared": {
            "shared": window_mask(shared, shared, None),
            "video": window_mask(shared, video, seconds),
            "audio": window_mask(shared, audio, seconds),
        },
    }
