"""From timed phones to the tensors that the transformer reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch.nn import functional as F

from avdiff.clip import ClipSpec
from avdiff.phonetics.phone import SILENCE, Phone, phone_id


@dataclass(frozen=True)
class PhonemeTrack:
    """Spoken words on the clock.

    Args:
        phonemes: (B, P) inventory ids, 0 is silence.
        stress_tones: (B, P) stress and tone marks, 0 is none.
        frame_to_phone: (B, M) which phoneme sounds in each mel frame, an index into P.
        present: (B,) bool, False where a sample has no script (sounds, or text dropout).
        video_frame_to_phone: as `frame_to_phone` for the video branch, warped or not; None keeps
            the script from the video branch.
        phoneme_mask: (B, P) bool, True for a row's own phonemes (its trailing silence among them),
            False where it is only filled up to its neighbours' length; None where all are its own.
    """

    phonemes: torch.Tensor
    stress_tones: torch.Tensor
    frame_to_phone: torch.Tensor
    present: torch.Tensor
    video_frame_to_phone: torch.Tensor | None = None
    phoneme_mask: torch.Tensor | None = None

    def own_phonemes(self) -> torch.Tensor:
        """(B, P) bool: `phoneme_mask`, spelled out."""
        if self.phoneme_mask is None:
            return torch.ones_like(self.phonemes, dtype=torch.bool)
        return self.phoneme_mask

    def to(self, device: torch.device | str) -> PhonemeTrack:
        """Copy on another device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: value.to(device) for name, value in values.items() if value is not None}
        return replace(self, **moved)

    def without(self) -> PhonemeTrack:
        """The same batch with no words: what the unconditional guidance pass sees."""
        return replace(self, present=torch.zeros_like(self.present))

    @staticmethod
    def cat(tracks: Sequence[PhonemeTrack]) -> PhonemeTrack:
        """Join batches of clips with one number M of mel frames; rows with fewer phonemes are
        filled up.

        Raises:
            ValueError: the video branch has a script in some of the batches only.
        """
        width = max(track.phonemes.shape[1] for track in tracks)

        def filled(x: torch.Tensor) -> torch.Tensor:
            return F.pad(x, (0, width - x.shape[1]))

        seen = [t.video_frame_to_phone for t in tracks if t.video_frame_to_phone is not None]
        if len(seen) not in (0, len(tracks)):
            raise ValueError(
                f"video_frame_to_phone: given in {len(seen)} of {len(tracks)} batches; needs all "
                "or none"
            )
        return PhonemeTrack(
            phonemes=torch.cat([filled(t.phonemes) for t in tracks]),
            stress_tones=torch.cat([filled(t.stress_tones) for t in tracks]),
            frame_to_phone=torch.cat([t.frame_to_phone for t in tracks]),
            present=torch.cat([t.present for t in tracks]),
            video_frame_to_phone=torch.cat(seen) if seen else None,
            phoneme_mask=torch.cat([filled(t.own_phonemes()) for t in tracks]),
        )


def track_from_phones(
    phones: Sequence[Sequence[Phone]],
    clip: ClipSpec,
    video_warps: Sequence[np.ndarray] | None = None,
    to_video: bool = False,
) -> PhonemeTrack:
    """Lay timed phones of B clips on the clip's mel frames.

    Args:
        phones: for each clip, phones in order with start and end in seconds; an empty list is a
            clip without words.
        video_warps: for each clip, (M,) seconds to add to the video branch's script; implies
            `to_video`.
        to_video: let the video branch read the script too (a clip without sound, or half of joint
            training).

    Returns:
        Script with phonemes padded to one length; silence fills what no phone covers.
    """
    middles = (np.arange(clip.mel_frames) + 0.5) * (clip.clock.mel_hop / clip.sample_rate)
    rows = [_with_silence(p, float(middles[-1]) + 1.0) for p in phones]
    width = max(len(row) for row in rows)
    ids = np.zeros((len(rows), width), dtype=np.int64)
    stress_tones = np.zeros_like(ids)
    own = np.zeros(ids.shape, dtype=bool)
    frames = []
    video = []
    for i, row in enumerate(rows):
        ids[i, : len(row)] = [phone_id(p.symbol) for p in row]
        stress_tones[i, : len(row)] = [p.stress_tone for p in row]
        own[i, : len(row)] = True
        starts = np.array([p.start for p in row])
        frames.append(_index_at(starts, middles))
        if video_warps is not None:
            video.append(_index_at(starts, middles + video_warps[i]))
    frame_to_phone = torch.from_numpy(np.stack(frames))
    seen = frame_to_phone if to_video else None
    if video_warps is not None:
        seen = torch.from_numpy(np.stack(video))
    return PhonemeTrack(
        phonemes=torch.from_numpy(ids),
        stress_tones=torch.from_numpy(stress_tones),
        frame_to_phone=frame_to_phone,
        present=torch.tensor([len(p) > 0 for p in phones]),
        video_frame_to_phone=seen,
        phoneme_mask=torch.from_numpy(own),
    )


def _index_at(starts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Which phone sounds at each time: the last that has started."""
    return np.clip(np.searchsorted(starts, times, side="right") - 1, 0, len(starts) - 1)


def _with_silence(phones: Sequence[Phone], end: float) -> list[Phone]:
    """Phones with silence put into every gap of over 5 ms, from 0 to `end`."""
    row: list[Phone] = []
    now = 0.0
    for phone in phones:
        if phone.start > now + 0.005:
            row.append(Phone(SILENCE, now, phone.start, 0))
        row.append(phone)
        now = phone.end
    if now < end:
        row.append(Phone(SILENCE, now, end, 0))
    return row


def smooth_warp(clip: ClipSpec, rng: np.random.Generator, seconds: float = 0.08) -> np.ndarray:
    """(M,) smooth random shifts of at most `seconds`: the video branch shall not trust the script
    over the sound.
    """
    knots = max(3, round(float(clip.seconds) * 1.5))
    values = rng.uniform(-seconds, seconds, knots)
    return np.interp(np.linspace(0, knots - 1, clip.mel_frames), np.arange(knots), values)
