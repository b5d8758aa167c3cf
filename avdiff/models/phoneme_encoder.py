"""Phonemes on the clock: from a script to one feature for each audio token, shared tick and latent
frame.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from avdiff.models.conditions import Positions, overlap_matrix, same_device
from avdiff.phonetics.phone import ONSET_ID
from avdiff.phonetics.track import PhonemeTrack


class ConvBlock(nn.Module):
    """Residual depthwise-separable convolution over phonemes (ConvNeXt order: depthwise, norm,
    expand, contract).
    """

    def __init__(self, dim: int, kernel: int = 5) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(dim, dim, kernel, padding=kernel // 2, groups=dim)
        self.expand = nn.Linear(dim, 2 * dim)
        self.contract = nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, P, D) -> (B, P, D)."""
        h = self.depthwise(x.transpose(1, 2)).transpose(1, 2)
        h = F.rms_norm(h, h.shape[-1:])
        return x + self.contract(F.gelu(self.expand(h)))


class PhonemeEncoder(nn.Module):
    """Encodes phonemes in context and lays them on the clock.

    Each audio token sees the phonemes of its own mel frames (their order kept by concatenation),
    and for each frame how far into the phoneme it is and how long the phoneme lasts.

    Args:
        onset_track: the script may hold strokes of events (number `ONSET_ID`); these the video
            branch always reads.
    """

    def __init__(
        self,
        num_phonemes: int,
        num_stress_tones: int,
        dim: int,
        mels_per_token: int,
        audio_dim: int,
        video_dim: int,
        blocks: int = 3,
        onset_track: bool = False,
    ) -> None:
        super().__init__()
        self.mels_per_token = mels_per_token
        self.onset_track = onset_track
        self.symbol = nn.Embedding(num_phonemes, dim)
        self.stress_tone = nn.Embedding(num_stress_tones, dim)
        self.blocks = nn.ModuleList(ConvBlock(dim) for _ in range(blocks))
        self.to_audio = nn.Linear(mels_per_token * (dim + 2), audio_dim, bias=False)
        self.to_shared = nn.Linear(mels_per_token * (dim + 2), audio_dim, bias=False)
        self.to_video = nn.Linear(mels_per_token * (dim + 2), video_dim, bias=False)

    def forward(
        self, track: PhonemeTrack, positions: Positions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """-> features for audio tokens and ticks (B, N_a + N_s, D_a), and for video tokens (B, N_v,
        D_v) or None.
        """
        x = self.symbol(same_device(self.symbol.weight, track.phonemes))  # (B, P, D)
        x = x + self.stress_tone(same_device(self.stress_tone.weight, track.stress_tones))
        track = track.to(x.device)
        positions = positions.to(x.device)
        # Beyond its end a row shows the convolutions zeros, as their own padding would: a clip
        # sounds the same whatever its neighbours in a batch say.
        filled = ~track.own_phonemes()[..., None]
        for block in self.blocks:
            x = block(x.masked_fill(filled, 0))
        seconds = positions.audio[:, 0]
        per_token = self._on_clock(x, track.frames, track.present)  # (B, N_a, mels * (D + 2))
        shared = overlap_matrix(positions.shared[:, 0], seconds).to(x) @ per_token
        sound = torch.cat([self.to_audio(per_token), self.to_shared(shared)], dim=1)
        frames = track.video_frame_to_phone
        present = track.present
        if self.onset_track:  # lips follow the sound, but strikers see their strokes
            struck = present & (track.phonemes == ONSET_ID).any(1)
            present = struck if frames is None else present
            frames = (
                track.frames
                if frames is None
                else torch.where(struck[:, None], track.frames, frames)
            )
        if frames is None:
            return sound, None
        if frames is not track.frames or present is not track.present:
            per_token = self._on_clock(x, frames, present)
        _, rows, columns = positions.grid
        frame_seconds = positions.video[:: rows * columns, 0]
        video = self.to_video(
            overlap_matrix(frame_seconds, seconds).to(x) @ per_token
        )  # (B, F, D_v)
        return sound, video.repeat_interleave(rows * columns, dim=1)

    def _on_clock(
        self, x: torch.Tensor, frames: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Gather phoneme features (B, P, D) by mel frame (B, M) and group them by audio token."""
        features = x.gather(1, frames[..., None].expand(-1, -1, x.shape[-1]))  # (B, M, D)
        phase = phase_in_phoneme(frames, x.shape[1])
        features = torch.cat([features, phase.to(features.dtype)], dim=-1)
        features = features * present[:, None, None].to(features.dtype)
        return rearrange(features, "b (n m) d -> b n (m d)", m=self.mels_per_token)


def phase_in_phoneme(frames: torch.Tensor, num_phonemes: int) -> torch.Tensor:
    """(B, M) phoneme index below `num_phonemes` of each frame -> (B, M, 2): place within the
    phoneme in (0, 1), log2 of its frames / 4.
    """
    batch, count = frames.shape
    order = torch.arange(count, device=frames.device).expand(batch, -1)
    none = frames.new_zeros(batch, num_phonemes)
    lengths = none.scatter_add(1, frames, torch.ones_like(frames)).gather(1, frames).float()
    latest = torch.full_like(none, count)
    first = latest.scatter_reduce(1, frames, order, "amin").gather(1, frames)
    place = (order - first + 0.5) / lengths
    return torch.stack([place, lengths.log2() / 4], dim=-1)
