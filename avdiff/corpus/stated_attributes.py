"""What a description states of a presenter or an object, in words that people use.

Phrases are looked up in `avdiff/bundled/attribute_words.json` (wider than the caption tables, which
hold what the corpus writes) and colours belong to the noun they stand beside: before it in English,
Hindi, Japanese and Chinese, behind it in the Romance languages. A row of that file is
`values: phrases`, several of each parted by a bar: "curly|short curly|afro": "curly|curls".
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from functools import cache
from typing import NamedTuple

from avdiff.corpus.captions import phrases
from avdiff.corpus.face.identity import BACKDROPS, COLORS, HAIRS, IRISES, LIPSTICKS, SKINS
from avdiff.files import BUNDLED
from avdiff.models.prompt_domain import caption_words

OPEN: frozenset[str] = frozenset()  # stated, but beyond the corpus: the words alone must tell it
ROMANCE = ("es", "fr", "it", "pt")
SPACELESS = ("ja", "zh")
FAR = 14  # characters between a noun and the colour before or behind it
_WORD = r"[\w\u0900-\u0963\u0971-\u097f]"
_BREAK = re.compile(r"[,;.、，。；।!?]")
_COPULA = re.compile(r"\b(?:is|are|es|son|est|sont|è|sono|é|são)\b|\bsi\b")
# Attribute of a colour -> its names there, and what other colours come nearest to.
_TINTS: Mapping[str, tuple[Mapping[str, object], Mapping[str, str]]] = {
    "hair_color": (
        HAIRS,
        {
            "ginger": "red",
            "brunette": "brown",
            "yellow": "blonde",
            "orange": "red",
            "fair": "blonde",
            "light": "blonde|brown",
            "dark": "black|brown",
            "hazel": "brown",
        },
    ),
    "eye_color": (
        IRISES,
        {
            "brunette": "brown",
            "hazel": "brown|green",
            "dark": "brown",
            "black": "brown",
            "light": "blue|green|grey",
            "sky blue": "blue",
            "navy": "blue",
        },
    ),
    "skin": (
        SKINS,
        {
            "white": "fair|light",
            "black": "dark|brown",
            "swarthy": "brown",
            "brunette": "brown",
            "green": "tan",
            "pink": "fair",
        },
    ),
    "clothes_color": (COLORS, {"dark grey": "grey|black", "sky blue": "blue", "brunette": "brown"}),
    "hat_color": (COLORS, {"dark grey": "grey|black", "sky blue": "blue", "brunette": "brown"}),
    "color": (COLORS, {"dark grey": "grey|black", "sky blue": "blue", "brunette": "brown"}),
    "background_color": (
        BACKDROPS,
        {"dark": "navy|dark grey", "light": "sky blue|cream|mint|peach|lavender"},
    ),
    "lipstick": (LIPSTICKS, {"pink": "rose", "purple": "plum", "orange": "coral"}),
    "glasses_color": (
        dict.fromkeys(("black", "brown", "red", "navy")),
        {"dark": "black|brown|navy", "blue": "navy", "hazel": "brown"},
    ),
}
# A noun that stands for several attributes: which of them its colour is.
_COLOR_OF = {
    "clothes": "clothes_color",
    "hat": "hat_color",
    "glasses": "glasses_color",
    "beard": "hair_color",
    "hair_style": "hair_color",
    "kind": "color",
}
# Hair styles that are nouns of their own and can have a colour.
_STYLE_NOUNS = (
    "bob",
    "bob with a fringe",
    "bun",
    "ponytail",
    "afro",
    "pixie",
    "braids",
    "quiff",
    "buzz cut",
)
_LOCKS = ("curls", "waves", "rizos", "boucles", "riccioli", "cachos")
_SOUNDING = ("ball", "drum", "bell", "knock", "glass", "clap")
_HAIR_ONLY = ("blonde", "ginger", "brunette")  # words for hair, whatever noun stands beside


class Mention(NamedTuple):
    """Characters `start` to `end` of a description name an attribute and the values it may have."""

    start: int
    end: int
    name: str
    values: frozenset[str]


@cache
def words_of(language: str) -> Mapping[str, Mapping[str, str]]:
    """The word table of a language.

    Raises:
        ValueError: a language without one.
    """
    tables = json.loads((BUNDLED / "attribute_words.json").read_text(encoding="utf8"))
    if language not in tables:
        raise ValueError(f"language={language!r}: words are known in {', '.join(tables)}")
    return tables[language]


def language_of(description: str, likely: str = "en") -> str:
    """The language that a description is written in: by its letters, or by the words it uses.

    Args:
        likely: taken where the words say nothing, such as the language of what is spoken.
    """
    if re.search(r"[\u0900-\u097f]", description):
        return "hi"
    if re.search(r"[\u3040-\u30ff]", description):
        return "ja"
    if re.search(r"[\u3400-\u9fff]", description):
        return likely if likely in SPACELESS else "zh"
    used = caption_words([description])
    counts = {code: sum(w in _vocabulary(code) for w in used) for code in ("en", *ROMANCE)}
    best = max(counts.values())
    leaders = [code for code, count in counts.items() if count == best]
    return likely if likely in leaders and best else leaders[0]


@cache
def _vocabulary(language: str) -> frozenset[str]:
    captions = json.dumps(phrases(language), ensure_ascii=False)
    table = json.dumps(words_of(language), ensure_ascii=False)
    return frozenset(caption_words([captions, table]))


def stated_attributes(
    description: str, language: str, event: bool = False
) -> dict[str, frozenset[str]]:
    """Attribute -> the values that a description leaves it; `OPEN` where they are none of the
    corpus' own. What is not stated is not in it.

    Args:
        description: without the spoken words. language: that it is written in, one of eight.
        event: an object that sounds is described, not a presenter.
    """
    text = folded(description)
    mentions = _mentions(text, language, event)
    found: dict[str, frozenset[str]] = {}
    for mention in mentions:
        name = mention.name.removeprefix("noun:")
        if mention.name.startswith("noun:") and not mention.values:
            continue
        if name in ("color", "material"):
            continue
        if name == "kind":
            found[name] = min(found.get(name, mention.values), mention.values, key=_rank)
            continue
        values = frozenset(("none",)) if _negated(text, mention, language) else mention.values
        found[name] = found[name] & values or values if name in found else values
    for name, values in _tints(text, mentions, language):
        found[name] = found[name] & values or values if name in found else values
    if found.get("clothes") == OPEN:
        found["clothes_color"] = OPEN
    return found


def _rank(kinds: frozenset[str]) -> int:
    """Of several objects in one description ("two hands", "a glass ball"), the one that sounds."""
    return min(_SOUNDING.index(kind) for kind in kinds)


def folded(text: str) -> str:
    """Lower case, one form of each letter, and one way to write a Hindi nasal."""
    return unicodedata.normalize("NFC", text).casefold().replace("ँ", "ं")


@cache
def _lexicon(language: str, event: bool) -> tuple[tuple[str, str, frozenset[str]], ...]:
    """(phrase, attribute, values), the longest phrase first."""
    table = words_of(language)
    rows: list[tuple[str, str, frozenset[str]]] = []
    sections = {**(table["event"] if event else table), "color": table["color"]}
    if event:
        sections["noun:background_color"] = table["noun:background_color"]
    for name, section in sections.items():
        if name in ("event", "not_before", "not_after"):
            continue
        for values, written in section.items():
            held = frozenset(values.split("|")) - {"", "?"}
            rows += [(folded(phrase), name, held) for phrase in written.split("|")]
    listed = {phrase for phrase, name, _ in rows if name == "color"}
    for color, forms in phrases(language)["colors"].items():
        told = {folded(form).removesuffix("の") for form in forms.values()}
        rows += [(form, "color", frozenset((color,))) for form in sorted(told - listed)]
    for color, forms in phrases(language)["hair_color"].items():
        told = {folded(form).removesuffix("の") for form in forms}
        rows += [(form, "color", frozenset((color,))) for form in sorted(told - listed)]
    return tuple(sorted(set(rows), key=lambda row: (-len(row[0]), row[0], row[1])))


def _mentions(text: str, language: str, event: bool) -> list[Mention]:
    """All phrases in a text, the longest where several overlap, in the order of the text."""
    found: list[Mention] = []
    for phrase, name, values in _lexicon(language, event):
        pattern = re.escape(phrase)
        if language not in SPACELESS:
            pattern = rf"(?<!{_WORD}){pattern}(?!{_WORD})"
        for match in re.finditer(pattern, text):
            start, end = match.span()
            inside = [m for m in found if start < m.end and m.start < end]
            # a noun may carry a second meaning: "curls" is hair, and curly
            if all((m.start, m.end) == (start, end) and m.name != name for m in inside):
                found.append(Mention(start, end, name, values))
    return sorted(found)


def _negated(text: str, mention: Mention, language: str) -> bool:
    table = words_of(language)
    before = [folded(p) for p in str(table["not_before"]).split("|") if p]
    after = [folded(p) for p in str(table["not_after"]).split("|") if p]
    ahead = text[: mention.start].rstrip()
    # "without a hat", "no round glasses": up to one short word between
    ahead_shorter = re.sub(rf"\s{_WORD}{{1,6}}$", "", ahead)
    if any(
        re.search(rf"(?:^|\W){re.escape(p)}$", s) for p in before for s in (ahead, ahead_shorter)
    ):
        return True
    if language in SPACELESS and any(ahead.endswith(p) for p in before):
        return True
    behind = text[mention.end :].lstrip()
    return any(behind.startswith(p) for p in after)


def _tints(
    text: str, mentions: list[Mention], language: str
) -> Iterator[tuple[str, frozenset[str]]]:
    """Colours, sizes and materials, each with the attribute of the noun it belongs to."""
    nouns = [m for m in mentions if _takes(m, text)]
    tinted: set[int] = set()
    materials = {m.start for m in mentions if m.name == "material"}
    for mention in mentions:
        if mention.name not in ("color", "material"):
            continue
        if mention.name == "color" and mention.start in materials:
            continue  # "a silver bell"
        noun = _noun_of(text, mention, nouns, language)
        if mention.name == "material":
            yield from _material(mention, noun)
            continue
        if mention.values & set(_HAIR_ONLY) and (noun is None or _attribute(noun) != "eye_color"):
            yield "hair_color", _names("hair_color", mention.values)
        elif noun is not None:
            tinted.add(noun.start)
            yield _attribute(noun), _names(_attribute(noun), mention.values)
        else:
            yield from _without_noun(text, mention, mentions)
    for noun in nouns:
        name = _attribute(noun)
        if noun.start not in tinted and name.endswith("color") and _qualified(text, noun, language):
            yield name, OPEN


def _without_noun(
    text: str, tint: Mention, mentions: list[Mention]
) -> Iterator[tuple[str, frozenset[str]]]:
    """A colour beside a person is that of the skin, any other that of the clothes ("in red")."""
    people = [m for m in mentions if m.name == "gender"]
    beside = any(text[tint.end : m.start] == " " or text[m.end : tint.start] == " " for m in people)
    name = "skin" if beside else "clothes_color"
    values = _names(name, tint.values)
    if values:
        yield name, values


def _takes(mention: Mention, text: str) -> bool:
    """Whether a mention is a noun that a colour or a material can stand beside."""
    if mention.name == "hair_style":
        phrase = text[mention.start : mention.end]
        if phrase in _LOCKS or set(phrase) & set("发髪辫"):
            return True
        return bool(mention.values & set(_STYLE_NOUNS)) and len(mention.values) <= 2
    return mention.name.startswith("noun:") or mention.name in _COLOR_OF


def _attribute(noun: Mention) -> str:
    return _COLOR_OF.get(noun.name, noun.name.removeprefix("noun:"))


def _noun_of(text: str, tint: Mention, nouns: list[Mention], language: str) -> Mention | None:
    """The noun that a colour belongs to."""
    if tint.name == "material":
        nouns = [n for n in nouns if n.name in ("noun:material", "noun:floor")]
    else:
        nouns = [n for n in nouns if n.name not in ("noun:material", "noun:floor")]
    same = next((n for n in nouns if (n.start, n.end) == (tint.start, tint.end)), None)
    if same is not None:
        return same  # "a marble": a ball, and of glass
    after = next((n for n in nouns if n.start >= tint.end), None)
    before = next((n for n in reversed(nouns) if n.end <= tint.start), None)
    gap_after = text[tint.end : after.start] if after else None
    gap_before = text[before.end : tint.start] if before else None
    fits_after = gap_after is not None and _near(gap_after, language)
    fits_before = gap_before is not None and _near(gap_before, language)
    if fits_before and gap_before is not None and _COPULA.search(gap_before):
        return before
    if language in ROMANCE:
        return before if fits_before else after if fits_after else None
    return after if fits_after else before if fits_before else None


def _near(gap: str, language: str) -> bool:
    if re.fullmatch(rf",\s?{_WORD}+\s?", gap):
        return True  # "red, curly hair"
    return len(gap) <= (FAR // 2 if language in SPACELESS else FAR) and not _BREAK.search(gap)


def _names(name: str, colors: frozenset[str]) -> frozenset[str]:
    """A colour as the attribute names it; `OPEN` for one that it cannot have."""
    known, nearest = _TINTS.get(name, ({}, {}))
    found: set[str] = set()
    for color in colors:
        found |= {color} if color in known else set(nearest.get(color, "").split("|")) - {""}
    return frozenset(found)


def _material(mention: Mention, noun: Mention | None) -> Iterator[tuple[str, frozenset[str]]]:
    """Of a ball, bell or door, or of the floor."""
    if noun is not None and noun.name == "noun:floor":
        floor = {"wood": "wooden"}
        yield "floor", frozenset(floor.get(v, v) for v in mention.values)
    elif "stone" not in mention.values:
        yield "material", mention.values


def _qualified(text: str, noun: Mention, language: str) -> bool:
    """Whether a word that nobody knows stands where the noun's colour would: "a chartreuse
    shirt".
    """
    if language in SPACELESS or language == "hi" or noun.name == "kind":
        return False
    if language in ROMANCE:
        beside = re.match(rf"\s+({_WORD}+)", text[noun.end :])
    else:
        beside = re.search(rf"({_WORD}+)\s+$", text[: noun.start])
    return beside is not None and len(beside[1]) > 4 and beside[1] not in _vocabulary(language)
