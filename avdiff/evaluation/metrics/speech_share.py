"""How much of a sound is speech: silero-vad where it is installed (`eval` extra, MIT), else
loudness alone.

speech_mask(audio, 24000)       # bool, one for each 32 ms
detector()                      # which of both, for the header of a report
"""

from __future__ import annotations

import importlib.util
import threading
import warnings
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from avdiff.evaluators.load import as_waveform

RATE = 16_000
STEP = 512  # samples of a decision: what silero-vad reads at once
THRESHOLD = 0.5  # silero-vad's own
FLOOR_DB, RANGE_DB = (
    -50.0,
    30.0,
)  # loudness: above the floor (dBFS), and so near to the loudest tenth
_LOCK = threading.Lock()  # the network keeps a state from one call to the next


def detector() -> str:
    """Name and version of the detector in use."""
    return (
        f"silero-vad {version('silero-vad')}"
        if _installed()
        else "loudness alone (silero-vad is not installed)"
    )


def speech_mask(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Whether somebody speaks in each 32 ms of audio (S,) or (channels, S): (T,) bool.

    Without silero-vad any sound that is loud enough counts, music too.

    Raises:
        ValueError: as `as_waveform`.
    """
    wave = as_waveform(audio, sample_rate, RATE)
    wave = torch.nn.functional.pad(wave, (0, -len(wave) % STEP)).clamp(-1, 1)
    blocks = wave.view(-1, STEP)
    if not _installed():
        return by_loudness(blocks.numpy())
    with _LOCK, torch.no_grad():
        model = _silero()
        model.reset_states()
        return np.array([float(model(block, RATE)) > THRESHOLD for block in blocks])


def by_loudness(blocks: np.ndarray) -> np.ndarray:
    """Blocks (T, samples) that are above the floor and within `RANGE_DB` of the loudest tenth."""
    level = 10 * np.log10(np.square(blocks, dtype=np.float64).mean(axis=1) + 1e-12)
    return (level > FLOOR_DB) & (level > np.quantile(level, 0.9) - RANGE_DB)


def _installed() -> bool:
    return importlib.util.find_spec("silero_vad") is not None


@cache
def _silero() -> Any:
    threads = torch.get_num_threads()
    from silero_vad import load_silero_vad

    torch.set_num_threads(threads)  # the package sets one thread for everybody when it is imported
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch announces the end of its script format, in which the network ships
        return load_silero_vad()
