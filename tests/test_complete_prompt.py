"""Descriptions completed by a seed: what is stated stays, the rest is drawn as in the corpus."""

from collections import Counter

import pytest

from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.cast import cast_member
from avdiff.corpus.complete_prompt import complete_description
from avdiff.corpus.stated_attributes import language_of, stated_attributes
from avdiff.data.heldout import load_prompts


def completed(description, language="en", seed=1, **options):
    return complete_description(description, language, seed, **options)[1]


@pytest.mark.parametrize(
    ("description", "language", "expected"),
    [
        ("A woman with a red-haired bob and glasses", "en", {"hair_color": "red"}),
        ("A bald man with no glasses in a turquoise shirt", "en", {"hair_style": "bald"}),
        ("a man in a turquoise shirt", "en", {"clothes": "shirt", "clothes_color": "teal"}),
        ("a woman whose hair is pink and whose shirt is yellow", "en", {"clothes_color": "yellow"}),
        ("a lady by a window without a hat", "en", {"background": "window", "hat": "none"}),
        ("someone in red", "en", {"clothes_color": "red"}),
        ("Una mujer con pelo rizado y rojo", "es", {"hair_style": "curly", "hair_color": "red"}),
        ("Une femme blonde sans lunettes", "fr", {"hair_color": "blonde", "glasses": "none"}),
        ("Un uomo con occhi azzurri", "it", {"gender": "male", "eye_color": "blue"}),
        ("Uma mulher de suéter azul-marinho", "pt", {"clothes_color": "navy"}),
        ("लाल बालों और गोल चश्मे वाली एक महिला", "hi", {"glasses": "round glasses"}),
        ("眼鏡をかけていない黒い髪の女性", "ja", {"glasses": "none", "hair_color": "black"}),
        ("一位戴圆框眼镜、红色卷发的女士", "zh", {"hair_style": "curly", "hair_color": "red"}),
        ("A marble bounces on a steel plate", "en", {"material": "glass", "floor": "metal"}),
        ("Une boule en bois rebondit sur un sol en pierre", "fr", {"floor": "stone"}),
        ("金属のドアをノックする", "ja", {"event": "knock", "material": "metal"}),
    ],
)
def test_stated_words_stay_in_eight_languages(description, language, expected):
    for seed in range(6):
        attributes = completed(description, language, seed)
        assert {name: attributes[name] for name in expected} == expected


def test_what_the_corpus_cannot_draw_is_left_to_the_words():
    attributes = completed("a girl in a chartreuse sweater and sunglasses, in a kitchen")
    assert attributes["clothes"] == "sweater"
    assert not {"clothes_color", "glasses", "background"} & set(attributes)
    assert not {"clothes", "clothes_color"} & set(completed("a woman in a striped dress"))
    described = "something falls over"
    assert complete_description(described, "en", 0, event=True) == (described, {})


def test_no_heldout_prompt_is_contradicted():
    wrong = []
    for prompt in load_prompts():
        description, spoken = parse_prompt(prompt.prompt)
        language = language_of(description, prompt.language)
        stated = stated_attributes(description, language, event=spoken is None)
        for name, values in stated.items():
            drawn = prompt.attributes.get({"kind": "event"}.get(name, name))
            if drawn is not None and drawn not in values:
                wrong.append((description, name, drawn, sorted(values)))
    assert wrong == []


def test_a_seed_decides_once_and_a_further_word_changes_what_it_says_alone():
    first = complete_description("A woman", "en", 3)
    assert complete_description("A woman", "en", 3) == first
    with_hat = completed("A woman with a red cap", seed=3)
    changed = {name for name in with_hat if with_hat[name] != first[1][name]}
    assert changed <= {"hat", "hat_color"}
    assert len({completed("A woman", seed=seed)["hair_color"] for seed in range(30)}) > 4


def test_open_attributes_are_drawn_as_often_as_in_the_corpus():
    many = [completed("A person", seed=seed) for seed in range(400)]
    share = {name: Counter(a[name] for a in many) for name in ("gender", "glasses", "background")}
    assert 0.4 < share["gender"]["female"] / 400 < 0.6
    assert 0.58 < share["glasses"]["none"] / 400 < 0.74  # 0.66 in the corpus
    assert 0.1 < share["background"]["window"] / 400 < 0.2  # 0.15
    assert all(a["beard"] == "none" for a in many if a["gender"] == "female")


def test_a_name_brings_its_look_and_stated_words_override_it():
    look = cast_member("Anna Dupont").identity
    attributes = completed("Anna Dupont with green eyes in a white hoodie")
    assert attributes["hair_style"] == look.hair_style
    assert attributes["skin"] == look.skin
    assert (attributes["eye_color"], attributes["clothes_color"]) == ("green", "white")
    seen = completed("a man with a beard", seen={"hair_color": "red", "beard": "none"})
    assert (seen["hair_color"], seen["beard"]) == ("red", "full beard")
    with pytest.raises(ValueError, match="seed=-1: needs 0 or more"):
        complete_description("a man", "en", -1)
