"""What compares lips with sound: our lip network on landmarks, or with weights of the user's
SyncNet on faces or Synchformer on whole pictures.

A backend looks at each face once (`look`), then compares it with any sound (`curves`): the same
lips are held against shifted and foreign sound at little cost. Scores are the higher the better and
not comparable between backends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

import avdiff
from avdiff.clip import midpoints
from avdiff.evaluation.lipsync import synchformer, syncnet
from avdiff.evaluation.lipsync.face_tracks import Track, square
from avdiff.evaluation.lipsync.synchformer_network import RELEASED, SEGMENTS, Size
from avdiff.evaluators import load as evaluators
from avdiff.evaluators.load import SyncCurve, sync_curve
from avdiff.models.evaluators.lip_network import LipNetwork

LONGEST_WHOLE = 20.0  # s; longer films are judged in windows
WINDOW = 10.0  # s
Film = Callable[
    [], Iterator[tuple[float, np.ndarray]]
]  # gives all pictures again: (seconds, uint8 (H, W, 3))


class Windows(NamedTuple):
    """Agreement of one face with a sound: of the whole, and of each window (the whole alone for a
    short film).
    """

    whole: SyncCurve
    parts: list[SyncCurve]
    starts: list[float]


class Backend(Protocol):
    """A comparison of lips and sound.

    Args:
        whole_picture: it looks at pictures as they are, so that no face is looked for. any_sound:
            it measures any sound but silence, not only speech.
    """

    name: str
    whole_picture: bool
    any_sound: bool

    def header(self) -> dict[str, Any]:
        """Version, weight hash and options, for a report."""
        ...

    def look(self, film: Film, track: Track) -> Any:
        """What `curves` needs to know of a face."""
        ...

    def curves(self, seen: Any, audio: np.ndarray, sample_rate: int) -> Windows:
        """Agreement with audio (S,) whose sample 0 sounds at 0 s of the film.

        Raises:
            ValueError: the face is seen too shortly, or the sound is too short.
        """
        ...

    def numbers(self, curve: SyncCurve) -> dict[str, float]:
        """Scores of a curve by their names in this backend."""
        ...


def together(curves: list[SyncCurve]) -> SyncCurve:
    """Mean of curves, each weighted by the time that it stands for."""
    weights = np.array([curve.overlap for curve in curves])
    scores = np.average(np.stack([curve.scores for curve in curves]), axis=0, weights=weights)
    return SyncCurve(curves[0].lags, scores, float(weights.sum()))


# -------------------------------------------------------------------------------------- lip network
class LipNetworkBackend:
    """The bundled lip network on the 20 lip points of a track; `SyncCurve` says what a score is.

    Args:
        folder: with other weights than those bundled. reach: largest lag, seconds.
    """

    name = "lip_network"
    whole_picture = False
    any_sound = False

    def __init__(self, folder: str | Path | None = None, reach: float = evaluators.REACH) -> None:
        self.network: LipNetwork = evaluators.load("lip_network", folder)
        self.folder = folder
        self.reach = reach

    def header(self) -> dict[str, Any]:
        weights = evaluators.weight_hash("lip_network", self.folder)
        return {
            "backend": self.name,
            "version": avdiff.__version__,
            "weights": weights,
            "largest_lag_ms": round(1000 * self.reach),
        }

    def look(self, film: Film, track: Track) -> Track:
        return track

    def curves(self, seen: Track, audio: np.ndarray, sample_rate: int) -> Windows:
        seconds = len(audio) / sample_rate
        whole = seconds <= LONGEST_WHOLE
        starts = [0.0] if whole else np.arange(0, seconds - WINDOW / 2, WINDOW).tolist()
        ends = [*starts[1:], seconds]  # the last window takes the rest, up to 15 s
        found = []
        places = []
        trouble = ""
        for start, end in zip(starts, ends, strict=True):
            part = (seen.times >= start) & (seen.times < end)
            sound = audio[round(start * sample_rate) : round(end * sample_rate)]
            try:
                found.append(
                    sync_curve(
                        seen.points[part],
                        seen.times[part] - start,
                        sound,
                        sample_rate,
                        self.reach,
                        self.network,
                    )
                )
                places.append(start)
            except ValueError as error:  # a window in which this face is not seen
                trouble = str(error)
        if not found:
            raise ValueError(trouble)
        return Windows(together(found), found, places)

    def numbers(self, curve: SyncCurve) -> dict[str, float]:
        return {
            "score_at_zero": curve.score_at_zero,
            "score": curve.score,
            "confidence": curve.confidence,
        }


# ------------------------------------------------------------------------------------------ SyncNet
@dataclass(frozen=True)
class SeenBySyncNet:
    """Features of one face (N, E), and the second at which its first picture starts."""

    features: torch.Tensor
    start: float


class SyncNetBackend:
    """SyncNet's protocol: 25 fps, 16 kHz, LSE-C and LSE-D at the best lag.

    Faces come from our readers, not from the port's S3FD, so crops and numbers differ a little from
    published ones.

    Args:
        weights: of the network. quirks: do as the port does: zeros stand in for the sound beyond
            the ends. cropped: the pictures are crops of one face already and are only resized.
    """

    name = "syncnet"
    any_sound = False

    def __init__(
        self,
        weights: str | Path,
        quirks: bool = False,
        cropped: bool = False,
        reach: float = evaluators.REACH,
    ) -> None:
        self.network = syncnet.load_syncnet(weights)
        self.hash = syncnet.file_hash(weights)
        self.quirks = quirks
        self.cropped = cropped
        self.reach = round(reach * syncnet.FPS)
        self.whole_picture = cropped

    def header(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "version": avdiff.__version__,
            "weights": self.hash,
            "largest_lag_ms": 1000 * self.reach // syncnet.FPS,
            "quirks": self.quirks,
            "cropped": self.cropped,
        }

    def look(self, film: Film, track: Track) -> SeenBySyncNet:
        first, last = np.floor(track.times[[0, -1]] * syncnet.FPS).astype(int)
        frames = np.arange(first, last + 1)
        clock = (frames + 0.5) / syncnet.FPS
        boxes = np.stack([np.interp(clock, track.times, side) for side in track.boxes.T], axis=1)
        centres, halves = syncnet.crop_boxes(boxes)
        if self.cropped:
            centres = boxes[:, 2:] / 2
            halves = boxes[:, 2:].max(axis=1) / 2
        crops = (
            square(picture, centres[i], halves[i], syncnet.SIDE)
            for i, picture in on_clock(film(), clock)
        )
        return SeenBySyncNet(
            syncnet.see_pictures(self.network, crops), float(frames[0]) / syncnet.FPS
        )

    def curves(self, seen: SeenBySyncNet, audio: np.ndarray, sample_rate: int) -> Windows:
        first = max(0, round(seen.start * sample_rate))
        length = round((len(seen.features) + syncnet.PICTURES - 1) / syncnet.FPS * sample_rate)
        wave = evaluators.as_waveform(
            audio[first : first + length], sample_rate, syncnet.RATE
        ).numpy()
        heard = syncnet.hear_sound(self.network, wave)
        least = self.reach + 10
        if min(len(seen.features), len(heard)) < least:
            raise ValueError(
                "the face and the sound are there together for "
                f"{min(len(seen.features), len(heard))} "
                f"windows of SyncNet: needs at least {least}"
            )
        found = syncnet.distances(seen.features, heard, self.reach, self.quirks)
        lags = np.arange(-self.reach, self.reach + 1) / syncnet.FPS
        curve = SyncCurve(lags, -found, len(seen.features) / syncnet.FPS)
        return Windows(curve, [curve], [seen.start])

    def numbers(self, curve: SyncCurve) -> dict[str, float]:
        numbers = {
            "lse_d": -curve.score,
            "lse_c": curve.confidence,
            "distance_at_zero": -curve.score_at_zero,
        }
        if self.quirks:  # the port's sign: positive when the sound is early; whole frames
            numbers["port_offset_frames"] = -float(
                np.rint(curve.lags[np.argmax(curve.scores)] * syncnet.FPS)
            )
        return numbers


# -------------------------------------------------------------------------------------- Synchformer
@dataclass
class SeenBySynchformer:
    """A film of so many pictures at 25 fps, and features (8, D) of those segments that were asked
    for so far.
    """

    film: Film
    pictures: int
    features: dict[int, torch.Tensor] = field(default_factory=dict)


class SynchformerBackend:
    """DeSync on whole pictures and any sound: the likeliest offset of the first and of the last 4.8
    s, to 200 ms.

    A score is the probability of a lag, `score_at_zero` that of a clip in sync.

    Args:
        weights: of the network. size: of the network, that of the released weights by default.
    """

    name = "synchformer"
    whole_picture = True
    any_sound = True

    def __init__(self, weights: str | Path, size: Size = RELEASED) -> None:
        self.network = synchformer.load_synchformer(weights, size)
        self.hash = syncnet.file_hash(weights)

    def header(self) -> dict[str, Any]:
        return {
            "backend": self.name,
            "version": avdiff.__version__,
            "weights": self.hash,
            "largest_lag_ms": 2000,
            "lag_step_ms": 200,
            "desync": "seconds, mean of the first and the last 4.8 s",
        }

    def look(self, film: Film, track: Track) -> SeenBySynchformer:
        count = len(track.times)
        seconds = (
            track.times[-1] * count / max(1, count - 0.5)
        )  # a picture shows the middle of its interval
        return SeenBySynchformer(film, int(seconds * synchformer.FPS + 1e-3))

    def curves(self, seen: SeenBySynchformer, audio: np.ndarray, sample_rate: int) -> Windows:
        wave = evaluators.as_waveform(audio, sample_rate, synchformer.RATE)
        segments = synchformer.segment_count(seen.pictures, len(wave))
        if segments < SEGMENTS:
            shared = min(seen.pictures / synchformer.FPS, len(wave) / synchformer.RATE)
            raise ValueError(
                f"picture and sound are there together for {shared:.2f} s: Synchformer needs at "
                "least "
                f"{synchformer.WINDOW} s"
            )
        starts = synchformer.window_starts(segments)
        wanted = {start + i for start in starts for i in range(SEGMENTS)}
        if missing := wanted - seen.features.keys():
            clock = midpoints(seen.pictures, synchformer.FPS)
            seen.features |= synchformer.see_segments(
                self.network, on_clock(seen.film(), clock), missing
            )
        heard = synchformer.hear_segments(self.network, wave, wanted)
        logits = synchformer.compare_windows(self.network, seen.features, heard, starts)
        parts: list[SyncCurve] = [synchformer.offset_curve(row[None]) for row in logits]
        seconds = [start * synchformer.STEP / synchformer.FPS for start in starts]
        return Windows(synchformer.offset_curve(logits), parts, seconds)

    def numbers(self, curve: SyncCurve) -> dict[str, float]:
        assert isinstance(curve, synchformer.OffsetCurve), "of this backend's own curves"
        return {"desync": curve.desync, "score_at_zero": curve.score_at_zero, "score": curve.score}


# ---------------------------------------------------------------------------------------------- all
def on_clock(
    pictures: Iterator[tuple[float, np.ndarray]], clock: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """For each time of an ascending clock the picture nearest to it: (place, picture)."""
    place = 0
    last = None
    for time, picture in pictures:
        while last is not None and place < len(clock) and clock[place] <= (last[0] + time) / 2:
            yield place, last[1]
            place += 1
        last = (time, picture)
    if last is not None:
        yield from ((i, last[1]) for i in range(place, len(clock)))


def find_backend(
    name: str = "lip_network",
    weights: str | Path | None = None,
    quirks: bool = False,
    cropped: bool = False,
    reach: float = evaluators.REACH,
    folder: str | Path | None = None,
) -> Backend:
    """A backend by its name; `folder` holds other weights of the lip network than those bundled.

    `reach` is not for Synchformer, whose classes always span 2 s each way.

    Raises:
        ValueError: an unknown name, weights missing or given to the wrong one.
    """
    if not 0.2 <= reach <= 2:
        raise ValueError(f"reach={reach}: needs 0.2 to 2 seconds")
    if name == "syncnet":
        if weights is None:
            raise ValueError(
                "backend=syncnet: needs --weights PATH; SyncNet's weights are its authors' to give"
            )
        return SyncNetBackend(weights, quirks, cropped, reach)
    if name == "synchformer":
        if weights is None or quirks or cropped:
            raise ValueError(
                "backend=synchformer: needs --weights PATH, a state dict; takes no quirks, no "
                "cropped"
            )
        return SynchformerBackend(weights)
    if name != "lip_network":
        raise ValueError(f"backend={name!r}: needs lip_network or syncnet or synchformer")
    if weights is not None or quirks or cropped:
        raise ValueError(
            "weights, quirks and cropped: are for backend=syncnet, weights for synchformer too"
        )
    return LipNetworkBackend(folder, reach)
