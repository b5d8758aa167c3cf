"""What a joint model is told, and what can be computed from it once for all denoising steps.

Shape legend: B batch, P phonemes, M mel frames (10 ms for the presenter), N_v / N_a / N_s tokens of
video, audio and the shared stream, F latent frames, L caption tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

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
        video: (N_v, 3). audio: (N_a, 1). ticks: (N_s, 1). grid: video tokens along (time, rows,
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
        text: (B, 1 + L, D_t) caption features after a learned register. text_mask: (B, 1, 1, 1 + L)
            bool.
        video_phases: RoPE over (seconds, row, column); time_phases: over seconds of video, audio
            and ticks.
        windows: bool masks (1, 1, queries, keys), one per source: video <- (audio, ticks), audio <-
            (video, ticks), shared <- (ticks, video, audio).
        scripts: expanded words for video tokens (B, N_v, D_v) or None, and for audio + ticks (B,
            N_a + N_s, D_a).
        memory: Engram reads by block, for audio tokens and ticks (B, N_a + N_s, D_a).
    """

    text: torch.Tensor
    text_mask: torch.Tensor
    video_rope: torch.Tensor
    video_time_rope: torch.Tensor
    audio_rope: torch.Tensor
    shared_rope: torch.Tensor
    windows: dict[str, tuple[torch.Tensor, ...]]
    video_phonemes: torch.Tensor | None
    audio_phonemes: torch.Tensor | None
    memory: dict[int, MemoryRead] | None
    num_shared: int
    caption_masks: Joint[torch.Tensor] | None = (
        None  # in place of `text_mask` where the branches do not read alike
    )

    def caption_mask(self, modality: str) -> torch.Tensor:
        """What of the caption a branch reads."""
        return (
            self.text_mask if self.caption_masks is None else getattr(self.caption_masks, modality)
        )

    def unread(self, rows: Joint[torch.Tensor]) -> Conditions:
        """The same conditions where a branch reads no caption in `rows` (B,) bool; the register
        stays.
        """
        first = torch.zeros_like(self.text_mask)
        first[..., 0] = True
        return replace(
            self,
            caption_masks=rows.map(lambda r: self.text_mask & (~r[:, None, None, None] | first)),
        )

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Join the batches of one clip's conditions; shorter captions are padded, and the padding
        masked.
        """
        first = parts[0]
        length = max(p.text.shape[1] for p in parts)

        def rows(values: list[Any]) -> Any:
            return None if values[0] is None else torch.cat(values)

        def pad(x: torch.Tensor, axis: int) -> torch.Tensor:
            missing = length - x.shape[axis]
            return F.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, missing)) if missing else x

        memory = None
        if first.memory is not None:
            memory = {
                i: type(r).cat([p.memory[i] for p in parts if p.memory is not None])
                for i, r in first.memory.items()
            }
        return replace(
            first,
            text=rows([pad(p.text, 1) for p in parts]),
            text_mask=rows([pad(p.text_mask, 3) for p in parts]),
            video_phonemes=rows([p.video_phonemes for p in parts]),
            audio_phonemes=rows([p.audio_phonemes for p in parts]),
            memory=memory,
        )

    def narrowed(self, audio: bool, shared: bool) -> Conditions:
        """The same conditions for a forward without the audio branch or without the shared
        stream.
        """
        keep_shared = self.num_shared if shared else 0
        if audio and keep_shared == self.num_shared:
            return self
        tokens = self.windows["audio"][0].shape[2]

        kept = slice(0 if audio else tokens, tokens + keep_shared)
        sound = None if self.audio_phonemes is None else self.audio_phonemes[:, kept]
        memory = self.memory
        if memory is not None:
            memory = {
                i: replace(r, keys=r.keys[:, kept], values=r.values[:, kept])
                for i, r in memory.items()
            }
        return replace(self, audio_phonemes=sound, memory=memory, num_shared=keep_shared)


def same_device(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x where the weight is: an offloaded model rests elsewhere (on "meta" until its own hook
    fetches it).
    """
    return x if weight.is_meta else x.to(weight.device)


MILLISECOND = (
    1e-3  # tolerance of comparisons on the clock: far below a token, far above fp32 rounding
)


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
