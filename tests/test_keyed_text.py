"""Quotes and amounts as keyboards and word processors make them; private caches."""

import pytest

from avdiff.corpus.captions import parse_prompt
from avdiff.g2p import cjk
from avdiff.g2p.normalize import split_text
from avdiff.g2p.numbers import spell_numbers
from avdiff.g2p.pronounce import read


@pytest.mark.parametrize(
    ("prompt", "spoken"),
    [
        ("A woman says ‘I don’t know’", "I don’t know"),
        ('A man with a 12" screen says "hello"', "hello"),
        ('A man says "hello”', "hello"),
        ('A man says “hello"', "hello"),
        ('A man says "I am 12"', "I am 12"),
        ('She says “call it "home" now”', 'call it "home" now'),
    ],
)
def test_quotes_of_keyboards(prompt, spoken):
    assert parse_prompt(prompt)[1] == spoken


@pytest.mark.parametrize(
    ("text", "language", "words"),
    [
        ("it costs $4.50", "en", "it costs four dollars fifty"),
        ("R$ 10,50", "pt", "dez reais e cinquenta"),
        ("R$ 20", "pt", "vinte reais"),
        ("4,50 €", "fr", "quatre euros cinquante"),
        ("$5", "en", "five dollars"),
        ("the 1990s and the 80s", "en", "the nineteen nineties and the eighties"),
    ],
)
def test_amounts_of_money(text, language, words):
    assert " ".join(spell_numbers(text, language).split()) == words


def words(text, language):
    return " ".join(piece.text for piece in split_text(text, language) if piece.is_word)


def test_fractions_of_one_character():
    assert words("½ cup", "en") == "half a cup"
    assert words("2½ hours", "en") == "two and a half hours"
    assert words("¾ tasse", "fr") == "trois quarts tasse"
    assert words("1½", "es") == "uno y medio"


def test_kana_in_chinese_text_is_read():
    reading = read("我喜欢カラオケ", "zh")
    assert reading.phonemes.replace(" ", "").endswith("kaɾaoke")


def test_half_a_character_is_named():
    with pytest.raises(ValueError, match="at character 6 is half of a character"):
        read("hello \ud83d", "en")


def test_the_segmenter_s_cache_is_the_user_s_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cjk._private_cache()
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
