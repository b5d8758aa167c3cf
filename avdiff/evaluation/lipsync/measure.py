"""Lip-sync of any clip with a face and speech: how late the sound is, and how well lips and sound
agree.

    evaluator = LipSync()                        # the bundled lip network, faces by whatever reader
    is here evaluator.measure("clip.mp4").row            # one row: offset_ms, score, status...
    score("clip.mp4")                        # one number, also for a Clip in memory: a reward

The offset is positive when the audio is late. `offset_frames` counts frames of 40 ms (25 fps), the
unit of the papers, whatever the clip's own rate. `score` is the agreement at the best lag and says
nothing about delay; `score_at_zero` is the agreement of the clip as it is. Several faces are
followed apart; the one that fits the sound best stands for the clip, the others are in `tracks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from avdiff.evaluation.lipsync.backends import Backend, Windows, find_backend
from avdiff.evaluation.lipsync.face_tracks import (
    FaceSource,
    Followed,
    Track,
    WholeSource,
    find_sources,
)
from avdiff.evaluation.metrics.speech_share import RATE as SPEECH_RATE
from avdiff.evaluation.metrics.speech_share import STEP as SPEECH_STEP
from avdiff.evaluation.metrics.speech_share import detector, speech_mask
from avdiff.evaluators.load import SyncCurve
from avdiff.media.frames import read_sound, walk_pictures
from avdiff.media.write import Clip, MediaError

STATUSES = ("ok", "no_face", "small_face", "no_speech", "too_short", "error")
FRAME_MS = 40.0  # of `offset_frames`
LEAST_SECONDS = 0.4  # of lips in view, of speech, and of both at once
SMALLEST_FACE = 28.0  # pixels across; of a smaller one the lips are too few pixels to read
SILENCE = 1e-3  # of full scale (-60 dBFS): no sample is louder
MOST_TRACKS = 8  # faces that are judged, those longest in view
PLOT_FPS = 25  # of `mouth_curve`


@dataclass
class Source:
    """A clip to measure: pictures that can be gone through again, and mono sound (S,) that begins
    with them.
    """

    file: str
    pictures: Callable[[], Iterator[tuple[float, np.ndarray]]]
    audio: np.ndarray | None
    sample_rate: int


def as_source(clip: str | Path | Clip, name: str = "clip") -> Source:
    """A file, or a clip in memory.

    Raises:
        MediaError: the file cannot be read.
    """
    if not isinstance(clip, Clip):
        path = Path(clip)
        sound = read_sound(path)
        return Source(str(clip), lambda: walk_pictures(path), *(sound or (None, 0)))
    frames = clip.frames
    fps = clip.fps

    def pictures() -> Iterator[tuple[float, np.ndarray]]:
        if frames is None or fps is None:
            raise MediaError(f"path={name}: has no pictures")
        yield from (((i + 0.5) / float(fps), frame) for i, frame in enumerate(frames))

    audio = (
        None
        if clip.audio is None
        else np.asarray(clip.audio, np.float32).reshape(-1, np.shape(clip.audio)[-1])
    )
    return Source(
        name, pictures, None if audio is None else audio.mean(axis=0), clip.sample_rate or 0
    )


@dataclass
class Measured:
    """A row, and for clips that could be judged what is needed to hold the lips against other
    sound.
    """

    row: dict[str, Any]
    seen: Any = None
    audio: np.ndarray | None = field(default=None, repr=False)
    sample_rate: int = 0


class _NotMeasured(Exception):
    """Status and one sentence for a clip that has nothing to measure."""


class LipSync:
    """Finds faces, compares them with the sound and writes rows.

    Args:
        landmarker, faces: as in `find_sources`; `faces` may be a source. backend: a name for
            `find_backend`, with its `options`, or a backend. evaluators: folder with lip_network
            and face_reader, if not those bundled.

    Raises:
        ValueError: as those two.
    """

    def __init__(
        self,
        landmarker: str | Path | None = None,
        faces: str | FaceSource = "auto",
        backend: str | Backend = "lip_network",
        evaluators: str | Path | None = None,
        **options: Any,
    ) -> None:
        network, reader = (
            Path(evaluators) / name if evaluators else None
            for name in ("lip_network", "face_reader")
        )
        if isinstance(backend, str):
            backend = find_backend(backend, folder=network, **options)
        self.backend: Backend = backend
        if self.backend.whole_picture:
            faces = WholeSource()
        self.faces: FaceSource = (
            find_sources(landmarker, faces, reader) if isinstance(faces, str) else faces
        )

    def header(self) -> dict[str, Any]:
        """Facts about the measurement for the head of a report."""
        return {
            **self.backend.header(),
            **self.faces.header(),
            "faces_by": self.faces.name,
            "speech_detector": detector(),
            "offset": "positive: audio late",
            "frame_ms": FRAME_MS,
        }

    def measure(self, clip: str | Path | Clip, name: str = "clip") -> Measured:
        """Judge one clip. Whatever is wrong with it becomes the row's status and error."""
        row: dict[str, Any] = {
            "file": name if isinstance(clip, Clip) else str(clip),
            "status": "ok",
            "error": "",
        }
        try:
            return self._measure(as_source(clip, name), row)
        except _NotMeasured as outcome:
            row["status"], row["error"] = outcome.args
        except (
            Exception
        ) as error:  # one bad file must not end a run of thousands; its row says what happened
            known = isinstance(error, ValueError)
            row["status"], row["error"] = (
                "error",
                str(error) if known else f"{type(error).__name__}: {error}",
            )
        return Measured(row)

    def rows(
        self,
        clips: Sequence[str | Path | Clip],
        jobs: int = 1,
        progress: Callable[[Iterable[Measured]], Iterable[Measured]] = iter,
    ) -> list[Measured]:
        """Judge many clips, `jobs` at once, in their order."""
        if jobs < 1:
            raise ValueError(f"jobs={jobs}: needs at least 1")
        if jobs == 1:
            return list(progress(map(self.measure, clips)))
        with ThreadPoolExecutor(jobs) as pool:
            return list(progress(pool.map(self.measure, clips)))

    def score(self, clip: str | Path | Clip, missing: float = 0.0) -> float:
        """Agreement of the clip as it is, for the lip network a cosine of -1 to 1: a reward.
        `missing` without one.
        """
        measured = self.measure(clip)
        key = "score_at_zero" if "score_at_zero" in measured.row else "distance_at_zero"
        value = measured.row.get(key)
        return (
            missing if value is None else float(value) if key == "score_at_zero" else -float(value)
        )

    # ------------------------------------------------------------------------------------- one clip
    def _measure(self, source: Source, row: dict[str, Any]) -> Measured:
        followed = self._follow(source)
        shown = (
            0.0
            if not followed.pictures
            else followed.seconds * followed.pictures / max(1, followed.pictures - 0.5)
        )
        row |= {"seconds": round(shown, 3), "landmarks": followed.source, "faces": 0}
        tracks = [
            t for t in followed.tracks if len(t.times) * shown >= LEAST_SECONDS * followed.pictures
        ][:MOST_TRACKS]
        row["faces"] = len(tracks)
        row["face_coverage"] = max((len(t.times) for t in followed.tracks), default=0) / max(
            1, followed.pictures
        )
        audio = source.audio
        rate = source.sample_rate
        if audio is None:
            raise _NotMeasured("no_speech", "has no sound track")
        audio = audio[: round(shown * rate)]
        if len(audio) < 1.3 * rate:
            raise _NotMeasured(
                "too_short",
                f"picture and sound are there together for {len(audio) / rate:.2f} s: "
                "needs at least 1.3 s",
            )
        speech = speech_mask(audio, rate)
        row["speech_coverage"] = float(speech.mean())
        if not tracks:
            raise _NotMeasured("no_face", f"no face is in view for {LEAST_SECONDS} s or more")
        if max(t.face_width for t in tracks) < SMALLEST_FACE:
            width = max(t.face_width for t in tracks)
            raise _NotMeasured(
                "small_face",
                f"the largest face is {width:.0f} pixels wide: needs {SMALLEST_FACE:.0f}",
            )
        tracks = [t for t in tracks if t.face_width >= SMALLEST_FACE]
        if self.backend.any_sound:
            if np.abs(audio).max() <= SILENCE:
                raise _NotMeasured("no_speech", "the sound track is silent")
            return self._judge(source, row, tracks, audio, followed.pictures)
        heard = [
            t
            for t in tracks
            if spoken_seconds(t, speech, shown / followed.pictures) >= LEAST_SECONDS
        ]
        if not heard:
            raise _NotMeasured(
                "no_speech", f"nobody speaks for {LEAST_SECONDS} s or more while a face is in view"
            )
        return self._judge(source, row, heard, audio, followed.pictures)

    def _follow(self, source: Source) -> Followed:
        pictures = source.pictures()
        try:
            return self.faces.follow(pictures)
        except MediaError as error:
            if "has no pictures" in str(error):
                raise _NotMeasured("no_face", "has no pictures") from error
            raise

    def _judge(
        self,
        source: Source,
        row: dict[str, Any],
        tracks: list[Track],
        audio: np.ndarray,
        pictures: int,
    ) -> Measured:
        """Every face against the sound; the best one into the row."""
        found = []
        trouble = ""
        for number, track in enumerate(tracks, start=1):
            seen = self.backend.look(source.pictures, track)
            try:
                found.append(
                    (number, track, seen, self.backend.curves(seen, audio, source.sample_rate))
                )
            except ValueError as error:
                trouble = str(error)
        if not found:
            raise _NotMeasured("too_short", trouble)
        rows = [
            {
                "face": number,
                **self._numbers(windows),
                "face_coverage": len(track.times) / pictures,
                "face_width_px": track.face_width,
            }
            for number, track, _, windows in found
        ]
        best = int(np.argmax([windows.whole.score for *_, windows in found]))
        _, track, seen, windows = found[best]
        curves = {
            "lags_ms": (windows.whole.lags * 1000).round(3),
            "curve": windows.whole.scores.round(5),
            "window_starts": windows.starts,
            "window_offsets_ms": [round(part.offset * 1000, 1) for part in windows.parts],
            "fps": PLOT_FPS,
            "mouth_curve": mouth_curve(track, row["seconds"]),
        }
        row |= rows[best] | curves | {"tracks": rows}
        return Measured(row, seen, audio, source.sample_rate)

    def _numbers(self, windows: Windows) -> dict[str, Any]:
        offset = windows.whole.offset * 1000
        offsets = [part.offset * 1000 for part in windows.parts]
        return {
            "offset_ms": offset,
            "offset_frames": offset / FRAME_MS,
            **self.backend.numbers(windows.whole),
            "margin": margin(windows.whole),
            "windows": len(offsets),
            "offset_spread_ms": float(np.subtract(*np.quantile(offsets, (0.75, 0.25)))),
        }


