"""The speech bank: reading shards, phones from tokens, the mini-bank that ships."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from avdiff.corpus.speech.read import (
    LANGUAGES,
    REPO_BANK,
    SAMPLE_RATE,
    SpeechCorpus,
    normalised_text,
)
from avdiff.corpus.speech.subset import build_minibank, is_digit_string
from avdiff.phonetics import phone as ph
from avdiff.phonetics import tokens as tk
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.tokens import Tokens
from avdiff.phonetics.visemes import viseme_of


@pytest.fixture(scope="module")
def bank() -> SpeechCorpus:
    return SpeechCorpus(REPO_BANK)


def test_the_mini_bank_holds_what_the_readme_says(bank):
    assert sum(path.stat().st_size for path in REPO_BANK.glob("*.tar")) <= 5_000_000
    counts = Counter((u.lang, u.split) for u in bank)
    assert {lang for lang, _ in counts} == set(LANGUAGES)
    for lang in LANGUAGES:
        assert all(counts[lang, split] >= 3 for split in ("train", "val", "test", "test_voices"))
    assert sum(is_digit_string(u) and u.split == "test" for u in bank) >= 4
    voices = {
        split: {u.voice for u in bank if u.split == split} for split in ("train", "test_voices")
    }
    assert not voices["train"] & voices["test_voices"]


def test_audio_matches_a_whole_read_of_the_shard(bank):
    """Random access by offset against the plain way: extract the file with tarfile, decode it."""
    wanted = [bank[3], bank[200], bank[-1]]
    for utterance in wanted:
        for shard in bank.shards:
            with tarfile.open(shard) as archive:
                if f"{utterance.id}.opus" in archive.getnames():
                    raw = archive.extractfile(f"{utterance.id}.opus").read()
        slow, rate = soundfile.read(io.BytesIO(raw), dtype="float32")
        fast = bank.audio(utterance)
        assert rate == SAMPLE_RATE and fast.dtype == np.float32
        assert len(fast) == round(utterance.duration * SAMPLE_RATE)
        assert np.abs(fast - slow).max() <= 0.6 / 32767


def test_the_decoded_copy_gives_the_same_samples(bank, tmp_path):
    small = tmp_path / "bank"
    small.mkdir()
    (small / "fr-000.tar").write_bytes((REPO_BANK / "fr-000.tar").read_bytes())
    plain, mapped = (
        SpeechCorpus(small),
        SpeechCorpus(small, decoded=True, cache_dir=tmp_path / "cache"),
    )
    again = SpeechCorpus(small, decoded=True, cache_dir=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for u in plain.utterances[::9]:
        assert np.array_equal(plain.audio(u), mapped.audio(u.id)) and np.array_equal(
            plain.audio(u), again.audio(u.id)
        )
    travelled = pickle.loads(pickle.dumps(mapped))
    assert np.array_equal(travelled.audio(plain[0].id), plain.audio(plain[0]))
    assert len(pickle.dumps(mapped)) < 2_000_000  # the decoded samples stay behind


def test_phones_tile_the_utterance_and_every_one_is_known(bank):
    for u in bank.utterances[::4]:
        assert u.phones[0].start == 0 and u.phones[-1].end == pytest.approx(
            len(bank.audio(u)) / SAMPLE_RATE
        )
        for one, two in zip(u.phones, u.phones[1:], strict=False):
            assert one.end == two.start and two.end > two.start
        for phone in u.phones:
            assert ph.inventory()[0][ph.phone_id(phone.symbol)] == phone.symbol
            assert viseme_of(phone.symbol) and 0 <= phone.stress_tone < len(ph.inventory()[1])
        assert any(p.stress_tone for p in u.phones) or u.lang in (
            "ja",
            "zh",
            "fr",
            "hi",
            "pt",
            "en",
        )


def test_the_end_silence_is_silent_and_the_speech_is_not(bank):
    for u in bank.utterances[::10]:
        audio, tail = bank.audio(u), u.phones[-1]
        assert tail.symbol == ph.SILENCE
        quiet = audio[round(tail.start * SAMPLE_RATE) :]
        loud = audio[round(u.phones[0].end * SAMPLE_RATE) : round(tail.start * SAMPLE_RATE)]
        assert np.sqrt(np.mean(quiet**2)) < 0.03 * np.sqrt(np.mean(loud**2))


def test_marks_go_to_their_neighbours():
    symbols = ("t", "ʰ", "ˈ", "i", "ː", " ", "a", "↘", "n")
    times = tuple(0.1 * i for i in range(10))
    tone = np.sin(np.arange(round(0.9 * SAMPLE_RATE)) * 0.3).astype(np.float32)
    merged = tk.merge_tokens(Tokens(symbols, times[:-1], times[1:]), tone, SAMPLE_RATE)
    assert [(p.symbol, p.stress_tone) for p in merged] == [("tʰ", 0), ("i", 1), ("a", 6), ("n", 0)]
    assert merged[0].end == pytest.approx(0.2 + 0.1 * tk.STRESS_BEFORE)
    assert merged[1].end == pytest.approx(0.5 + 0.1 * tk.SPACE_BEFORE)
    assert merged[2].end == pytest.approx(0.8)


def test_a_pause_is_found_in_the_audio():
    """The last phone before a comma carries 0.3 s of silence; it must come back as a silence phone
    of that length.
    """
    symbols, starts, ends = (
        ("a", ",", " ", "m", "a"),
        (0.0, 0.5, 0.55, 0.6, 0.7),
        (0.5, 0.55, 0.6, 0.7, 1.0),
    )
    audio = np.sin(np.arange(SAMPLE_RATE) * 0.2).astype(np.float32)
    audio[round(0.25 * SAMPLE_RATE) : round(0.58 * SAMPLE_RATE)] = 0
    merged = tk.merge_tokens(Tokens(symbols, starts, ends), audio, SAMPLE_RATE)
    assert [p.symbol for p in merged] == ["a", ph.SILENCE, "m", "a"]
    assert merged[1].start == pytest.approx(0.25, abs=0.006) and merged[1].end == pytest.approx(
        0.58, abs=0.006
    )


def test_parse_ipa_agrees_with_the_timed_tokens(bank):
    """The same phoneme string, with and without times, gives the same phones but for pauses."""
    for u in bank.utterances[::7]:
        plain = [p for p in tk.parse_ipa("".join(u.tokens.symbols)) if p[0] != ph.SILENCE]
        assert plain == [(p.symbol, p.stress_tone) for p in u.phones if p.symbol != ph.SILENCE]


def test_the_inventory_has_fixed_places():
    symbols, stress_tones = ph.inventory()
    assert symbols[0] == ph.SILENCE and stress_tones == (
        "none",
        "primary",
        "secondary",
        "→",
        "↗",
        "↓",
        "↘",
    )
    assert len(set(symbols)) == len(symbols) >= 60
    assert ph.phone_id("") == ph.phone_id(" ") == 0 and ph.phone_id("dʰʲ") == symbols.index("dʰ")
    with pytest.raises(ValueError, match="symbol='7'"):
        ph.phone_id("7")


def test_phones_on_frames_against_a_loop():
    phones = (Phone("sil", 0.0, 0.12), Phone("a", 0.12, 0.31), Phone("m", 0.31, 0.4))
    slow = [
        next(i for i, p in enumerate(phones) if (k + 0.5) / 100 < p.end or i == 2)
        for k in range(45)
    ]
    assert ph.phones_on_frames(phones, 45, 100).tolist() == slow


def test_a_mini_bank_is_the_same_twice_and_a_subset(bank, tmp_path):
    count = build_minibank(REPO_BANK, tmp_path / "a")
    assert build_minibank(REPO_BANK, tmp_path / "b") == count
    for shard in (tmp_path / "a").glob("*.tar"):
        assert shard.read_bytes() == (tmp_path / "b" / shard.name).read_bytes()
    small = SpeechCorpus(tmp_path / "a")
    u = small[len(small) // 2]
    assert np.array_equal(small.audio(u), bank.audio(u.id)) and u.phones == bank[u.id].phones
    with tarfile.open(small.shards[0]) as archive:
        record = json.load(
            archive.extractfile(next(n for n in archive.getnames() if n.endswith(".json")))
        )
    assert set(record) == {
        "id",
        "lang",
        "voice",
        "gender",
        "speed",
        "text",
        "phonemes",
        "starts",
        "ends",
        "duration",
        "sample_rate",
        "split",
    }


def test_normalised_text_ignores_what_is_not_heard():
    assert normalised_text("Good morning, Anna!") == normalised_text("good  morning anna")
    assert normalised_text("की") != normalised_text("का")  # vowel signs are heard


def test_errors_name_the_argument(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"no \*\.tar shards"):
        SpeechCorpus(tmp_path)
    with pytest.raises(ValueError, match="split='dev'"):
        SpeechCorpus(REPO_BANK, "dev")
    with pytest.raises(ValueError, match="has no 'de'"):
        SpeechCorpus(REPO_BANK, languages=["de"])
    with pytest.raises(ValueError, match="not found"):
        SpeechCorpus(tmp_path / "nowhere")
    monkeypatch.setenv("AVDIFF_BANK", str(REPO_BANK))
    assert SpeechCorpus().root == Path(REPO_BANK)
