"""Captions: many natural ways to say what a clip shows and what is spoken, in eight languages, and
the way back.

The words are tables in `avdiff/bundled/captions.json`; this module chooses, orders and joins them.
In a template, `A|B` holds the form for a woman and for a man; a Japanese feature holds its joining
and its final form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from avdiff.corpus.events.scene import Event
from avdiff.files import BUNDLED

FEATURES = ("hair", "glasses", "beard", "hat", "eye_color", "earrings", "lipstick", "skin")
WEIGHTS = {
    "hair": 6.0,
    "glasses": 5.0,
    "beard": 5.0,
    "hat": 4.0,
    "eye_color": 1.0,
    "earrings": 1.0,
    "lipstick": 1.0,
    "skin": 1.0,
}
FEATURE_COUNTS = (0.12, 0.22, 0.30, 0.24, 0.12)  # chance of 0, 1, 2... features in a caption
OWN_COLOUR = (
    "wood",
    "metal",
    "skin",
    "brass",
    "silver",
    "hands",
)  # materials whose colour goes without saying
NAME_ALONE = 0.7  # of the captions of a clip whose presenter has a name
_ARTICLES = re.compile("एक |一位")  # in patterns of what somebody has; a name takes none
SPEECH = "\x00"  # stands for the quoted words until the sentence around them is finished


@cache
def phrases(language: str) -> dict[str, Any]:
    """The table of a language.

    Raises:
        ValueError: a language without a table.
    """
    tables = json.loads((BUNDLED / "captions.json").read_text(encoding="utf8"))
    if language not in tables:
        raise ValueError(f"language={language!r}: captions are written in {', '.join(tables)}")
    return tables[language]


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _form(text: str, second: bool) -> str:
    """`A|B` -> A or B; a text without a bar is both."""
    first, bar, other = text.partition("|")
    return other if second and bar else first


def join_sentences(texts: Sequence[str], language: str, rng: np.random.Generator) -> str:
    """Sentences of one clip as one text, with one kind of joint throughout."""
    joint = _pick(rng, phrases(language)["join"])
    joined = texts[0]
    for text in texts[1:]:
        ended = joined.rstrip()[-1:] in ".?!。？！।"
        joined += (joint[1:] if ended else joint) + text
    return joined


def speech_captions(
    attributes: Mapping[str, str],
    text: str,
    language: str,
    rng: np.random.Generator,
    full_share: float = 0.0,
    name: str = "",
) -> list[str]:
    """Captions of a presenter who says `text`: four in English, then (for other languages) two in
    the language.

    Args:
        attributes: as `Identity.attributes()`; "none" or a missing key is not told. `augmented`
            lists degradations.
        text: spoken words. language: code of the language they are in.
        full_share: chance of a caption that tells most of what is there to be seen, where people
            tell some of it.
        name: of the presenter: it stands alone in most captions, in the others with features.
    """

    def caption(written: str) -> str:
        full = full_share > 0 and rng.random() < full_share
        return _speech_caption(attributes, text, written, language, rng, full, name)

    captions = [caption("en") for _ in range(4)]
    return captions if language == "en" else captions + [caption(language) for _ in range(2)]


def _speech_caption(
    attributes: Mapping[str, str],
    text: str,
    language: str,
    spoken: str,
    rng: np.random.Generator,
    full: bool,
    name: str = "",
) -> str:
    table = phrases(language)
    draw = rng.random(5)
    male = attributes.get("gender") == "male"
    pronoun = table.get("pronoun", {}).get("male" if male else "female", "")
    if name and rng.random() < NAME_ALONE:
        template = _pick(rng, table["say"])
        words = {"who": name, "she": pronoun}
    elif draw[0] < 0.08 and not full and not name:
        template = _pick(rng, table["speech_only"])
        words = {}
    else:
        words = {
            "who": _who(attributes, table, rng, full, name),
            "she": pronoun,
        }
        background = attributes.get("background_color", "none")
        if draw[1] < (0.8 if full else 0.3) and background in table["colors"]:
            forms = table["colors"][background]
            words |= {
                "background": _pick(rng, table["background"]).format(**forms),
                "color": next(iter(forms.values())),
            }
            template = _pick(rng, table["say_background"])
        elif "in_language" in table and draw[2] < (0.04 if spoken == "en" else 0.4):
            words["language"] = table["language"][spoken]
            template = _pick(rng, table["in_language"])
        else:
            template = _pick(rng, table["say"])
    sentence = _form(template, male).format(speech=SPEECH, **words)
    for kind, options in table.get("noise", {}).items():
        if kind in attributes.get("augmented", "") and draw[3] < 0.6:
            sentence += " " + _pick(rng, options)
            break
    quote = table["quote"][0] if draw[4] < 0.75 else _pick(rng, table["quote"])
    return _finish(sentence, language, rng).replace(SPEECH, quote.format(text))


def _who(
    attributes: Mapping[str, str],
    table: Mapping[str, Any],
    rng: np.random.Generator,
    full: bool,
    name: str = "",
) -> str:
    """The person, or the bearer of a name, with some of what can be seen: "a woman with red hair
    and glasses".
    """
    gender = "male" if attributes.get("gender") == "male" else "female"
    told = _features(attributes, table, rng, full)
    person = name or _pick(rng, table["person"][gender])
    adjective = "" if name else _adjective(attributes, table, told, rng)
    if adjective:
        person = table["adjective_person"].format(
            adjective=adjective, noun=_pick(rng, table["noun"][gender])
        )
    listed = list(told.values())
    if table.get("chain"):
        listed = [_form(text, second=i == len(listed) - 1) for i, text in enumerate(listed)]
    if listed:
        items = (
            listed[0]
            if len(listed) == 1
            else table["comma"].join(listed[:-1]) + table["and"] + listed[-1]
        )
        pattern = _form(_pick(rng, table["with"]), gender == "male")
        if name:
            pattern = _ARTICLES.sub("", pattern)
        who = pattern.format(person=person, list=items)
    elif name:
        who = name
    else:
        who = table.get("alone", {}).get(gender, "{person}").format(person=person)
    clothes = attributes.get("clothes", "none")
    if (
        "wearing" in table
        and clothes in table["clothes"]
        and rng.random() < (0.8 if full else 0.35)
    ):
        worn = _pick(rng, table["clothes"][clothes]).format(
            **table["colors"][attributes["clothes_color"]]
        )
        who = _form(_pick(rng, table["wearing"]), gender == "male").format(who=who, clothes=worn)
    return who


def _features(
    attributes: Mapping[str, str], table: Mapping[str, Any], rng: np.random.Generator, full: bool
) -> dict[str, str]:
    """Some of the features, or most of them, in the order of telling."""
    can: dict[str, list[str]] = {}
    for name in FEATURES:
        value = attributes.get("hair_style" if name == "hair" else name, "none")
        if name == "hair":
            can |= _hair(attributes, table, rng)
        elif value in table.get(name, {}):
            forms = (
                table["colors"].get(attributes.get("hat_color", ""), {}) if name == "hat" else {}
            )
            if name != "hat" or forms:
                can[name] = [text.format(**forms) for text in table[name][value]]
    if "wearing" not in table and attributes.get("clothes") in table["clothes"]:
        forms = table["colors"][attributes["clothes_color"]]
        can["clothes"] = [text.format(**forms) for text in table["clothes"][attributes["clothes"]]]
    few = int(rng.choice(len(FEATURE_COUNTS), p=FEATURE_COUNTS))
    count = min(len(can), int(rng.integers(3, len(FEATURES) + 1)) if full else few)
    if not count:
        return {}
    weights = np.array([WEIGHTS.get(name, 2.0) for name in can])
    chosen = [
        list(can)[i] for i in rng.choice(len(can), count, replace=False, p=weights / weights.sum())
    ]
    if rng.random() < 0.6:
        chosen.sort(key=lambda name: name != "hair")  # most people name the hair first
    return {name: _pick(rng, can[name]) for name in chosen}


def _hair(
    attributes: Mapping[str, str], table: Mapping[str, Any], rng: np.random.Generator
) -> dict[str, list[str]]:
    """Ways to tell colour and style of the hair: often the colour alone."""
    style = attributes.get("hair_style", "")
    color = attributes.get("hair_color", "none")
    if style == "bald":
        return {"hair": table["hair"]["bald"]}
    if color not in table["hair_color"]:
        return {}
    patterns = table["hair"][style if rng.random() < 0.6 and style in table["hair"] else ""]
    name = _pick(rng, table["hair_color"][color])
    return {"hair": [pattern.format(hair=name) for pattern in patterns]}


def _adjective(
    attributes: Mapping[str, str],
    table: Mapping[str, Any],
    told: dict[str, str],
    rng: np.random.Generator,
) -> str:
    """Sometimes a feature becomes an adjective ("a bearded man") and leaves the list."""
    adjectives = table.get("adjective")
    if not adjectives or rng.random() > 0.3:
        return ""
    for name, value in (("beard", attributes.get("beard")), ("hair", attributes.get("hair_color"))):
        options = (
            adjectives["bald"]
            if name == "hair" and attributes.get("hair_style") == "bald"
            else adjectives[name].get(value)
        )
        if name in told and options:
            del told[name]
            return _pick(rng, options)
    return ""


def _finish(sentence: str, language: str, rng: np.random.Generator) -> str:
    """Spaces, elisions, a capital letter, sometimes a full stop."""
    sentence = re.sub(r",\s*([.:]|$)", r"\1", re.sub(r"\s+", " ", sentence)).strip()
    sentence = re.sub(r",\s*,", ",", sentence)
    if language == "en":
        sentence = re.sub(r"\ba (?=[aeio])", "an ", sentence, flags=re.IGNORECASE)
        sentence = re.sub(r"\. ([a-z])", lambda m: ". " + m[1].upper(), sentence)
    if language == "fr":
        sentence = re.sub(r"\bde (?=une?\b)", "d'", sentence)
    sentence = sentence[:1].upper() + sentence[1:]
    if not sentence.endswith(SPEECH) and rng.random() < 0.3:
        sentence += {"hi": "।", "ja": "。", "zh": "。"}.get(language, ".")
    return sentence


def event_captions(event: Event, language: str, rng: np.random.Generator) -> list[str]:
    """Captions of an event with the number of impacts: four in English, two in the language if it
    is another.
    """
    captions = [_event_caption(event, "en", rng) for _ in range(4)]
    return captions + [
        _event_caption(event, language, rng) for _ in range(2 if language != "en" else 0)
    ]


def _event_caption(event: Event, language: str, rng: np.random.Generator) -> str:
    table = phrases(language)
    plain = (
        event.kind in ("ball", "bell", "knock") and event.material in OWN_COLOUR
    ) or rng.random() < 0.4
    forms = {key: "" if plain else value for key, value in table["colors"][event.color].items()}
    sizes = {key: _pick(rng, value) for key, value in table["size"][event.size].items()}
    if rng.random() < 0.4:
        sizes = dict.fromkeys(sizes, "")
    words = {
        **forms,
        **{f"size_{key}": value for key, value in sizes.items()},
        "color": forms.get("c", ""),
        "size": sizes.get("c", ""),
        "times": table["times"][len(event.contacts) - 1],
    }
    for name, key in (
        ("ball", event.material),
        ("floor", event.floor),
        ("bell", event.material),
        ("door", event.material),
    ):
        if key in table[name]:
            words[name] = _pick(rng, table[name][key]).format(**words)
    sentence = _pick(rng, table["event"][event.kind]).format(**words)
    if event.kind not in ("ball", "knock") and rng.random() < 0.25:
        background = _pick(rng, table["background"]).format(**table["colors"][event.background])
        sentence = _pick(rng, table["event_background"]).format(
            event=sentence, background=background
        )
    return _finish(sentence, language, rng)


QUOTES = (
    ("“", "”"),
    ("„", "“"),
    ("„", "”"),
    ("«", "»"),
    ("»", "«"),
    ("「", "」"),
    ("『", "』"),
    ("‹", "›"),
    ("《", "》"),
    ("″", "″"),
    ("＂", "＂"),
    ("``", "''"),
)
# Marks that keyboards and word processors make in other ways too: a straight mark behind a digit is
# an inch, ’ inside a word an apostrophe, and a straight mark may be closed by a curly one.
_KEYED = (
    r'(?<!\d)"([^"“”]+)”',
    r'(?<!\d)"((?:(?!").)+)"',
    r'“([^“”"]+)"(?!\w)',
    r"‘((?:(?!’(?!\w)).)+)’(?!\w)",
)
_SPOKEN = re.compile(
    "|".join(
        [*(f"{re.escape(a)}((?:(?!{re.escape(b)}).)+){re.escape(b)}" for a, b in QUOTES), *_KEYED]
    ),
    re.DOTALL,
)
# single straight quotes also mark apostrophes: they quote only where no word touches them outside
# or is cut by them
_SINGLE = re.compile(r"(?<!\w)'(\S(?:[^']|(?<=\w)'(?=\w))*?)'(?!\w)", re.DOTALL)
_OPEN = re.compile(r"(?<![\d\w\"])[\"“„«「]\s*([^\"“”„«»「」]+)$", re.DOTALL)
_VERBS = (
    r"says?|said|saying|speaks?|speaking|tells? "
    r"us|announces?|asks?|replies|whispers?|shouts?|dice|diciendo|dicen|"
    r"dit|disant|diz|dizendo|कहत[ाीे] है|बोलत[ाीे] है|说|說|と言う|言う"
)
_COLON = re.compile(
    rf"(?:\b(?:{_VERBS})[^:：\n]{{0,24}}|说|說)\s?[:：]\s*(\S.*)$", re.DOTALL | re.IGNORECASE
)


def parse_prompt(prompt: str) -> tuple[str, str | None]:
    """Split a prompt into what is seen and what is spoken.

    Knows “ ” " " „ “ « » 「 」 『 』 ‘ ’ and ' ', a quotation left open at the end,
    and `says: words`
    without quotes. Several quotations are joined by a comma.

    Returns:
        (description without the spoken words, spoken words or None). A prompt that is all quotation
        has description "".
    """
    for pattern in (_SPOKEN, _SINGLE, _OPEN):
        found = [
            next(g for g in match.groups() if g is not None) for match in pattern.finditer(prompt)
        ]
        spoken = [part.strip().rstrip(",，、 ") for part in found if part.strip(" ,.;，、。")]
        if spoken:
            return _tidy(pattern.sub(" ", prompt)), ", ".join(spoken)
    colon = _COLON.search(prompt)
    if colon:
        return _tidy(prompt[: colon.start(1)]), colon[1].strip()
    return _tidy(prompt), None


def _tidy(text: str) -> str:
    """No double spaces, no punctuation left over where the quotation was."""
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s+([,.;:!?，。])", r"\1", text)
    text = re.sub(r"([,:;，：])(?:\s*[,:;.，：。])+", r"\1", text)
    return text.strip(" ,:;，：、").removeprefix(".").strip()
