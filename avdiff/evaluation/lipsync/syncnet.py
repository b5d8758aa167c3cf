"""SyncNet as the papers use it (Chung & Zisserman 2016), for LSE-C, LSE-D and offsets that compare
with theirs.

Network, MFCCs and crops follow the authors' Python port; its weights are not ours to ship. Five
pictures of 224 x 224 at 25 fps against 0.2 s of sound; window i of the lips is compared with window
i + l of the sound, and

    D(l) = mean over i of ||F_v(i) - F_a(i + l)||,   LSE-D = min D,   LSE-C = median D - min D,   l
    in [-15, 15].

Both LSE values are those of the *best* lag: a clip that is out of sync can have perfect ones, so
D(0) is reported too. Shape legend: B windows, N windows of a clip, E = 1024.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.fft import dct
from scipy.ndimage import median_filter
from torch import Tensor, nn

FPS = 25
RATE = 16_000
SIDE = 224
# of a window; MFCCs come 100 a second
PICTURES = 5
MFCC_STEPS = 20
COEFFICIENTS = 13
MFCC_PER_PICTURE = 4
CROP_SCALE = 0.40  # margin around a face, in halves of its larger side
MEDIAN = 13  # pictures over which places and sizes of a face are smoothed
VSHIFT = 15  # lags each way in the port's command line


class SyncNet(nn.Module):
    """The two towers, with the parameter names of the port, so that its weight file loads as it
    is.
    """

    def __init__(self, embedding: int = 1024) -> None:
        super().__init__()
        self.embedding = embedding
        self.netcnnaud = nn.Sequential(
            *_stage(nn.Conv2d(1, 64, 3, padding=1)),
            nn.MaxPool2d(1, 1),
            *_stage(nn.Conv2d(64, 192, 3, padding=1)),
            nn.MaxPool2d(3, (1, 2)),
            *_stage(nn.Conv2d(192, 384, 3, padding=1)),
            *_stage(nn.Conv2d(384, 256, 3, padding=1)),
            *_stage(nn.Conv2d(256, 256, 3, padding=1)),
            nn.MaxPool2d(3, 2),
            *_stage(nn.Conv2d(256, 512, (5, 4))),
        )
        self.netfcaud, self.netfclip = (
            nn.Sequential(
                nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, embedding)
            )
            for _ in range(2)
        )
        self.netcnnlip = nn.Sequential(
            *_stage(nn.Conv3d(3, 96, (5, 7, 7), (1, 2, 2))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_stage(nn.Conv3d(96, 256, (1, 5, 5), (1, 2, 2), (0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2), (0, 1, 1)),
            *_stage(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_stage(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            *_stage(nn.Conv3d(256, 256, (1, 3, 3), padding=(0, 1, 1))),
            nn.MaxPool3d((1, 3, 3), (1, 2, 2)),
            *_stage(nn.Conv3d(256, 512, (1, 6, 6))),
        )

    def see(self, pictures: Tensor) -> Tensor:
        """A film (1, 3, F, 224, 224), blue green red, 0 to 255 -> its windows of five pictures (F -
        4, E).

        Only the first layer sees several pictures, and without padding: all windows come out of one
        pass.
        """
        windows = self.netcnnlip(pictures)  # (1, 512, F - 4, 1, 1)
        return self.netfclip(windows[0, :, :, 0, 0].T)

    def hear(self, windows: Tensor) -> Tensor:
        """MFCCs (B, 1, 13, 20) -> (B, E)."""
        return self.netfcaud(self.netcnnaud(windows).flatten(1))


def _stage(layer: nn.Conv2d | nn.Conv3d) -> tuple[nn.Module, nn.Module, nn.Module]:
    norm = nn.BatchNorm2d if isinstance(layer, nn.Conv2d) else nn.BatchNorm3d
    return layer, norm(layer.out_channels), nn.ReLU()


def load_syncnet(path: str | Path) -> SyncNet:
    """The network with weights from a .safetensors file, or from the port's own file, of which only
    tensors are read.

    Raises:
        ValueError: no such file, or no weights of SyncNet in it.
    """
    state = read_tensors(
        path, "SyncNet", "needs SyncNet's weights (.safetensors, or syncnet_v2.model)"
    )
    try:
        network = SyncNet()
        network.load_state_dict(state)
    except Exception as error:  # whatever a foreign file provokes
        raise ValueError(
            f"weights={path}: no weights of SyncNet ({str(error).splitlines()[0]})"
        ) from error
    return network.eval().requires_grad_(False)


def read_tensors(path: str | Path, name: str, needs: str) -> Any:
    """What a .safetensors file or one of torch holds; of the latter only tensors and plain
    containers are read.

    Args:
        name: of the network, and what it `needs`, for the message.

    Raises:
        ValueError: no such file, or one with anything else in it.
    """
    place = Path(path)
    if not place.is_file():
        raise ValueError(f"weights={path}: no such file; {needs}")
    try:
        if place.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(place)
        return torch.load(place, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a foreign file provokes
        raise ValueError(
            f"weights={path}: no weights of {name} ({str(error).splitlines()[0]}); {needs}"
        ) from error


def file_hash(path: str | Path) -> str:
    """First 12 hex digits of the SHA-256."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


