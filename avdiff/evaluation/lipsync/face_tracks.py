"""Faces of a film as tracks: who is where, when, with which lips.

    tracks, source = find_sources(None).follow(walk_pictures("clip.mp4"))

Two readers give the same 20 lip points: MediaPipe's face mesh for filmed (and drawn) faces, several
in a picture, small ones by tiles; and the face reader, which knows the drawn presenter alone and
needs no other file. If both are here, the reader is believed where its lips lie on those of the
mesh.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image

from avdiff.evaluation.lipsync.landmarker import Landmarker, find_landmarker, is_installed
from avdiff.evaluators import load as evaluators
from avdiff.models.evaluators.face_reader import FaceReader, to_pictures
from avdiff.models.evaluators.lip_network import LEFT, RIGHT, lips_of_mesh

LONGEST_ABSENCE = 1.0  # s after which a face that comes back is another track
SAME_FACE = 0.3  # share of common area (intersection over union) from one picture to the next
SEARCH_EVERY = 12  # pictures without any face between two searches by tiles
# mouth widths between the reader's lips and the mesh's: 0.04 on drawn faces, 0.12 and up on filmed
AGREEMENT = 0.07
LOOKED_AT = 8  # pictures on which the two readers are compared, of the first `HEAD`
HEAD = 48

Pictures = Iterable[tuple[float, np.ndarray]]  # seconds, uint8 (H, W, 3)


class Face(NamedTuple):
    """One face in one picture, pixels: `points` (20, 2), `box` (4,) left top right bottom."""

    points: np.ndarray
    box: np.ndarray


@dataclass(frozen=True)
class Track:
    """One face through a film: the pictures in which it was found.

    Args:
        times: seconds (F,). points: lips (F, 20, 2) and boxes: (F, 4), pixels.
    """

    times: np.ndarray
    points: np.ndarray
    boxes: np.ndarray

    @property
    def face_width(self) -> float:
        """Median width of the face in pixels."""
        return float(np.median(self.boxes[:, 2] - self.boxes[:, 0]))

    @property
    def mouth_width(self) -> float:
        """Median distance of the corners of the mouth in pixels."""
        return float(
            np.median(np.linalg.norm(self.points[:, RIGHT] - self.points[:, LEFT], axis=1))
        )


class Followed(NamedTuple):
    """All tracks of a film, longest first; how many pictures were looked at; the last one's time;
    who found them.
    """

    tracks: list[Track]
    pictures: int
    seconds: float
    source: str


class FaceSource(Protocol):
    """Finds the faces in a film."""

    name: str

    def follow(self, pictures: Pictures) -> Followed:
        """Look at every picture once."""
        ...

    def header(self) -> dict[str, Any]:
        """Version and weight hash, for a report."""
        ...


# ------------------------------------------------------------------------------------------- tracks
def overlap(one: np.ndarray, two: np.ndarray) -> float:
    """Common area of two boxes over the area of both together."""
    side = np.minimum(one[2:], two[2:]) - np.maximum(one[:2], two[:2])
    common = float(np.prod(np.maximum(side, 0)))
    both = float(np.prod(one[2:] - one[:2]) + np.prod(two[2:] - two[:2])) - common
    return common / both if both > 0 else 0.0


@dataclass
class Tracker:
    """Joins the faces of one picture to those of earlier ones: the pairs that overlap most come
    first.
    """

    rows: list[list[tuple[float, Face]]] = field(default_factory=list)

    def live(self, time: float) -> list[list[tuple[float, Face]]]:
        """Tracks that may still go on."""
        return [row for row in self.rows if time - row[-1][0] <= LONGEST_ABSENCE]

    def add(self, time: float, faces: Sequence[Face]) -> None:
        """The faces of the next picture."""
        live = self.live(time)
        pairs = sorted(
            (
                (overlap(row[-1][1].box, face.box), i, j)
                for i, row in enumerate(live)
                for j, face in enumerate(faces)
            ),
            reverse=True,
        )
        taken_rows: set[int] = set()
        taken: set[int] = set()
        for share, i, j in pairs:
            if share >= SAME_FACE and i not in taken_rows and j not in taken:
                live[i].append((time, faces[j]))
                taken_rows.add(i)
                taken.add(j)
        self.rows += [[(time, face)] for j, face in enumerate(faces) if j not in taken]

    def tracks(self) -> list[Track]:
        """All, longest first."""
        rows = sorted(self.rows, key=len, reverse=True)
        return [
            Track(
                np.array([time for time, _ in row]),
                np.stack([face.points for _, face in row]),
                np.stack([face.box for _, face in row]),
            )
            for row in rows
        ]


# ----------------------------------------------------------------------------------------- the mesh
class MeshSource:
    """Faces by MediaPipe's mesh.

    Each picture is read whole. A face that was there before and is not found is looked for in a
    crop around its last place; if no face is known, now and then in overlapping tiles, where a
    small face is large enough for the detector.
    """

    name = "mesh"

    def __init__(self, path: Path) -> None:
        self.landmarker = Landmarker(path)

    def header(self) -> dict[str, Any]:
        return {
            "landmarks": "mediapipe",
            "landmarks_version": self.landmarker.version,
            "landmarks_hash": self.landmarker.weight_hash,
        }

    def follow(self, pictures: Pictures) -> Followed:
        tracker = Tracker()
        count = 0
        time = 0.0
        since = SEARCH_EVERY
        for time, picture in pictures:
            count += 1
            known = [row[-1][1].box for row in tracker.live(time)]
            faces = self.faces(picture, known)
            since = 0 if faces or known else since + 1
            if since >= SEARCH_EVERY:
                faces = self.search(picture)
                since = 0
            tracker.add(time, faces)
        return Followed(tracker.tracks(), count, time, self.name)

    def faces(self, picture: np.ndarray, known: Sequence[np.ndarray] = ()) -> list[Face]:
        """Faces of a picture, those in the boxes `known` with more care."""
        found = [as_face(mesh) for mesh in self.landmarker.detect(picture)]
        for box in known:
            if not any(overlap(face.box, box) >= SAME_FACE for face in found):
                centre = (box[:2] + box[2:]) / 2
                half = max(box[2:] - box[:2])
                found += [
                    face
                    for face in self._in_part(picture, centre - half, centre + half)
                    if overlap(face.box, box) >= SAME_FACE
                ]
        return distinct(found)

    def search(self, picture: np.ndarray) -> list[Face]:
        """Faces in tiles of a half of the picture, then of a quarter, which overlap by half; [] if
        there is none.
        """
        size = np.array(picture.shape[1::-1], np.float64)
        for parts in (2, 4):
            tile = size / parts
            found = []
            for row, column in np.ndindex(2 * parts - 1, 2 * parts - 1):
                corner = np.array((column, row)) * tile / 2
                found += self._in_part(picture, corner, corner + tile)
            if found:
                return distinct(found)
        return []

    def _in_part(self, picture: np.ndarray, low: np.ndarray, high: np.ndarray) -> list[Face]:
        """Faces in the part of a picture between two corners (x, y)."""
        limit = np.array(picture.shape[1::-1])
        x, y = np.clip(np.floor(low).astype(int), 0, limit - 1)
        right, bottom = np.clip(np.ceil(high).astype(int), (x + 1, y + 1), limit)
        part = picture[y:bottom, x:right]
        return [
            as_face(mesh + np.array((x, y), np.float32)) for mesh in self.landmarker.detect(part)
        ]


def as_face(mesh: np.ndarray) -> Face:
    """Points of a mesh (478, 2) -> lips and box."""
    return Face(lips_of_mesh(mesh[None])[0], np.concatenate([mesh.min(axis=0), mesh.max(axis=0)]))


def distinct(faces: Sequence[Face]) -> list[Face]:
    """Without those that lie for a half or more in a larger one: a tile's edge may cut a face in
    parts.
    """
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -float(np.prod(face.box[2:] - face.box[:2]))):
        size = float(np.prod(face.box[2:] - face.box[:2]))
        common = (
            np.prod(
                np.maximum(
                    np.minimum(face.box[2:], k.box[2:]) - np.maximum(face.box[:2], k.box[:2]), 0
                )
            )
            for k in kept
        )
        if all(area < size / 2 for area in common):
            kept.append(face)
    return kept


# --------------------------------------------------------------------------------------- the reader
class ReaderSource:
    """The drawn presenter's face, one in a picture, by the face reader; `folder` has other weights
    than the bundled.
    """

    name = "reader"

    def __init__(self, folder: str | Path | None = None) -> None:
        self.reader: FaceReader = evaluators.load("face_reader", folder)
        self.folder = folder

    def header(self) -> dict[str, Any]:
        return {"reader_hash": evaluators.weight_hash("face_reader", self.folder)}

    def follow(self, pictures: Pictures) -> Followed:
        tracker = Tracker()
        count = 0
        time = 0.0
        stream = iter(pictures)
        while part := list(islice(stream, 32)):
            for (time, _), face in zip(
                part, self.faces([picture for _, picture in part]), strict=True
            ):
                tracker.add(time, [face] if face else [])
                count += 1
        return Followed(tracker.tracks(), count, time, self.name)

    @torch.no_grad()
    def faces(self, pictures: Sequence[np.ndarray]) -> list[Face | None]:
        """The face of each picture of one film."""
        place, mouth = self.reader(
            to_pictures(torch.from_numpy(np.stack(pictures)).to(self.reader.device))
        )
        side = max(pictures[0].shape[:2])
        points = mouth.points.cpu().numpy() * side
        boxes = place.box.cpu().numpy() * side
        return [
            Face(points[i], boxes[i]) if seen else None
            for i, seen in enumerate((place.face > 0).tolist())
        ]


class WholeSource:
    """For crops of one face and for evaluators of whole scenes: the picture is the face, its lips
    are not looked for.
    """

    name = "whole"

    def header(self) -> dict[str, Any]:
        return {"landmarks": "none: pictures are judged whole"}

    def follow(self, pictures: Pictures) -> Followed:
        tracker = Tracker()
        count = 0
        time = 0.0
        for time, picture in pictures:
            height, width = picture.shape[:2]
            tracker.add(time, [Face(np.full((20, 2), np.nan), np.array((0.0, 0.0, width, height)))])
            count += 1
        return Followed(tracker.tracks(), count, time, self.name)


# ------------------------------------------------------------------------------------ which of both
class BothSources:
    """The mesh, unless the reader's lips lie where the mesh's do: then the film shows a drawn
    presenter.
    """

    name = "both"

    def __init__(self, mesh: MeshSource, reader: ReaderSource) -> None:
        self.mesh = mesh
        self.reader = reader

    def header(self) -> dict[str, Any]:
        return {**self.mesh.header(), **self.reader.header()}

    def follow(self, pictures: Pictures) -> Followed:
        stream: Iterator[tuple[float, np.ndarray]] = iter(pictures)
        head = list(islice(stream, HEAD))
        shown = [
            head[i][1] for i in np.linspace(0, len(head) - 1, min(LOOKED_AT, len(head))).astype(int)
        ]
        source: FaceSource = self.reader if shown and self.is_drawn(shown) else self.mesh
        return source.follow(chain(head, stream))

    def is_drawn(self, pictures: Sequence[np.ndarray]) -> bool:
        """Whether the readers agree in most of those pictures in which the reader sees a face."""
        votes = []
        for picture, face in zip(pictures, self.reader.faces(pictures), strict=True):
            if face is not None:
                width = np.linalg.norm(face.points[RIGHT] - face.points[LEFT]) + 1e-6
                away = [
                    np.linalg.norm(face.points - other.points, axis=1).mean() / width
                    for other in self.mesh.faces(picture)
                ]
                votes.append(min(away, default=np.inf))
        return len(votes) > len(pictures) / 2 and bool(np.median(votes) < AGREEMENT)


def find_sources(
    landmarker: str | Path | None = None, wanted: str = "auto", folder: str | Path | None = None
) -> FaceSource:
    """The readers of faces that are here.

    Args:
        landmarker: weights of the mesh, as in `find_landmarker`. wanted: auto, mesh or reader.
            folder: of the face reader, if not the bundled one.

    Raises:
        ValueError: none is here, or not the one wanted.
    """
    if wanted not in ("auto", "mesh", "reader"):
        raise ValueError(f"faces={wanted!r}: needs auto, mesh or reader")
    path = find_landmarker(landmarker) if wanted != "reader" else None
    has_reader = (Path(folder or evaluators.BUNDLED / "face_reader") / "config.json").is_file()
    if wanted == "reader" or (wanted == "auto" and path is None and has_reader):
        return ReaderSource(folder)
    if path is None or not is_installed():
        missing = (
            "the package mediapipe (pip install 'avdiff[eval]')"
            if path is not None
            else (
                "a face_landmarker.task: --landmarker PATH, $AVDIFF_LANDMARKER, or --landmarker "
                "download (3.8 MB, once)"
            )
        )
        raise ValueError(f"faces={wanted}: needs {missing}")
    mesh = MeshSource(path)
    return BothSources(mesh, ReaderSource(folder)) if wanted == "auto" and has_reader else mesh


def square(picture: np.ndarray, centre: np.ndarray, half: float, size: int) -> np.ndarray:
    """The square around `centre` (x, y), `half` a side each way, as (size, size, 3); beyond the
    picture grey 110.
    """
    x, y = (int(value) for value in np.floor(centre - half))
    side = max(2, round(2 * half))
    cut = np.full((side, side, 3), 110, np.uint8)
    top = max(0, y)
    left = max(0, x)
    part = picture[top : max(top, y + side), left : max(left, x + side)]
    cut[top - y : top - y + part.shape[0], left - x : left - x + part.shape[1]] = part
    return np.asarray(Image.fromarray(cut).resize((size, size), Image.Resampling.BILINEAR))
