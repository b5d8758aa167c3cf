"""LipNetwork: do these lips and this sound belong together, and how far are they apart?

Two small encoders, one for the motion of 20 lip points, one for the log-mel, give vectors at 50 Hz;
true pairs point the same way. The score of a lag is the cosine of both rows of vectors over the
frames that overlap: a frame counts as much as its vectors are long, and training makes them short
where there is nothing to tell. The task is SyncNet's (Chung & Zisserman 2016), with landmarks in
place of pixels: they cost little and are alike for drawn and filmed faces.

Lip points are those of the drawing (`avdiff.corpus.face.mouth.lip_points`): 0-11 the outer contour
clockwise from the left corner as seen, 6 the right corner; 12-19 the inner contour, 16 its right
corner.

Shape legend: B clips, F pictures, K points, T frames at 50 Hz, M mel bands, D width, E embedding, L
lags.
"""

from __future__ import annotations

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from avdiff.models.codecs.mel import LogMel
from avdiff.models.evaluators.phone_recognizer import SpeechBlock

RATE = 50  # frames a second of both encoders
POINTS = 20
# corners of the outer contour
LEFT = 0
RIGHT = 6
LONGEST_GAP = 0.25  # s without points that are bridged; longer ones count as unseen
FEATURE_SCALE = 8.0  # deviations of lip points are about an eighth of the mouth's width

#: Points of the 478-point face mesh (MediaPipe FaceLandmarker) that stand for each of the 20; two
#: are averaged.
FACE_MESH_LIPS: tuple[tuple[int, ...], ...] = (
    (61,),
    (185, 40),
    (39,),
    (0,),
    (269,),
    (270, 409),
    (291,),
    (321, 375),
    (405,),
    (17,),
    (181,),
    (91, 146),
    (78,),
    (80,),
    (13,),
    (310,),
    (308,),
    (318,),
    (14,),
    (88,),
)


def lips_of_mesh(landmarks: np.ndarray) -> np.ndarray:
    """Face mesh (F, 478, >= 2) -> lip points (F, 20, 2). Give pixels: x and y need the same
    unit.
    """
    return np.stack(
        [landmarks[:, list(ids), :2].mean(axis=1) for ids in FACE_MESH_LIPS], axis=1
    ).astype(np.float32)


