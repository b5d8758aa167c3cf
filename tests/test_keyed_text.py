"""Quotes and amounts as keyboards and word processors make them; private caches."""

import pytest

from avdiff.corpus.captions import parse_prompt
from avdiff.g2p import cjk
from avdiff.g2p.numbers import spell_numbers


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
    ],
)
def test_amounts_of_money(text, language, words):
    assert " ".join(spell_numbers(text, language).split()) == words


def test_the_segmenter_s_cache_is_the_user_s_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cjk._private_cache()
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o777 == 0o700
