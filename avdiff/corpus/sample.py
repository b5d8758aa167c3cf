"""`ClipSample`: what every producer of clips hands over, the drawn corpus and folders of real clips
alike.
"""

from __future__ import annotations

from fractions import Fraction
from typing import TypedDict

import numpy as np
import torch

from avdiff.phonetics.phone import Phone


class ClipSample(TypedDict, total=False):
    """One clip with everything that is known of it; a key is absent where there is nothing.

    Args:
        index, name: which one of its dataset. split: train, val, test or test_voices.
        kind: "speech" and "event" of the drawn corpus, "clip" of a folder.
        video: (F, H, W, 3) uint8. audio: (C, samples) float32 in [-1, 1]. audio_clean: the same
            before it was degraded. fps: frames a second. sample_rate: in Hz.
        caption: one of `captions`, with words to speak in double quotes. language: its code.
        text: the spoken words, "" without any. phones: timed, they tile the clip; () without words.
        contacts: seconds at which something strikes. attributes: what is to be seen, by name.
        mouth: (F, 6), lip_points: (F, K, 2) float32 at the middle of each frame, of drawn faces.
        video_mask: (F, H, W) bool. audio_mask: (samples,) bool. reference_video, reference_audio:
            as video and audio.
    """

    index: int
    name: str
    split: str
    kind: str
    video: torch.Tensor
    audio: torch.Tensor
    audio_clean: torch.Tensor
    fps: Fraction
    sample_rate: int
    caption: str
    captions: list[str]
    language: str
    text: str
    phones: tuple[Phone, ...]
    contacts: tuple[float, ...]
    attributes: dict[str, str]
    mouth: np.ndarray
    lip_points: np.ndarray
    video_mask: torch.Tensor
    audio_mask: torch.Tensor
    reference_video: torch.Tensor
    reference_audio: torch.Tensor
