"""The held-out prompts: enough of them, and nothing in them was trained."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from avdiff.corpus.face.presenter import identity_split, sample_identity
from avdiff.corpus.speech.read import LANGUAGES, REPO_BANK, SpeechCorpus, normalised_text
from avdiff.data import heldout
from avdiff.phonetics.phone import SILENCE, inventory


def test_prompts_are_held_out() -> None:
    prompts = heldout.load_prompts()
    assert len(prompts) >= 200 and len({p.id for p in prompts}) == len(prompts)
    kinds = Counter(p.kind for p in prompts)
    assert min(kinds[k] for k in ("digits", "grid", "event")) >= 20 and {
        p.language for p in prompts
    } == set(LANGUAGES)
    trained = {normalised_text(u.text) for u in SpeechCorpus(REPO_BANK) if u.split == "train"}
    known = set(inventory()[0])
    for prompt in prompts:
        assert prompt.prompt and prompt.seconds > 0.5
        if prompt.kind == "event":
            assert not prompt.text and prompt.contacts > 0
            continue
        assert prompt.text in prompt.prompt and normalised_text(prompt.text) not in trained
        assert prompt.phones and set(prompt.phones) <= known - {SILENCE}
        assert all(prompt.attributes[name] != "none" for name in prompt.told)
        if (
            prompt.attributes["hair_style"] != "bald"
        ):  # the hair colour of the bald is part of the combination
            looks = {
                name: prompt.attributes[name]
                for name in (
                    "gender",
                    "skin",
                    "hair_style",
                    "hair_color",
                    "beard",
                    "glasses",
                    "face_shape",
                )
            }
            assert (
                identity_split(replace(sample_identity(np.random.default_rng(0)), **looks))
                == "test"
            )


def test_told_attributes_are_those_the_caption_speaks_of() -> None:
    look = {
        "gender": "female",
        "skin": "tan",
        "hair_color": "red",
        "hair_style": "bob",
        "glasses": "round glasses",
        "hat": "none",
        "beard": "none",
        "clothes": "hoodie",
        "clothes_color": "green",
        "background_color": "mint",
    }
    for seed in range(20):
        told = heldout.told_attributes(look, "hello", "en", 0, seed)
        caption = heldout.speech_captions(look, "hello", "en", np.random.default_rng(seed))[0]
        exact = (
            "value" if "round glasses" in caption else "presence" if "glasses" in caption else None
        )
        assert told.get("glasses") == exact or "spectacles" in caption
        assert ("clothes_color" in told) == ("a green hoodie" in caption) == ("clothes" in told)
        assert "hat" not in told and "beard" not in told
