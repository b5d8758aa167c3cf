"""Synchformer as the DeSync metric: by how many seconds sound and pictures seem apart, speech or
not.

Iashin et al. 2024 (arXiv 2401.16423), v-iashin/Synchformer (MIT): 16 pictures of 224 x 224 at 25
fps and their 0.64 s of sound at 16 kHz make a segment, a new one starts every 0.32 s, 14 of them
are a window of 4.8 s, and the network says which of 21 offsets, -2 to 2 s in steps of 0.2 s, the
window has. DeSync as hkchengrex/av-benchmark computes it for MMAudio (README.md;
av_bench/evaluate.py):

    DeSync = mean over clips and over the first and the last window of |offset of the likeliest
    class|

Its pictures are resized to 224 pixels on the shorter side and cut at the centre; upstream's
example.py cuts 224 out of 256. Upstream calls an offset positive when the sound is *early*; here,
as everywhere in this package, positive: audio late. The released weights were not at hand when this
was written: names, shapes and formulas were checked against upstream's source and the size of the
published file, published numbers were not reproduced.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchaudio.transforms import MelSpectrogram

from avdiff.evaluation.lipsync.synchformer_network import (
    BANDS,
    CLASSES,
    FRAMES,
    PICTURES,
    RELEASED,
    SEGMENTS,
    Size,
    Synchformer,
)
from avdiff.evaluation.lipsync.syncnet import read_tensors
from avdiff.evaluators.load import SyncCurve
from avdiff.pixels import to_model

FPS = 25
RATE = 16_000
STEP = 8  # pictures from one segment to the next
# 10240 and 5120
SAMPLES = PICTURES * RATE // FPS
SAMPLE_STEP = STEP * RATE // FPS
WINDOW = (PICTURES + (SEGMENTS - 1) * STEP) / FPS  # 4.8 s
# of AST's log-mel over AudioSet (configs/sync.yaml)
MEAN = -4.2677393
STD = 4.5689974
NEEDS = (
    "needs Synchformer's state dict (.safetensors, or synchformer_state_dict.pth); upstream's own "
    ".pt must be "
    "converted first: see avdiff eval lipsync --help"
)
LAGS = np.linspace(-2, 2, CLASSES)  # s; ours: positive when the audio is late
# of the released state dict: a 2D embedding that upstream only counts with
UNUSED = "vfeat_extractor.patch_embed."


def load_synchformer(path: str | Path, size: Size = RELEASED) -> Synchformer:
    """The network with weights from a file that holds the state dict alone: .safetensors, or one of
    tensors for torch.

    MMAudio's synchformer_state_dict.pth is such a file. Upstream's <experiment>.pt is not, it holds
    its options too.

    Raises:
        ValueError: no such file, or no weights of Synchformer in it.
    """
    state = read_tensors(path, "Synchformer", NEEDS)
    with torch.device("meta"):
        network = Synchformer(size)
    try:
        used = {name: tensor for name, tensor in state.items() if not name.startswith(UNUSED)}
        network.load_state_dict(used, assign=True)
    except Exception as error:  # whatever a foreign file provokes
        reason = " ".join(str(error).split())[:240]
        raise ValueError(
            f"weights={path}: no weights of Synchformer ({reason}); {NEEDS}"
        ) from error
    return network.float().eval().requires_grad_(False)


# ----------------------------------------------------------------------------------------- segments
def segment_count(pictures: int, samples: int) -> int:
    """Whole segments in so many pictures at 25 fps and samples at 16 kHz; 0 or less: not even
    one.
    """
    return min((pictures - PICTURES) // STEP, (samples - SAMPLES) // SAMPLE_STEP) + 1


def window_starts(segments: int) -> list[int]:
    """First segments of the judged windows: those of the first and of the last 14, once if they are
    the same.
    """
    return sorted({0, segments - SEGMENTS})


def prepare_picture(picture: np.ndarray, side: int) -> Tensor:
    """uint8 (H, W, 3) -> (3, side, side) in [-1, 1]: shorter side to `side`, bicubic, then the
    centre.

    av-benchmark does so with torchvision, whose kernel for bytes is Pillow's.
    """
    height, width = (side * length // min(picture.shape[:2]) for length in picture.shape[:2])
    sized = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    top = round((height - side) / 2)
    left = round((width - side) / 2)
    cut = sized[top : top + side, left : left + side].copy()
    return to_model(cut).permute(2, 0, 1)


@torch.no_grad()
def see_segments(
    network: Synchformer, pictures: Iterable[tuple[int, np.ndarray]], wanted: set[int]
) -> dict[int, Tensor]:
    """Features (8, D) of the wanted segments, from numbered pictures uint8 (H, W, 3) at 25 fps in
    their order.
    """
    kept: deque[Tensor] = deque(maxlen=PICTURES)
    found: dict[int, Tensor] = {}
    needed = {STEP * segment + i for segment in wanted for i in range(PICTURES)}
    for number, picture in pictures:
        if number not in needed:
            continue
        kept.append(prepare_picture(picture, network.size.side))
        segment, rest = divmod(number - PICTURES + 1, STEP)
        if rest == 0 and segment in wanted:
            found[segment] = network.see(torch.stack(list(kept), dim=1)[None])[0]
    return found


@cache
def _mel() -> MelSpectrogram:
    return MelSpectrogram(RATE, n_fft=1024, win_length=400, hop_length=160, n_mels=BANDS)


def spectrogram(waves: Tensor) -> Tensor:
    """Sound of segments (B, 10240) in [-1, 1] -> (B, 128, 66): 65 frames of log-mel and one of
    zeros, normalized.
    """
    mel = torch.log(_mel()(waves) + 1e-6)
    return (F.pad(mel, (0, FRAMES - mel.shape[-1])) - MEAN) / (2 * STD)


@torch.no_grad()
def hear_segments(network: Synchformer, wave: Tensor, wanted: Iterable[int]) -> dict[int, Tensor]:
    """Features (6, D) of the wanted segments of sound (S,) in [-1, 1] at 16 kHz."""
    found = {}
    for segment in wanted:
        start = segment * SAMPLE_STEP
        found[segment] = network.hear(spectrogram(wave[None, start : start + SAMPLES]))[0]
    return found


# ------------------------------------------------------------------------------------------ windows
@dataclass(frozen=True)
class OffsetCurve(SyncCurve):
    """Probability of each lag, the mean over windows. The offset stays on the classes, 200 ms
    apart.

    Args:
        desync: mean over windows of the likeliest lag's size, seconds.
    """

    desync: float

    @property
    def offset(self) -> float:
        """The likeliest lag, seconds; positive: audio late."""
        return float(self.lags[np.argmax(self.scores)])


def offset_curve(logits: Tensor) -> OffsetCurve:
    """Logits of windows (W, 21) in upstream's order, whose class i is sound that is -2 + 0.2 i s
    early.
    """
    late = logits.double().flip(-1)
    desync = np.abs(LAGS[late.argmax(dim=-1).numpy()]).mean()
    return OffsetCurve(
        LAGS, late.softmax(dim=-1).mean(dim=0).numpy(), WINDOW * len(late), float(desync)
    )


@torch.no_grad()
def compare_windows(
    network: Synchformer,
    seen: dict[int, Tensor],
    audio_features: dict[int, Tensor],
    starts: list[int],
) -> Tensor:
    """Logits (W, 21) of the windows that begin with the segments `starts`."""
    shown, sounding = (
        torch.stack([torch.stack([side[start + i] for i in range(SEGMENTS)]) for start in starts])
        for side in (seen, audio_features)
    )  # (W, 14, 8, D) and (W, 14, 6, D)
    return network.compare(shown, sounding)
