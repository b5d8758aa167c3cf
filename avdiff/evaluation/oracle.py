"""What a perfect generator would score: the corpus draws and says the held-out prompts itself.

The clips are measured by the same evaluators as a generator's, so whatever they read wrong shows
here. Digit strings and GRID commands have no recording in the bank and so no clip; a prompt's
colours are drawn as the plain colour of their name, and events have strokes at other times than
anybody asked for, but as many.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from avdiff.clip import ClipSpec, midpoints
from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import Event, sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.corpus.face import identity as looks
from avdiff.corpus.face.presenter import Identity, pose_track, render_face, sample_identity
from avdiff.corpus.speech.concatenate import cut_piece, join_pieces
from avdiff.corpus.speech.read import SAMPLE_RATE, SpeechCorpus
from avdiff.data.heldout import Prompt
from avdiff.media.write import Clip
from avdiff.phonetics.visemes import viseme_track

# seconds before, after and between sentences
LEAD = 0.12
TAIL = 0.30
PAUSE = 0.2
SIZE = 128
FPS = 25
TRIES = 5000  # scenes drawn until one has the wanted number of strokes


def presenter_of(prompt: Prompt) -> Identity:
    """A presenter with all the looks of a prompt; what no word tells (sizes, nose...) follows from
    its seed.
    """
    rng = np.random.default_rng(prompt.seed)
    wanted = prompt.attributes
    base = sample_identity(rng, wanted["gender"])
    tables = {
        "hair": looks.HAIRS,
        "hat": looks.COLORS,
        "clothes": looks.COLORS,
        "background": looks.BACKDROPS,
        "eye": looks.IRISES,
    }
    drawn: dict[str, Any] = {"skin_rgb": looks.SKINS[wanted["skin"]]}
    for name, table in tables.items():
        value = wanted.get(f"{name}_color", "none")
        if value in table:
            drawn[f"{name}_rgb"] = table[value]
    if wanted.get("lipstick", "none") in looks.LIPSTICKS:
        drawn["lip_rgb"] = looks.LIPSTICKS[wanted["lipstick"]]
    drawn |= {
        name: value
        for name, value in wanted.items()
        if hasattr(base, name) and not (name in ("hair_color", "hat_color") and value == "none")
    }
    return replace(base, **drawn)


def event_of(prompt: Prompt) -> Event:
    """A scene with the kind, the number of strokes and the looks of a prompt.

    Raises:
        ValueError: no scene of that many strokes fits into the prompt's length.
    """
    rng = np.random.default_rng(prompt.seed)
    wanted = prompt.attributes
    for _ in range(TRIES):
        event = sample_event(rng, prompt.seconds, wanted["event"])
        if len(event.contacts) == prompt.contacts and event.material == wanted["material"]:
            return replace(
                event,
                color=wanted["color"],
                rgb=looks.COLORS[wanted["color"]],
                background=wanted["background_color"],
                background_rgb=looks.BACKDROPS[wanted["background_color"]],
                skin=wanted["skin"],
                skin_rgb=looks.SKINS[wanted["skin"]],
                floor=wanted.get("floor", event.floor),
            )
    raise ValueError(
        f"prompt {prompt.id}: no scene of {prompt.contacts} strokes in {prompt.seconds} s was drawn"
    )


def truth_clip(prompt: Prompt, bank: SpeechCorpus) -> Clip | None:
    """The corpus clip of a prompt, 128 pixels and 25 fps; None for words that the bank does not
    hold.
    """
    if prompt.kind == "event":
        event = event_of(prompt)
        spec = ClipSpec.from_seconds(prompt.seconds, FPS)
        times = midpoints(spec.num_frames, FPS)
        frames = np.stack([render_event(event, float(t), SIZE) for t in times])
        return Clip(
            frames, event_audio(event, spec.num_samples, SAMPLE_RATE)[None], spec.fps, SAMPLE_RATE
        )
    if not prompt.source:
        return None
    try:
        pieces = [cut_piece(bank[name]) for name in prompt.source]
    except KeyError:
        return None
    spoken = sum(piece.seconds for piece in pieces) + PAUSE * (len(pieces) - 1)
    spec = ClipSpec.from_seconds(round(LEAD + spoken + TAIL, 3), FPS)
    passage = join_pieces(pieces, [0.0] + [PAUSE] * (len(pieces) - 1), LEAD, spec.num_samples)
    times = midpoints(spec.num_frames, FPS)
    mouths = viseme_track(passage.phones, times)
    poses = pose_track(np.random.default_rng([prompt.seed, 1]), times, passage.phones)
    identity = presenter_of(prompt)
    frames = np.stack(
        [render_face(identity, m, p, SIZE) for m, p in zip(mouths, poses, strict=True)]
    )
    return Clip(frames, passage.audio[: spec.num_samples][None], spec.fps, SAMPLE_RATE)