# -------------------------------------------------------------------------------------------- sound
@cache
def _filters(count: int = 26, size: int = 512) -> np.ndarray:
    """Triangles evenly spaced in mel, corners on whole bins: (count, size / 2 + 1)."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = np.floor(
        (size + 1) * 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1) / RATE
    )
    bins = np.arange(size // 2 + 1)
    low = corners[:-2, None]
    middle = corners[1:-1, None]
    high = corners[2:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = (bins - low) / (middle - low)
        fall = (high - bins) / (high - middle)
    return np.where(
        (bins >= low) & (bins < middle), rise, np.where((bins >= middle) & (bins < high), fall, 0.0)
    )


def mfcc(wave: np.ndarray) -> np.ndarray:
    """13 cepstra, 100 a second, of sound (S,) in [-1, 1] at 16 kHz: (T, 13).

    As python_speech_features, with which the network was trained: 16-bit scale, pre-emphasis 0.97,
    square windows of 25 ms, 512-point spectra, 26 mel filters, lifter 22, log energy in place of
    the first.
    """
    samples = np.clip(np.rint(wave.astype(np.float64) * 32768), -32768, 32767)
    rough = np.append(samples[:1], samples[1:] - 0.97 * samples[:-1])
    length = 400
    step = 160
    count = 1 + max(0, -(-(len(rough) - length) // step))
    padded = np.pad(rough, (0, (count - 1) * step + length - len(rough)))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::step]
    power = np.abs(np.fft.rfft(frames, 512)) ** 2 / 512
    tiny = np.finfo(float).eps
    energy = power.sum(axis=1)
    mel = power @ _filters().T
    cepstra = dct(np.log(np.where(mel == 0, tiny, mel)), type=2, axis=1, norm="ortho")[
        :, :COEFFICIENTS
    ]
    cepstra *= 1 + 11 * np.sin(np.pi * np.arange(COEFFICIENTS) / 22)
    cepstra[:, 0] = np.log(np.where(energy == 0, tiny, energy))
    return cepstra


# ---------------------------------------------------------------------------------------- distances
def distances(
    seen: Tensor, audio_features: Tensor, reach: int = VSHIFT, padded: bool = False
) -> np.ndarray:
    """D(l) for l = -reach..reach, positive: audio late; NaN where no window overlaps.

    Args:
        seen, audio_features: F_v (N, E) and F_a (M, E). padded: as the port does: both are cut to
            the shorter one, zeros stand in for the sound beyond either end, and every lag is a mean
            over all N windows.
    """
    if padded:
        seen, audio_features = seen[: len(audio_features)], audio_features[: len(seen)]
    seen = seen.double()
    audio_features = audio_features.double()
    alone = (seen + 1e-6).norm(dim=1)  # against zeros; 1e-6 as in torch's pairwise_distance
    found = np.full(2 * reach + 1, np.nan)
    for place, lag in enumerate(range(-reach, reach + 1)):
        first = max(0, -lag)
        last = min(len(seen), len(audio_features) - lag)
        if last <= first:
            continue
        near = (seen[first:last] - audio_features[first + lag : last + lag] + 1e-6).norm(dim=1)
        if padded:
            near = torch.cat([alone[:first], near, alone[last:]])
        found[place] = float(near.mean())
    return found


def crop_boxes(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Face boxes (F, 4) at 25 fps -> centres (F, 2) and half sides (F,) of the port's crops,
    smoothed over time.

    The port cuts rows y - s to y + s (1 + 2 c) and columns x -+ s (1 + c): a square of side 2 s (1
    + c) whose middle is c s below the face's. Its median filter sees zeros beyond the ends, this
    one the first and the last value.
    """
    size = np.maximum(boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]) / 2
    rows = np.stack(
        [(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2, size], axis=1
    )
    x, y, half = median_filter(rows, (MEDIAN, 1), mode="nearest").T
    return np.stack([x, y + CROP_SCALE * half], axis=1), half * (1 + CROP_SCALE)


# ----------------------------------------------------------------------------------------- features
@torch.no_grad()
def see_pictures(network: SyncNet, crops: Iterable[np.ndarray], batch: int = 20) -> Tensor:
    """Crops uint8 (224, 224, 3) at 25 fps, red green blue -> F_v (N, E), N = pictures - 4."""
    parts = []
    kept = list[Tensor]()
    for crop in crops:
        kept.append(
            torch.from_numpy(np.ascontiguousarray(crop[..., ::-1])).permute(2, 0, 1).float()
        )
        if len(kept) == batch + PICTURES - 1:
            parts.append(network.see(torch.stack(kept, dim=1)[None]))
            kept = kept[batch:]
    if len(kept) >= PICTURES:
        parts.append(network.see(torch.stack(kept, dim=1)[None]))
    return torch.cat(parts) if parts else torch.zeros(0, network.embedding)


@torch.no_grad()
def hear_sound(network: SyncNet, wave: np.ndarray, batch: int = 100) -> Tensor:
    """Sound (S,) in [-1, 1] at 16 kHz -> F_a (M, E), one window for each picture at 25 fps."""
    steps = torch.from_numpy(mfcc(wave).T.copy()).float()  # (13, T)
    if steps.shape[1] < MFCC_STEPS:
        return torch.zeros(0, network.embedding)
    windows = steps.unfold(1, MFCC_STEPS, MFCC_PER_PICTURE).permute(1, 0, 2)[
        :, None
    ]  # (M, 1, 13, 20)
    return torch.cat([network.hear(part) for part in windows.split(batch)])