def normalise_lips(points: np.ndarray) -> np.ndarray:
    """Lip points of one face (F, 20, 2), any unit -> features (F, 40): what is left is motion.

    Each picture is centred between the corners and turned until they are level; the clip is scaled
    to the median width of the mouth and its median shape is taken away. Place, size, tilt and the
    resting shape of the face are gone. Pictures without a face are NaN, before and after.
    """
    corner = points[:, RIGHT] - points[:, LEFT]  # (F, 2)
    width = np.linalg.norm(corner, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        along = corner / width[:, None]
    turn = np.stack(
        [along, np.stack([-along[:, 1], along[:, 0]], axis=1)], axis=1
    )  # (F, 2, 2): rows are the new axes
    centred = points - (points[:, LEFT] + points[:, RIGHT])[:, None] / 2
    level = np.einsum("fij,fkj->fki", turn, centred)
    seen = np.isfinite(level).all(axis=(1, 2))
    if not seen.any():
        return np.full((len(points), 2 * POINTS), np.nan, np.float32)
    scaled = level / max(float(np.median(width[seen])), 1e-9)
    motion = (scaled - np.median(scaled[seen], axis=0)) * FEATURE_SCALE
    return motion.reshape(len(points), -1).astype(np.float32)


def lips_on_clock(
    points: np.ndarray, times: np.ndarray, seconds: float
) -> tuple[np.ndarray, np.ndarray]:
    """Lip points at any times -> features on the 50 Hz clock of the audio.

    Args:
        points: (F, 20, 2), NaN where no face was found.
        times: (F,) seconds, ascending: the moment that each picture shows. For a film without
            motion blur that is the middle of its interval, `pts + 0.5 / fps`.
        seconds: length of the audio, which begins at time 0.

    Returns:
        features (T, 40) and seen (T,) bool, T = floor(50 seconds); unseen frames are 0. Frame i is
        time (i + 0.5) / 50.

    Raises:
        ValueError: shapes that do not fit, or times that do not ascend.
    """
    points = np.asarray(points, np.float64)
    times = np.asarray(times, np.float64)
    if points.ndim != 3 or points.shape[1:] != (POINTS, 2) or times.shape != points.shape[:1]:
        raise ValueError(
            f"points has shape {points.shape}, times {times.shape}: needs (F, {POINTS}, 2) and (F,)"
        )
    if len(times) > 1 and not np.all(np.diff(times) > 0):
        raise ValueError("times: needs ascending seconds, one for each picture")
    clock = (np.arange(int(seconds * RATE + 1e-6)) + 0.5) / RATE
    features = normalise_lips(points)
    valid = np.isfinite(features).all(axis=1)
    if valid.sum() < 2:
        return np.zeros((len(clock), 2 * POINTS), np.float32), np.zeros(len(clock), bool)
    known = times[valid]
    rows = features[valid]
    after = np.clip(np.searchsorted(known, clock), 1, len(known) - 1)
    before = after - 1
    gap = known[after] - known[before]
    share = ((clock - known[before]) / gap)[:, None]
    edge = 1.0 / RATE  # half a picture at 25 fps beyond the first and last one
    seen = (gap <= LONGEST_GAP) & (clock >= known[0] - edge) & (clock <= known[-1] + edge)
    mixed = rows[before] * (1 - share) + rows[after] * share
    return np.where(seen[:, None], mixed, 0.0).astype(np.float32), seen


class LipNetwork(ModelMixin, ConfigMixin):
    """Lip motion and sound in one space.

    Args:
        sample_rate, mel_hop_length, mel_bins: of the log-mel, whose rate must be 100 Hz.
        width, expansion, kernel, layers, dropout: blocks of each encoder. embedding: E.
    """

    @register_to_config
    def __init__(
        self,
        sample_rate: int = 24000,
        mel_hop_length: int = 240,
        mel_bins: int = 100,
        width: int = 128,
        expansion: int = 2,
        kernel: int = 9,
        layers: int = 4,
        embedding: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if sample_rate != 2 * RATE * mel_hop_length:
            raise ValueError(
                f"sample_rate={sample_rate}, mel_hop_length={mel_hop_length}: "
                f"needs {2 * RATE} mel frames a second"
            )
        self.mel_frontend = LogMel(sample_rate, 4 * mel_hop_length, mel_hop_length, mel_bins)
        self.lip_stem = nn.Linear(2 * POINTS, width)
        self.mel_stem = nn.Linear(2 * mel_bins, width)
        self.lip_blocks, self.mel_blocks = (
            nn.ModuleList(SpeechBlock(width, expansion, kernel, dropout) for _ in range(layers))
            for _ in range(2)
        )
        self.lip_head, self.mel_head = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, embedding)) for _ in range(2)
        )
        self.sharpness = nn.Parameter(torch.tensor(3.0))  # log of the factor on cosines in training

    def see(self, lips: Tensor, seen: Tensor) -> Tensor:
        """Features (B, T, 40) and seen (B, T) bool -> vectors (B, T, E), 0 where unseen."""
        x = self.lip_stem(lips)
        for block in self.lip_blocks:
            x = block(x)
        return self.lip_head(x).float() * seen[..., None]

    def hear(self, mel: Tensor) -> Tensor:
        """Log-mel (B, 2 T, M) -> vectors (B, T, E)."""
        x = self.mel_stem(rearrange(mel, "b (t r) m -> b t (r m)", r=2))
        for block in self.mel_blocks:
            x = block(x)
        return self.mel_head(x).float()


def lag_scores(seen: Tensor, audio_vectors: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Products of lips at t and sound at t + lag, for every lag.

    Args:
        seen: vectors of the lips (B, T, E). audio_vectors: those of the sound (B, T + 2 reach, E),
            `reach` frames more on either side. reach: largest lag, R.

    Returns:
        product (B, T, 2 R + 1) and power of the sound (B, T, 2 R + 1); lag l stands at place l + R.
    """
    batch, frames, _ = seen.shape
    lags = 2 * reach + 1
    if audio_vectors.shape[1] != frames + 2 * reach:
        raise ValueError(
            f"audio_vectors has {audio_vectors.shape[1]} frames: needs {frames + 2 * reach}, "
            f"{reach} more on "
            "either side"
        )
    table = (seen @ audio_vectors.transpose(1, 2)).contiguous()  # (B, T, T + 2R)
    wide = frames + 2 * reach
    product = table.as_strided(
        (batch, frames, lags), (frames * wide, wide + 1, 1)
    )  # row t begins at column t
    power = audio_vectors.square().sum(dim=-1).unfold(1, lags, 1)  # (B, T, L)
    return product, power
