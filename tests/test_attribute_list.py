"""Lists of all that a drawing shows, behind captions; and the cast of named presenters."""

import json

import numpy as np
from transformers import AutoTokenizer

import avdiff
from avdiff.corpus.attribute_list import attribute_list, caption_with_list, with_list
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.cast import cast_member, cast_member_in, cast_members
from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.events.scene import sample_event
from avdiff.corpus.face.identity import identity_split, sample_identity
from avdiff.corpus.speech.read import REPO_BANK


def corpus(**options):
    return PresenterCorpus(REPO_BANK, length=60, video=False, audio=False, **options)


def test_the_list_names_what_captions_cannot_say():
    identity = sample_identity(np.random.default_rng(4), "female")
    listed = attribute_list(identity).split(", ")
    assert listed[0] == "female"
    assert f"{identity.background_color} {identity.background} background" in listed
    assert identity.hair_style in listed
    assert f"{identity.nose} nose" in listed
    event = sample_event(np.random.default_rng(4), 3.0, "ball")
    assert f"{event.floor} floor" in attribute_list(event).split(", ")


def test_a_caption_and_its_description_get_the_same_text():
    listed = "female, red hair"
    for caption in ('A woman says "hi"', 'A woman says: "hi".', '"hi", says a woman', '"hi"'):
        told = parse_prompt(caption_with_list(caption, listed))
        assert told == (with_list(parse_prompt(caption)[0], listed), "hi")


def test_no_list_is_cut_by_the_caption_encoder():
    folder = avdiff.PRESENTER
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
    with open(f"{folder}/text_encoder/config.json", encoding="utf8") as file:
        longest = json.load(file)["max_length"]
    lengths = []
    clips = corpus(attribute_lists=1.0, names=0.5, full_captions=0.5)
    for clip in clips:
        texts = [parse_prompt(caption)[0] for caption in clip["captions"]]
        lengths += [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert np.mean(np.array(lengths) > longest) == 0
    assert np.median(lengths) > 50


def test_shares_of_none_leave_the_corpus_as_it_was():
    plain = corpus(full_captions=0.4)
    listed = corpus(full_captions=0.4, attribute_lists=1.0)
    for before, after in zip(plain, listed, strict=True):
        assert before["phones"] == after["phones"]
        assert before["attributes"] == after["attributes"]
        spoken = [parse_prompt(caption)[1] for caption in before["captions"]]
        assert [parse_prompt(caption)[1] for caption in after["captions"]] == spoken


def test_a_name_says_who_it_is_and_how_they_sound():
    members = cast_members()
    assert len(members) >= 2000
    assert len({member.name for member in members}) == len(members)
    voices = {}
    found = 0
    for clip in corpus(names=1.0, event_share=0.0):
        name = clip["attributes"].get("name")
        member = cast_member(name)
        assert clip["attributes"]["gender"] == member.gender
        assert identity_split(member.identity) == "train"
        voice = clip["attributes"]["voice"]
        assert voices.setdefault((name, clip["language"]), voice) == voice
        assert all(name in caption for caption in clip["captions"])
        found += any(parse_prompt(c)[0] == f"{name} says" for c in clip["captions"])
    assert found > 5


def test_the_longest_name_is_found_in_any_case():
    assert cast_member_in("here anna maria rossi speaks").name == "Anna Maria Rossi"
    assert cast_member_in("王雪梅说").name == "王雪梅"
    assert cast_member_in("a woman speaks") is None
