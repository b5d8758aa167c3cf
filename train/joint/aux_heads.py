"""Representation heads: from the middle block, say which phoneme sounds and which viseme shows.
Labels are exact.

A corpus that was drawn from timed phones knows both at every moment, so no foreign network has to
be matched (as REPA, arXiv 2410.06940, does with one); the heads are dropped at export. Off by
default.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from avdiff.core.modulation import rms_norm
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.phone import ONSET_ID, inventory
from avdiff.phonetics.track import PhonemeTrack
from avdiff.phonetics.visemes import VISEMES, viseme_of

IGNORED = -100  # cross_entropy's own


class Heads(nn.Module):
    """Linear readers of one block's output.

    Args:
        transformer: whose widths and clock they follow. phoneme_weight, viseme_weight: of the two
            losses; 0 is off.
    """

    def __init__(
        self, transformer: AVTransformer, phoneme_weight: float, viseme_weight: float
    ) -> None:
        super().__init__()
        c = transformer.config
        self.weights = {"phoneme": phoneme_weight, "viseme": viseme_weight}
        self.mels = c.mels_per_token
        self.layer = (len(transformer.transformer_blocks) - 1) // 2
        self.phoneme = nn.Linear(c.audio_dim, c.num_phonemes) if phoneme_weight else None
        self.viseme = nn.Linear(c.video_dim, len(VISEMES)) if viseme_weight else None

    def forward(
        self,
        video: torch.Tensor | None,
        audio: torch.Tensor | None,
        track: PhonemeTrack,
        positions: Positions,
    ) -> dict[str, torch.Tensor]:
        """Cross-entropy of each head, scalars; rows without a script do not count. video (B, N_v,
        D_v), audio with ticks behind it (B, >= N_a, D_a): outputs of block `layer`.
        """
        losses = {}
        if self.phoneme is not None and audio is not None:
            said = self.phoneme(rms_norm(audio[:, : len(positions.audio)]))
            losses["phoneme"] = _entropy(said, phoneme_labels(track, self.mels))
        if self.viseme is not None and video is not None:
            frames = video.unflatten(1, (positions.grid[0], -1)).mean(
                2
            )  # (B, T, D): a mouth is no single token
            losses["viseme"] = _entropy(
                self.viseme(rms_norm(frames)), viseme_labels(track, positions)
            )
        return losses

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """Their weighted sum."""
        return torch.stack([self.weights[name] * loss for name, loss in losses.items()]).sum()


def phoneme_labels(track: PhonemeTrack, mels: int) -> torch.Tensor:
    """(B, N_a) phoneme at the middle of each audio token."""
    return _masked(track.phonemes.gather(1, track.frame_to_phone[:, mels // 2 :: mels]), track)


def viseme_labels(track: PhonemeTrack, positions: Positions) -> torch.Tensor:
    """(B, T) viseme at the middle of each latent frame; of a diphthong the first."""
    times = positions.video[:: len(positions.video) // positions.grid[0], 0]  # (T,) seconds
    length = positions.audio[-1, 0] + (positions.audio[1, 0] - positions.audio[0, 0]) / 2
    place = (
        (times / length * track.frame_to_phone.shape[1])
        .long()
        .clamp(max=track.frame_to_phone.shape[1] - 1)
    )
    phonemes = track.phonemes.gather(1, track.frame_to_phone[:, place])
    return _masked(_viseme_of_id().to(phonemes.device)[phonemes], track)


def _masked(labels: torch.Tensor, track: PhonemeTrack) -> torch.Tensor:
    return labels.masked_fill(~track.present[:, None], IGNORED)


def _entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    total = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / (labels != IGNORED).sum().clamp(min=1)


@cache
def _viseme_of_id() -> torch.Tensor:
    known = [VISEMES.index(viseme_of(symbol)[0]) for symbol in inventory()[0]]
    return torch.tensor(known + [IGNORED] * (ONSET_ID + 1 - len(known)))  # a stroke shows no mouth
