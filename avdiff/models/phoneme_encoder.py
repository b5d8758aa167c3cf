"""Phonemes on the clock: from a script to one feature for each audio token, shared token and latent
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
        """-> features for audio and shared tokens (B, N_a + N_s, D_a), and for video tokens (B,
        N_v, D_v) or None.
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
        # (B, N_a, mels * (D + 2))
        per_token = self._on_clock(x, track.frame_to_phone, track.present)
        shared = overlap_matrix(positions.shared[:, 0], seconds).to(x) @ per_token
        sound = torch.cat([self.to_audio(per_token), self.to_shared(shared)], dim=1)
        frame_to_phone, present = self._seen(track)
        if frame_to_phone is None:
            return sound, None
        if frame_to_phone is not track.frame_to_phone or present is not track.present:
            per_token = self._on_clock(x, frame_to_phone, present)
        _, rows, columns = positions.grid
        frame_seconds = positions.video[:: rows * columns, 0]
        # (B, F, D_v)
        video = self.to_video(overlap_matrix(frame_seconds, seconds).to(x) @ per_token)
        return sound, video.repeat_interleave(rows * columns, dim=1)

    def _seen(self, track: PhonemeTrack) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the video branch reads: phoneme of each frame (B, M) or None, and in which rows (B,)
        bool. Lips follow the sound, but mallets see their strokes, and unwarped.
        """
        warped = track.video_frame_to_phone
        if not self.onset_track:
            return warped, track.present
        struck = track.present & (track.phonemes == ONSET_ID).any(1)
        if warped is None:
            return track.frame_to_phone, struck
        return torch.where(struck[:, None], track.frame_to_phone, warped), track.present

    def _on_clock(
        self, x: torch.Tensor, frame_to_phone: torch.Tensor, present: torch.Tensor
    ) -> torch.Tensor:
        """Gather phoneme features (B, P, D) by mel frame (B, M) and group them by audio token."""
        index = frame_to_phone[..., None].expand(-1, -1, x.shape[-1])
        features = x.gather(1, index)  # (B, M, D)
        phase = phase_in_phoneme(frame_to_phone, x.shape[1])
        features = torch.cat([features, phase.to(features.dtype)], dim=-1)
        features = features * present[:, None, None].to(features.dtype)
        return rearrange(features, "b (n m) d -> b n (m d)", m=self.mels_per_token)


def phase_in_phoneme(frame_to_phone: torch.Tensor, num_phonemes: int) -> torch.Tensor:
    """(B, M) phoneme index below `num_phonemes` of each frame -> (B, M, 2): place within the
    phoneme in (0, 1), log2 of its frames / 4.
    """
    batch, count = frame_to_phone.shape
    order = torch.arange(count, device=frame_to_phone.device).expand(batch, -1)
    none = frame_to_phone.new_zeros(batch, num_phonemes)
    frames_of_phone = none.scatter_add(1, frame_to_phone, torch.ones_like(frame_to_phone))
    lengths = frames_of_phone.gather(1, frame_to_phone).float()
    latest = torch.full_like(none, count)
    first_of_phone = latest.scatter_reduce(1, frame_to_phone, order, "amin")
    first = first_of_phone.gather(1, frame_to_phone)
    place = (order - first + 0.5) / lengths
    return torch.stack([place, lengths.log2() / 4], dim=-1)