def margin(curve: SyncCurve, near: float = 0.1) -> float:
    """Best score less the best one more than `near` seconds away: about 0 where two offsets fit
    equally well.
    """
    away = np.abs(curve.lags - curve.lags[np.argmax(curve.scores)]) > near
    return float(curve.score - curve.scores[away].max())


def spoken_seconds(track: Track, speech: np.ndarray, picture_seconds: float) -> float:
    """How long somebody speaks while a face is in view."""
    place = np.minimum((track.times * SPEECH_RATE / SPEECH_STEP).astype(int), len(speech) - 1)
    return float(speech[place].sum() * picture_seconds)


def mouth_curve(track: Track, seconds: float) -> list[float | None]:
    """Gap between the inner lips over the width of the mouth, 25 a second; None where the face is
    not in view.
    """
    width = np.median(np.linalg.norm(track.points[:, 6] - track.points[:, 0], axis=1))
    gap = np.linalg.norm(track.points[:, 18] - track.points[:, 14], axis=1) / width
    clock = (np.arange(int(seconds * PLOT_FPS)) + 0.5) / PLOT_FPS
    near = np.abs(track.times[None] - clock[:, None]).min(axis=1) <= 0.1
    opening = np.interp(clock, track.times, gap)
    return [
        round(float(value), 4) if here and np.isfinite(value) else None
        for here, value in zip(near, opening, strict=True)
    ]


def face_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each face track in place of one for each clip; a further face of a clip gets an
    id of its own.
    """
    spread = []
    for row in rows:
        for track in row.get("tracks") or [{}]:
            own = {key: value for key, value in row.items() if key != "tracks"} | track
            if track and track["face"] != row["face"]:
                own = {key: value for key, value in own.items() if key not in CURVES}
                own["id"] = f"{Path(row['file']).name} face {track['face']}"
            spread.append(own)
    return spread


CURVES = ("lags_ms", "curve", "window_starts", "window_offsets_ms", "fps", "mouth_curve")


@cache
def default_evaluator() -> LipSync:
    """The one that `score` uses; loaded once."""
    return LipSync()


def score(clip: str | Path | Clip, evaluator: LipSync | None = None, missing: float = 0.0) -> float:
    """Lip-sync of a file or of a `Clip` in memory as one number, the higher the better: for
    validation and rewards.

    It is the agreement at lag 0: delay lowers it. `missing` stands for clips without a measurement.
    """
    return (evaluator or default_evaluator()).score(clip, missing)
