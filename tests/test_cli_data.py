"""`avdiff data cache` on a folder of good and bad files, and the builder of speech banks without
its voice.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from bad_clips import make_folder
from tiny import tiny_pipeline

from avdiff.cli import main as cli
from avdiff.corpus.speech import build as bank_builder
from avdiff.corpus.speech.read import LANGUAGES, REPO_BANK, SpeechCorpus
from avdiff.corpus.speech.sentences import draw_sentence
from avdiff.corpus.speech.synthesis import Speech, Voices, cut_out
from avdiff.corpus.speech.timing import best_shift
from avdiff.data.cache import LatentCache
from avdiff.g2p.networks import default_networks
from avdiff.g2p.pronounce import read

NAMES = [
    "af_heart",
    "af_kore",
    "am_eric",
    "am_liam",
    "ff_siwis",
    "ef_dora",
    "em_alex",
    "hf_beta",
    "hm_psi",
    "if_sara",
    "im_nicola",
    "jf_alpha",
    "jm_kumo",
    "pf_dora",
    "pm_alex",
    "zf_xiaoni",
    "zm_yunxi",
]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return int(ended.value.code or 0)


def test_cache_takes_the_good_and_names_the_bad(tmp_path, capsys):
    good, bad = make_folder(tmp_path / "data")
    tiny_pipeline().save_pretrained(tmp_path / "model")
    options = ["--data", tmp_path / "data", "--codecs", tmp_path / "model", "--buckets", "64x64x25"]
    assert run("data", "cache", tmp_path / "cache", *options) == 0
    said = capsys.readouterr().out.splitlines()
    assert {line.split(": refused: ")[0] for line in said if ": refused: " in line} == bad and len(
        bad
    ) >= 20
    items = LatentCache([tmp_path / "cache"])
    assert {items[i]["name"] for i in range(len(items))} == good
    assert all("audio" in items[i] for i in range(len(items)))
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")}
    assert run("data", "cache", tmp_path / "cache", *options) == 0
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("shard-*")} == before
    decode = ["--codecs", tmp_path / "model", "--decode", tmp_path / "out", "--count", 2]
    assert run("data", "cache", tmp_path / "cache", *decode) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "data" / "plain.txt").write_text("Another caption, with a loud drum")
    assert run("data", "cache", tmp_path / "cache", *options) == 2
    assert "made by something else" in capsys.readouterr().err


def test_cache_and_bank_errors_are_one_line(tmp_path, capsys):
    for arguments, words in (
        (["cache", tmp_path / "x"], "--count"),
        (["cache", tmp_path / "x", "--count", 2, "--rank", 3], "rank=3"),
        (["cache", tmp_path / "x", "--data", tmp_path, "--codecs", tmp_path], "has no vae/"),
        (["bank", tmp_path / "b", "--voices", tmp_path / "none.tgz"], "npm pack kokoro-js"),
    ):
        assert run("data", *arguments) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and words in told[0]


def test_labels_that_are_off_are_found_by_their_sound():
    spoken = list(SpeechCorpus(REPO_BANK, languages=["es"]))[:25]
    plain, share = best_shift((u.bank.audio(u), u.phones) for u in spoken)
    late = [
        (u.bank.audio(u), [p._replace(start=p.start + 0.02, end=p.end + 0.02) for p in u.phones])
        for u in spoken
    ]
    assert abs(plain) < 0.012 and share > 0.3
    assert best_shift(late)[0] == pytest.approx(plain - 0.02, abs=0.006)


def test_plans_keep_splits_apart():
    """Texts of one split are in no other; test voices hold a partner that speaks nowhere else;
    genders fit.
    """
    held = {name for names in bank_builder.HELD_OUT.values() for name in names}
    splits: dict[str, set[str]] = {}
    for language in LANGUAGES:
        rng = np.random.default_rng(LANGUAGES.index(language))
        for _ in range(60):
            plan = bank_builder.draw_plan(rng, language, NAMES)
            splits.setdefault(plan.split, set()).add(plan.text)
            assert (plan.split == "test_voices") == bool(held & {name for name, _ in plan.blend})
            assert plan.blend[-1][0][1] == plan.gender[0] and sum(
                w for _, w in plan.blend
            ) == pytest.approx(1)
    assert set(splits) == {"train", "val", "test", "test_voices"}
    assert not any(splits[a] & splits[b] for a in splits for b in splits if a < b)


def test_sentences_can_be_read_in_every_language():
    networks = default_networks()
    for language in LANGUAGES:
        rng = np.random.default_rng(1)
        for _ in range(3):
            text = draw_sentence(rng, language)
            assert "{" not in text and "_" not in text
            phonemes = bank_builder.to_phonemes(text, language, networks)
            words = [word.phonemes for word in read(text, language).words]
            assert (
                "".join(words) == "".join(c for c in phonemes if c not in " ,.!?")
                or language == "hi"
            )


def hum(phonemes: str, blend: dict[str, float], speed: float) -> Speech:
    """A tone of 60 ms a token in place of the voice, with silence around it."""
    edges = 0.3 + 0.06 / speed * np.arange(len(phonemes) + 1)
    time = np.arange(round((edges[-1] + 0.5) * 24000)) / 24000
    sound = 0.3 * np.sin(1400 * time) * ((time > edges[0]) & (time < edges[-1]))
    return cut_out(sound.astype(np.float32), tuple(phonemes), edges)


def test_shards_read_back(tmp_path):
    arguments = ("it", 0, 6, 3, hum, NAMES, default_networks())
    bank_builder._write_shard(tmp_path / "it-000.tar", bank_builder.speak_plans(*arguments))
    bank = SpeechCorpus(tmp_path)
    assert len(bank) == 6 and bank_builder._held(tmp_path / "it-000.tar") == 6
    first = next(iter(bank_builder.speak_plans(*arguments)))[0]
    assert json.loads(json.dumps(SpeechCorpus.record(bank[0]))) == first
    for utterance in bank:
        sound = bank.audio(utterance)
        assert len(sound) == round(utterance.duration * 24000) and utterance.tokens.starts[
            0
        ] == pytest.approx(0.12)
        assert (
            np.abs(sound[: round(0.1 * 24000)]).max()
            < 0.02
            < np.abs(sound[round(0.15 * 24000) :]).max()
        )


def test_a_voice_is_a_weighted_mean(tmp_path):
    (tmp_path / "voices").mkdir()
    for name, value in (("af_a", 1.0), ("af_b", 3.0)):
        (tmp_path / "voices" / f"{name}.bin").write_bytes(
            np.full((510, 1, 256), value, "<f4").tobytes()
        )
    voices = Voices(tmp_path)
    assert voices.names() == ["af_a", "af_b"]
    assert np.allclose(voices.style({"af_a": 0.75, "af_b": 0.25}, 12), 1.5)
