"""Drawn presenters: who they are, how they move, how they look, and the truth about their lips."""

from __future__ import annotations

from avdiff.corpus.face.drawing import render_face
from avdiff.corpus.face.identity import Identity, identity_key, identity_split, sample_identity
from avdiff.corpus.face.motion import Pose, pose_track
from avdiff.corpus.face.mouth import lip_points, mouth_opening, mouth_opening_from_pixels

__all__ = [
    "Identity",
    "Pose",
    "identity_key",
    "identity_split",
    "lip_points",
    "mouth_opening",
    "mouth_opening_from_pixels",
    "pose_track",
    "render_face",
    "sample_identity",
]
