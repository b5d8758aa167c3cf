"""All measures of one clip in one row: `measure_file("a.mp4", prompt)`; pictures and sound are
read once.

What a clip was asked to show and say is a held-out `Prompt`, or nothing: then only what needs no
prompt is measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avdiff.data.heldout import Prompt
from avdiff.evaluation.metrics import attributes as attribute_accuracy
from avdiff.evaluation.metrics import events, speech
from avdiff.evaluation.metrics import visual_speech as visual_speech
from avdiff.evaluators import load as evaluators
from avdiff.media.write import Clip, read_clip
from avdiff.models.evaluators.contact_detector import ContactDetector
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.lip_network import LipNetwork
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer

LONGEST = 60.0  # seconds of a file that are measured
LEAST_FACE = 0.5  # share of pictures with a face, below which a clip counts as without


@dataclass(frozen=True)
class Evaluators:
    """The frozen evaluators; `bundled()` are those that ship."""

    recognizer: PhoneRecognizer
    face_reader: FaceReader
    lip_network: LipNetwork
    contact_detector: ContactDetector

    @classmethod
    def bundled(cls) -> Evaluators:
        """Raises ValueError where one has no weights."""
        return cls.from_folder(evaluators.BUNDLED)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Evaluators:
        """Evaluators saved in folder/recognizer, folder/face_reader, folder/lip_network and
        folder/contact_detector.
        """
        place = Path(folder)
        return cls(
            evaluators.load("recognizer", place / "recognizer"),
            evaluators.load("face_reader", place / "face_reader"),
            evaluators.load("lip_network", place / "lip_network"),
            events.load_reader(place / "contact_detector"),
        )


def header(folder: str | Path | None = None) -> dict[str, str]:
    """Facts that a report begins with: version and the weights of the evaluators."""
    from avdiff import __version__

    place = Path(folder) if folder else evaluators.BUNDLED
    found = {
        name: evaluators.weight_hash(name, place / name)
        for name in (*evaluators.EVALUATORS, "contact_detector")
    }
    return {
        "avdiff": __version__,
        **{f"{name} weights": digest for name, digest in found.items()},
        "sign": "positive offsets and lags: the audio is late",
    }


def measure_clip(
    clip: Clip, prompt: Prompt | None = None, by: Evaluators | None = None, mos: bool = False
) -> dict[str, Any]:
    """Every measure that the clip and the prompt allow, as one flat dict without `file`.

    `status` is ok, no_face, no_speech, no_picture or no_sound: what a speaking clip lacks; an event
    lacks nothing but picture or sound.

    Args:
        mos: predict opinion scores too (needs the package speechmos).
    """
    by = by or Evaluators.bundled()
    row: dict[str, Any] = {"status": "ok", "error": ""}
    if clip.audio is not None and clip.audio.size:
        row |= speech.voice(clip)
        if prompt is not None and prompt.kind == "event":
            del row["pitch_hz"], row["voice_gender"]
        if mos:
            row |= speech.predicted_mos(clip)
    if clip.frames is None or clip.fps is None or not len(clip.frames):
        row["status"] = "no_picture"
    else:
        row |= {"seconds": len(clip.frames) / float(clip.fps), "fps": float(clip.fps)}
    if clip.audio is None or not clip.audio.size:
        row["status"] = "no_sound" if row["status"] == "ok" else "error"
    if prompt is not None and prompt.kind == "event":
        return row | (
            events.events(clip, prompt.contacts, by.contact_detector)
            if row["status"] == "ok"
            else {}
        )
    return row | _speaker(clip, prompt, by, row)


def _speaker(
    clip: Clip, prompt: Prompt | None, by: Evaluators, row: dict[str, Any]
) -> dict[str, Any]:
    """Measures of somebody who speaks."""
    found: dict[str, Any] = {}
    phones = None
    reading = None
    if row["status"] in ("ok", "no_picture"):
        phones = visual_speech.hear(clip, by.recognizer)
        if prompt is not None and prompt.text:
            found |= speech.speech(
                clip, prompt.text, prompt.language, prompt.phones, phones, by.recognizer
            )
            found |= attribute_accuracy.gender_of_voice(clip, prompt.gender)
    if row["status"] in ("ok", "no_sound"):
        assert clip.frames is not None
        reading = evaluators.read_faces(clip.frames, by.face_reader)
        share = float((reading.face > 0.5).mean())
        if share < LEAST_FACE:
            found |= {"status": "no_face", "face_share": share}
        else:
            found |= visual_speech.deflicker_strength(clip, reading, by.face_reader)
        if prompt is not None:
            found |= attribute_accuracy.attribute_accuracy(reading, prompt.attributes, prompt.told)
    if (
        row["status"] == "ok"
        and "status" not in found
        and reading is not None
        and phones is not None
    ):
        if any(phone.symbol != visual_speech.SILENCE for phone in phones):
            found |= visual_speech.visual_speech(clip, reading, phones) | _sync(
                clip, reading, by.lip_network
            )
        else:
            found["status"] = "no_speech"
    return found


def _sync(clip: Clip, reading: evaluators.FaceReading, network: LipNetwork) -> dict[str, Any]:
    """Offset by the lip network, {} for a clip that is too short."""
    assert clip.audio is not None and clip.sample_rate is not None and clip.fps is not None
    reach = min(evaluators.REACH, 0.45 * clip.audio.shape[-1] / clip.sample_rate)
    try:
        curve = evaluators.sync_curve(
            reading.points,
            visual_speech.frame_times(clip),
            clip.audio,
            clip.sample_rate,
            reach,
            network,
        )
    except ValueError:
        return {}
    frames = curve.offset * float(clip.fps)
    return {
        "offset_ms": 1000 * curve.offset,
        "offset_frames": frames,
        "within_1_frame": abs(frames) <= 1.0,
        "sync_score": curve.score,
        "sync_score_at_0": curve.score_at_zero,
    }


def measure_file(
    path: str | Path, prompt: Prompt | None = None, by: Evaluators | None = None, mos: bool = False
) -> dict[str, Any]:
    """The row of a file; one that cannot be read or measured has status "error" and says why."""
    row: dict[str, Any] = {"file": str(path)}
    if prompt is not None:
        row |= {
            "id": prompt.id,
            "kind": prompt.kind,
            "language": prompt.language,
            "prompt": prompt.prompt,
        }
    try:
        return row | measure_clip(read_clip(path, max_seconds=LONGEST), prompt, by, mos)
    except (ValueError, OSError) as error:
        return row | {"status": "error", "error": str(error)}


def score(clip: Clip, prompt: Prompt, by: Evaluators | None = None) -> float:
    """Reward of a whole clip, 0 to 1: words, lips and looks in equal parts; for an event, sound
    against picture.
    """
    by = by or Evaluators.bundled()
    if prompt.kind == "event":
        return events.score(clip, prompt.contacts, by.contact_detector)
    row = measure_clip(clip, prompt, by)
    said = max(0.0, 1 - row["phone_errors"] / row["phones"]) if row.get("phones") else 0.0
    lips = row.get("mouth_r", math.nan)
    lips = max(0.0, lips) if math.isfinite(lips) else 0.0
    looks = (
        row["attributes_right"] / row["attributes_stated"] if row.get("attributes_stated") else 1.0
    )
    return (said + lips + looks) / 3


def find_prompt(path: str | Path, prompts: Sequence[Prompt]) -> Prompt | None:
    """The prompt whose id begins the name of the file ("en-digits-03-s1.mp4"), None if there is
    none.
    """
    name = Path(path).stem
    return next((p for p in prompts if name == p.id or name.startswith(p.id + "-")), None)
