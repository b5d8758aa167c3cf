"""From timed phones to the tensors that the transformer reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from avdiff.clip import ClipSpec
from avdiff.models.conditions import Script
from avdiff.phonetics.phone import phone_id
from avdiff.phonetics.visemes import Phone


def script_from_phones(
    phones: Sequence[Sequence[Phone]],
    clip: ClipSpec,
    video_warps: Sequence[np.ndarray] | None = None,
    to_video: bool = False,
) -> Script:
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
    marks = np.zeros_like(ids)
    frames = []
    video = []
    for i, row in enumerate(rows):
        ids[i, : len(row)] = [phone_id(p.symbol) for p in row]
        marks[i, : len(row)] = [p.mark for p in row]
        starts = np.array([p.start for p in row])
        frames.append(_index_at(starts, middles))
        video.append(
            frames[-1] if video_warps is None else _index_at(starts, middles + video_warps[i])
        )
    sounding = torch.from_numpy(np.stack(frames))
    seen = (
        torch.from_numpy(np.stack(video))
        if video_warps is not None
        else sounding
        if to_video
        else None
    )
    return Script(
        torch.from_numpy(ids),
        torch.from_numpy(marks),
        sounding,
        torch.tensor([len(p) > 0 for p in phones]),
        seen,
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
            row.append(Phone("", now, phone.start, 0))
        row.append(phone)
        now = phone.end
    if now < end:
        row.append(Phone("", now, end, 0))
    return row


def smooth_warp(clip: ClipSpec, rng: np.random.Generator, seconds: float = 0.08) -> np.ndarray:
    """(M,) smooth random shifts of at most `seconds`: the video branch shall not trust the script
    over the sound.
    """
    knots = max(3, round(float(clip.seconds) * 1.5))
    values = rng.uniform(-seconds, seconds, knots)
    return np.interp(np.linspace(0, knots - 1, clip.mel_frames), np.arange(knots), values)
