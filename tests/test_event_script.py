"""Events on the clock: what a caption tells, when it is struck, and what the pipeline makes of
it.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from avdiff.corpus import prompt as event_prompt
from avdiff.corpus.captions import event_captions
from avdiff.corpus.events.scene import KINDS, STROKE, onset_phones, sample_event
from avdiff.corpus.prompt import onset_track, onsets_in_caption
from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.phoneme_encoder import PhonemeEncoder
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.phone import ONSET, ONSET_ID, Phone, inventory, phone_id
from avdiff.phonetics.track import track_from_phones
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.pipelines.prompt import ClipLength, plan_clip
from avdiff.pipelines.request import FrameFormat
from avdiff.train.joint.aux_heads import IGNORED, viseme_labels
from tests.test_finetune import CLIP
from tests.tiny import tiny_components

LANGUAGES = ("en", "es", "fr", "hi", "it", "ja", "pt", "zh")


def test_every_caption_of_the_corpus_tells_its_number_and_whether_it_is_a_ball():
    rng, told = np.random.default_rng(0), 0
    for language in LANGUAGES:
        for kind in KINDS:
            for _ in range(6):
                event = sample_event(rng, 3.0, kind)
                for caption in event_captions(event, language, rng):
                    assert onsets_in_caption(caption) == len(event.contacts), caption
                    ball = bool(event_prompt.BALLS.search(event_prompt._plain(caption)))
                    assert ball == (kind == "ball"), caption
                    told += 1
    assert told > 1000


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("a bell rings twice", 2),
        ("3 times a stick beats a drum", 3),
        ("दो हाथ पांच बार ताली बजाते हैं", 5),
        ("敲了4次", 4),
        ("a spoon taps a glass", None),
        ("a woman with one earring", None),
        ("somebody claps thrice", 3),
    ],
)
def test_numbers_are_read(text, count):
    assert onsets_in_caption(text) == count


def test_strokes_fill_the_clip_as_told():
    for count in range(1, 7):
        phones = onset_track(f"a rubber ball bounces {count} times", 3.5, seed=count)
        starts = [p.start for p in phones]
        assert len(phones) == count and all(p.symbol == ONSET for p in phones)
        assert starts[0] > 0 and starts[-1] < 3.5 - 0.2
        if count > 2:
            assert np.all(
                np.diff(starts, 2) < 0
            )  # each flight of a ball is shorter than the one before
    assert onset_track("a drum is struck twice", 3.0, 1) == onset_track(
        "a drum is struck twice", 3.0, 1
    )
    assert onset_track("a drum is struck twice", 3.0, 1) != onset_track(
        "a drum is struck twice", 3.0, 2
    )
    drawn = {len(onset_track("a bell rings", 3.0, seed)) for seed in range(40)}
    assert len(drawn) > 3
    for count, words in ((9, "at most 6 strokes"), (6, "longer clip")):
        with pytest.raises(ValueError, match=words):
            onset_track(f"a drum is struck {count} times", 1.0, 0)


def test_strokes_are_a_symbol_of_their_own():
    assert phone_id(ONSET) == ONSET_ID
    assert len(inventory()[0]) <= ONSET_ID
    first, second = onset_phones((0.5, 0.53))
    assert first.end == 0.53 and second.end == pytest.approx(0.53 + STROKE)
    with pytest.raises(ValueError, match="onset_track needs 128"):
        AVTransformer(**{**presets.tiny(), "num_phonemes": 120, "onset_track": True})


def test_a_prompt_without_words_gets_strokes_where_the_model_knows_them():
    frame = FrameFormat(height=64, width=64, clock=CLIP.clock)
    length = ClipLength(3.0)
    texts = ["a drum is struck three times", 'a man says "no"', "a man"]
    plain = plan_clip(texts, frame, length)
    struck = plan_clip(texts, frame, length, event_seeds=[1, 2, 3])
    assert [len(p) for p in plain.phones][::2] == [0, 0] and plain.track.present.tolist() == [
        False,
        True,
        False,
    ]
    assert struck.track.present.tolist() == [True, True, False]
    assert (struck.track.phonemes[0] == ONSET_ID).sum() == 3 and not (
        struck.track.phonemes[1] == ONSET_ID
    ).any()
    assert struck.phones[1] == plain.phones[1]
    heard = plan_clip(
        texts, frame, length, has_media=True, event_seeds=[1, 2, 3]
    )  # what is given tells when
    assert heard.track.present.tolist() == [False, True, False]


def test_the_pipeline_strikes_by_seed():
    parts = tiny_components()
    config = {**dict(parts["transformer"].config), "num_phonemes": 128, "onset_track": True}
    parts["transformer"] = AVTransformer(
        **{k: v for k, v in config.items() if not k.startswith("_")}
    ).eval()
    pipe = AVDiffPipeline(**parts)
    one = torch.Generator().manual_seed(5)
    assert pipe._event_seeds([one, torch.Generator().manual_seed(6)], 2) == [5, 6]
    assert pipe._event_seeds(one, 2) == [5, 6]
    torch.manual_seed(0)
    assert len(set(pipe._event_seeds(None, 3))) == 3
    assert AVDiffPipeline(**tiny_components())._event_seeds(one, 2) is None


def test_the_picture_reads_strokes_but_not_words():
    torch.manual_seed(0)
    encoder = PhonemeEncoder(128, 8, 16, 4, 24, 32, onset_track=True)
    words = (Phone("a", 0.1, 0.3), Phone("t", 0.3, 0.4))
    track = track_from_phones([words, onset_phones((0.1, 0.3)), ()], CLIP)
    positions = Positions.of(CLIP)
    sound, video = encoder(track, positions)
    assert video.abs().amax((1, 2)).gt(0).tolist() == [False, True, False]
    assert sound.abs().amax((1, 2)).gt(0).tolist() == [True, True, False]
    warp = np.full(CLIP.mel_frames, 0.08)
    told = track_from_phones([words, onset_phones((0.1, 0.3)), ()], CLIP, [warp] * 3)
    straight = track_from_phones([words, onset_phones((0.1, 0.3)), ()], CLIP, to_video=True)
    (_, warped), (_, exact) = encoder(told, positions), encoder(straight, positions)
    assert not torch.equal(
        warped[0], exact[0]
    )  # words may be warped for the picture, strokes never are
    torch.testing.assert_close(warped[1], exact[1])
    torch.testing.assert_close(video[1], exact[1])
    plain = PhonemeEncoder(128, 8, 16, 4, 24, 32)
    assert plain(track, positions)[1] is None


def test_strokes_have_no_viseme():
    track = track_from_phones([(Phone("a", 0.1, 0.3),), onset_phones((0.1, 0.3))], CLIP)
    labels = viseme_labels(track, Positions.of(CLIP))
    assert (labels[0] != IGNORED).all()
    assert (labels[1] == IGNORED).any() and (
        labels[1] != IGNORED
    ).any()  # silence between strokes is a closed mouth
