"""MediaPipe's FaceLandmarker (Apache-2.0): its weights found or fetched, and faces of a picture as
478 points.

    faces = Landmarker(find_landmarker()).detect(picture)

The package is in the `eval` extra; the weights are a file of 3.8 MB that comes from `--landmarker`,
$AVDIFF_LANDMARKER, the cache, or is downloaded once on request and accepted by its hash. Pictures
are read one by one (IMAGE mode): in VIDEO mode a filter smooths the points over time, and lips
would lag behind the sound.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib.util
import os
import sys
import threading
import urllib.request
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

VARIABLE = "AVDIFF_LANDMARKER"
URL = "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task"
SHA256 = "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff"
DOWNLOAD = "download"  # in place of a path
MOST_FACES = 4
POINTS = 478


def cached_file() -> Path:
    """Where a downloaded copy is kept."""
    return Path.home() / ".cache" / "avdiff" / "face_landmarker.task"


def find_landmarker(path: str | Path | None = None) -> Path | None:
    """The weights: `path`, else $AVDIFF_LANDMARKER, else the cache, else None. `path="download"`
    fetches them once.

    Raises:
        ValueError: a path or variable that names no file, or a download that failed.
    """
    for origin, named in (("landmarker", path), (f"${VARIABLE}", os.environ.get(VARIABLE))):
        if named == DOWNLOAD:
            return cached_file() if cached_file().is_file() else fetch(URL, SHA256, cached_file())
        if named:
            if not Path(named).is_file():
                raise ValueError(
                    f"{origin}={named}: no such file; needs a face_landmarker.task, or 'download'"
                )
            return Path(named)
    return cached_file() if cached_file().is_file() else None


def fetch(url: str, sha256: str, target: Path) -> Path:
    """Download a file, accept it by its hash, and put it under its name.

    Raises:
        ValueError: not reachable, or another file than expected; nothing is left behind.
    """
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            data = answer.read()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"landmarker=download: {url} cannot be fetched ({error}); give the file by "
            "--landmarker PATH "
            f"or ${VARIABLE}"
        ) from error
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"landmarker=download: {url} has SHA-256 {found[:12]}..., expected {sha256[:12]}..."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary_path = target.with_name(f".{target.name}.{os.getpid()}")
    temporary_path.write_bytes(data)
    os.replace(temporary_path, target)
    return target


def is_installed() -> bool:
    """Whether the package is here."""
    return importlib.util.find_spec("mediapipe") is not None


class Landmarker:
    """Finds faces. One network for each thread that calls; use from several threads is safe.

    Args:
        path: the weights.

    Raises:
        ValueError: the package is missing, or the file is no face landmarker.
    """

    def __init__(self, path: Path) -> None:
        if not is_installed():
            raise ValueError("landmarker: needs the package mediapipe: pip install 'avdiff[eval]'")
        self.path = path
        self._own = threading.local()
        self._open: list[Any] = []
        self._network()
        atexit.register(self._forget)

    @property
    def version(self) -> str:
        """Of the package."""
        return version("mediapipe")

    @property
    def weight_hash(self) -> str:
        """First 12 hex digits of the SHA-256 of the weights."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]

    def detect(self, picture: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) -> points of each face in pixels (N, 478, 2), N up to `MOST_FACES`."""
        from mediapipe import Image, ImageFormat

        with _quiet() if not getattr(self._own, "used", False) else contextlib.nullcontext():
            found = self._network().detect(
                Image(image_format=ImageFormat.SRGB, data=np.ascontiguousarray(picture))
            )
        self._own.used = True
        size = np.array(picture.shape[1::-1], np.float32)
        rows = [[(p.x, p.y) for p in face[:POINTS]] for face in found.face_landmarks]
        return np.array(rows, np.float32).reshape(len(rows), POINTS, 2) * size

    def _forget(self) -> None:
        """At exit the package closes its networks too late and prints a traceback for each: leave
        it to the system.
        """
        for network in self._open:
            network._handle = None

    def _network(self) -> Any:
        if not hasattr(self._own, "network"):
            with _quiet():
                from mediapipe.tasks.python import BaseOptions
                from mediapipe.tasks.python.vision import (
                    FaceLandmarker,
                    FaceLandmarkerOptions,
                    RunningMode,
                )

                options = FaceLandmarkerOptions(
                    base_options=BaseOptions(model_asset_path=str(self.path)),
                    running_mode=RunningMode.IMAGE,
                    num_faces=MOST_FACES,
                )
                try:
                    self._own.network = FaceLandmarker.create_from_options(options)
                except (RuntimeError, ValueError, OSError) as error:
                    reason = str(error).splitlines()[0]
                    raise ValueError(
                        f"landmarker={self.path}: is no face landmarker ({reason})"
                    ) from error
            self._open.append(self._own.network)
        return self._own.network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The package's C++ part logs to file descriptor 2 whatever it is told; send that nowhere for a
    while.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
