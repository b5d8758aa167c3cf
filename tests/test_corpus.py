"""The presenter corpus: determinism, splits, truth, captions and prompts, augmentation, writing to
files.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from avdiff.corpus import augment
from avdiff.corpus.captions import join_sentences, parse_prompt, phrases, speech_captions
from avdiff.corpus.dataset import CorpusOptions, PresenterCorpus, split_utterances
from avdiff.corpus.face.presenter import mouth_opening, mouth_opening_from_pixels, sample_identity
from avdiff.corpus.speech.concatenate import cut_piece
from avdiff.corpus.speech.read import (
    LANGUAGES,
    REPO_BANK,
    SAMPLE_RATE,
    SPLITS,
    SpeechCorpus,
    normalised_text,
)
from avdiff.phonetics.visemes import viseme_of


@pytest.fixture(scope="module")
def bank() -> SpeechCorpus:
    return SpeechCorpus(REPO_BANK)


def digest(item: dict) -> str:
    """Hash of all that a sample holds."""
    state = hashlib.sha256()
    for key in sorted(item):
        value = item[key]
        value = (
            np.asarray(value).tobytes()
            if isinstance(value, torch.Tensor | np.ndarray)
            else repr(value).encode()
        )
        state.update(key.encode() + value)
    return state.hexdigest()


def test_items_hold_what_the_contract_says(bank):
    corpus = PresenterCorpus(bank, size=32, length=40)
    kinds = set()
    for index in range(12):
        item = corpus[index]
        kinds.add(item["kind"])
        frames = item["video"].shape[0]
        assert (
            item["video"].dtype == torch.uint8
            and item["video"].shape[1:] == (32, 32, 3)
            and frames % 2 == 1
        )
        assert item["audio"].dtype == torch.float32 and item["audio"].shape == (
            1,
            round(frames * SAMPLE_RATE / 25),
        )
        assert item["fps"] == Fraction(25) and item["sample_rate"] == SAMPLE_RATE
        assert (
            2.0 <= frames / 25 <= 6.1
            and item["caption"] in item["captions"]
            and len(item["captions"]) >= 4
        )
        assert 0.02 < float(item["audio"].abs().max()) <= 1.0
        json.dumps(item["attributes"])
        if item["kind"] == "speech":
            assert item["mouth"].shape == (frames, 6) and item["lip_points"].shape[0] == frames
            assert item["phones"][0].start == 0 and item["phones"][-1].end == pytest.approx(
                frames / 25
            )
            assert any(
                normalised_text(item["text"]) in normalised_text(c) for c in item["captions"]
            )
        else:
            assert item["contacts"] and not item["phones"]
    assert kinds == {"speech", "event"}


def test_same_seed_same_bits_with_workers_and_in_another_process(bank):
    def make(seed: int) -> PresenterCorpus:
        return PresenterCorpus(bank, size=32, length=8, seed=seed, seconds=2.5, augment_share=0.5)

    plain = [digest(make(3)[i]) for i in range(8)]
    loader = DataLoader(
        make(3),
        batch_size=None,
        num_workers=2,
        multiprocessing_context="fork",
        collate_fn=lambda item: item,
    )
    assert [digest(item) for item in loader] == plain
    assert digest(make(4)[0]) != plain[0]
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from test_corpus import digest, PresenterCorpus, REPO_BANK\n"
        "corpus = PresenterCorpus(REPO_BANK, size=32, length=8, seed=3, seconds=2.5, "
        "augment_share=0.5)\n"
        "print(digest(corpus[5]), digest(corpus[2]))"
    )
    root = REPO_BANK.parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True
    )
    assert done.stdout.split() == [plain[5], plain[2]]


def test_the_same_scene_at_other_sizes_and_rates(bank):
    """At 75 fps every third frame falls on a frame of 25 fps: truth and pixels must be the same
    there.
    """
    options = {"length": 6, "seed": 1, "event_share": 0.3, "augment_share": 1.0}
    slow, fast, large = (
        PresenterCorpus(bank, size=size, fps=fps, **options)
        for size, fps in ((32, 25), (32, 75), (64, 25))
    )
    for index in range(4):
        a, b, c = slow[index], fast[index], large[index]
        frames = min(len(a["video"]), len(b["video"]) // 3)
        if a["kind"] == "speech":
            assert np.allclose(a["mouth"][:frames], b["mouth"][1::3][:frames], atol=1e-5)
            assert np.allclose(a["lip_points"], c["lip_points"])
        assert (a["video"][:frames].int() - b["video"][1::3][:frames].int()).abs().max() <= 3
        samples = min(a["audio"].shape[1], b["audio"].shape[1])
        assert torch.allclose(a["audio"][:, :samples], b["audio"][:, :samples], atol=1e-6)
        assert torch.equal(a["audio"], c["audio"]) and a["caption"] == c["caption"]


def test_splits_share_no_sentence_no_presenter_and_test_voices_no_voice(bank):
    texts = {s: {normalised_text(u.text) for u in split_utterances(bank, s)} for s in SPLITS}
    for one in SPLITS:
        assert texts[one]
        for two in SPLITS:
            assert one == two or not texts[one] & texts[two]
    faces = {}
    for split in SPLITS:
        corpus = PresenterCorpus(
            bank, split, video=False, audio=False, event_share=0, length=12, seconds=1.5
        )
        items = [corpus[i] for i in range(12)]
        told = ("gender", "skin", "hair_style", "hair_color", "beard", "glasses", "face_shape")
        faces[split] = {tuple(item["attributes"][name] for name in told) for item in items}
        spoken = {u.id for u in split_utterances(bank, split)}
        assert spoken
    assert not faces["train"] & (faces["val"] | faces["test"] | faces["test_voices"])
    train_voices = {u.voice for u in bank if u.split == "train"}
    corpus = PresenterCorpus(bank, "test_voices", video=False, audio=False, event_share=0, length=9)
    assert not train_voices & {corpus[i]["attributes"]["voice"] for i in range(9)}


def test_one_voice_with_pauses_and_matching_gender(bank):
    corpus = PresenterCorpus(
        bank, video=False, event_share=0, augment_share=0, length=30, seconds=(3.0, 6.0)
    )
    joined = 0
    for index in range(30):
        item = corpus[index]
        gaps = [p.end - p.start for p in item["phones"][1:-1] if p.symbol == "sil"]
        joined += any(gap >= 0.2 for gap in gaps)
        voice = {u.gender for u in bank if u.voice == item["attributes"]["voice"]}
        assert item["attributes"]["gender"] in voice
        for one, two in zip(item["phones"], item["phones"][1:], strict=False):
            assert one.end == pytest.approx(two.start)
    assert joined > 8
    single = PresenterCorpus(
        bank, video=False, event_share=0, length=5, max_sentences=1, seconds=(1.0, 4.0)
    )
    texts = {normalised_text(u.text) for u in bank}
    assert all(normalised_text(single[i]["text"]) in texts for i in range(5))


def test_phones_sit_on_their_sound(bank):
    """Cut out a sentence from a joined clip by its phone times: it is the bank's own sound, sample
    for sample.
    """
    corpus = PresenterCorpus(
        bank, video=False, event_share=0, augment_share=0, max_sentences=1, length=6, seconds=3.0
    )
    for index in range(6):
        item = corpus[index]
        utterance = next(
            u for u in bank if u.text == item["text"] and u.voice == item["attributes"]["voice"]
        )
        own = [p for p in utterance.phones if p.symbol != "sil"]
        laid = [p for p in item["phones"] if p.symbol != "sil"]
        assert [p.symbol for p in own] == [p.symbol for p in laid]
        count = round((own[-1].end - own[0].start) * SAMPLE_RATE) - 400
        first = round(own[0].start * SAMPLE_RATE) + 200
        source = bank.audio(utterance)[first : first + count].astype(np.float64)
        at = round(laid[0].start * SAMPLE_RATE) + 200
        sound = item["audio"][0].numpy().astype(np.float64)
        matches = [np.corrcoef(source, sound[at + d : at + d + count])[0, 1] for d in (-1, 0, 1)]
        assert max(matches) > 0.9999


def test_mouth_in_the_pixels_follows_the_truth(bank):
    corpus = PresenterCorpus(bank, size=128, event_share=0, length=4, seconds=2.0)
    seen, truth, closed, bilabials = [], [], 0, 0
    for index in range(3):
        item = corpus[index]
        rng = np.random.default_rng([corpus.seed, 0, index])
        rng.random()
        face = rng.spawn(5)[1]
        identity = sample_identity(face, item["attributes"]["gender"], "train")
        frames = item["video"].numpy()
        opening = [
            mouth_opening_from_pixels(f, identity, p)
            for f, p in zip(frames, item["lip_points"], strict=True)
        ]
        seen += opening
        truth += mouth_opening(identity, item["mouth"]).tolist()
        for phone in item["phones"]:
            if viseme_of(phone.symbol) == ("PP",):
                bilabials += 1
                frame = min(int((phone.start + phone.end) / 2 * 25), len(frames) - 1)
                closed += opening[frame] < 0.1 * max(opening)
    assert np.corrcoef(seen, truth)[0, 1] > 0.95
    assert bilabials == 0 or closed / bilabials >= 0.9


def test_augmentation_is_flagged_and_keeps_time(bank):
    options = CorpusOptions(
        video=False, event_share=0, augment_share=1.0, keep_clean=True, seconds=2.5
    )
    corpus = PresenterCorpus(bank, length=40, options=options)
    kinds: set[str] = set()
    for index in range(14):
        item = corpus[index]
        done = set(item["attributes"]["augmented"].split(","))
        kinds |= done
        assert done and item["audio_clean"].shape == item["audio"].shape
        assert torch.equal(item["audio"], item["audio_clean"]) == (done == {"pitch"})
        if done <= {
            "room",
            "level",
        }:  # no delay: the correlation with the clean sound peaks at lag 0
            clean, wet = (item[k][0].numpy().astype(np.float64) for k in ("audio_clean", "audio"))
            lags = [np.dot(clean[200:-200], np.roll(wet, d)[200:-200]) for d in range(-60, 61, 5)]
            assert abs(np.argmax(lags) - 12) <= 1
    assert kinds == set(augment.KINDS)
    share = np.mean(
        [bool(augment.draw_plan(np.random.default_rng(i), 0.2).kinds) for i in range(1000)]
    )
    assert 0.17 < share < 0.23


def test_pitch_moves_phones_with_the_sound(bank):
    utterance = bank[10]
    plain, high = cut_piece(utterance), cut_piece(utterance, Fraction(11, 10))
    assert high.seconds == pytest.approx(plain.seconds / 1.1, abs=1e-3)
    for one, two in zip(plain.phones, high.phones, strict=True):
        assert two.start == pytest.approx(one.start / 1.1, abs=1e-3)
    # the spectrum stretches by the factor: log spectra of both agree best at a shift of log(1.1)
    grid = np.geomspace(100, 3000, 1200)
    curves = []
    for piece in (plain, high):
        power = np.abs(np.fft.rfft(piece.audio, 1 << 17)) ** 2
        smooth = np.convolve(power, np.ones(400) / 400, "same")
        curves.append(np.log(np.interp(grid, np.fft.rfftfreq(1 << 17, 1 / SAMPLE_RATE), smooth)))
    fits = {
        d: np.corrcoef(curves[0][100:-100], curves[1][100 + d : 1100 + d])[0, 1]
        for d in range(-60, 61, 2)
    }
    step = np.log(grid[1] / grid[0])
    assert max(fits, key=lambda d: fits[d]) * step == pytest.approx(np.log(1.1), abs=0.02)


def test_captions_quote_the_speech_and_never_invent():
    rng = np.random.default_rng(0)
    spoken = {
        "en": "good morning",
        "es": "buenos días",
        "fr": "bonjour",
        "hi": "नमस्ते",
        "it": "ciao",
        "ja": "おはよう",
        "pt": "bom dia",
        "zh": "早上好",
    }
    assert set(spoken) == set(LANGUAGES)
    seen: set[str] = set()
    for i in range(60):
        attributes = sample_identity(np.random.default_rng(i)).attributes()
        language = LANGUAGES[i % 8]
        for caption in speech_captions(attributes, spoken[language], language, rng):
            assert (
                spoken[language] in caption
                and "{" not in caption
                and "|" not in caption
                and "  " not in caption
            )
            description, words = parse_prompt(caption)
            assert words == spoken[language] and words not in description
            if attributes["glasses"] == "none":
                assert not any(
                    w in description
                    for w in ("glasses", "gafas", "lunettes", "眼鏡", "眼镜", "चश्मे")
                )
            if attributes["beard"] == "none":
                assert "beard" not in description and "mustache" not in description
            seen.add(caption)
    assert len(seen) > 180  # varied


def test_full_captions_tell_more_and_a_share_of_none_changes_nothing():
    def told(share: float, language: str) -> tuple[int, list[str]]:
        captions: list[str] = []
        for i in range(40):
            look = sample_identity(np.random.default_rng(i)).attributes()
            captions += speech_captions(look, "x", language, np.random.default_rng(i), share)
        return sum(map(len, captions)), captions

    for language in LANGUAGES:
        (few, plain), (most, full) = told(0.0, language), told(1.0, language)
        assert most > 1.2 * few and len(plain) == len(full)
        look = sample_identity(np.random.default_rng(0)).attributes()
        assert plain[: 4 if language == "en" else 6] == speech_captions(
            look, "x", language, np.random.default_rng(0)
        )
        assert not any("{" in caption or "|" in caption or "  " in caption for caption in full)


def test_gender_agrees_in_every_language():
    words = {
        "en": ("woman", " man"),
        "es": ("mujer", "hombre"),
        "hi": ("वाली", "वाला"),
        "zh": ("女", "男"),
    }
    base = {"gender": "female", "hair_color": "red", "hair_style": "short"}
    for language, (female, male) in words.items():
        for gender, wrong in (("female", male), ("male", female)):
            captions = []
            for i in range(20):
                captions += speech_captions(
                    {**base, "gender": gender}, "x", language, np.random.default_rng(i)
                )[-2:]
            assert not any(wrong in caption for caption in captions)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ('A woman with glasses says "good morning"', ("A woman with glasses says", "good morning")),
        ("“Hola, amigo”, dice una mujer", ("dice una mujer", "Hola, amigo")),
        ("Un homme dit : « bonjour à tous »", ("Un homme dit", "bonjour à tous")),
        ("女性が「こんにちは」と言う", ("女性が と言う", "こんにちは")),
        ("Ein Mann sagt „Guten Tag“.", ("Ein Mann sagt.", "Guten Tag")),
        ("a man says: hello there, friend", ("a man says", "hello there, friend")),
        ("一位女士说：你好", ("一位女士说", "你好")),
        ("a man says 'I don't know' quietly", ("a man says quietly", "I don't know")),
        ("It's a man's face", ("It's a man's face", None)),
        ('"one," says a man, "two"', ("says a man", "one, two")),
        ('"hi"', ("", "hi")),
        ('she says "hello', ("she says", "hello")),
        ('a 5" tall toy', ('a 5" tall toy', None)),
        ("A metal ball bounces three times", ("A metal ball bounces three times", None)),
        ('nothing "" said', ('nothing "" said', None)),
        ("", ("", None)),
    ],
)
def test_parse_prompt(prompt, expected):
    assert parse_prompt(prompt) == expected


def test_sentences_join_without_double_marks():
    for language in LANGUAGES:
        joined = join_sentences(["ab?", "cd", "ef"], language, np.random.default_rng(0))
        assert (
            joined.startswith("ab?")
            and joined.endswith("ef")
            and "?," not in joined
            and "?." not in joined
        )
        assert phrases(language)["join"]


def test_writing_goes_on_after_a_break_and_refuses_another_corpus(bank, tmp_path):
    from avdiff.corpus.writer import write_corpus
    from avdiff.media.write import read_clip

    corpus = PresenterCorpus(bank, size=64, length=3, seconds=1.0, event_share=0.5)
    assert write_corpus(corpus, tmp_path, [0]) == 1
    stamp = (tmp_path / "000000.mp4").stat().st_mtime_ns
    assert write_corpus(corpus, tmp_path) == 3
    assert (tmp_path / "000000.mp4").stat().st_mtime_ns == stamp
    lines = [
        json.loads(line)
        for line in (tmp_path / "metadata.jsonl").read_text(encoding="utf8").splitlines()
    ]
    assert [line["index"] for line in lines] == [0, 1, 2]
    clip, item = read_clip(tmp_path / lines[1]["file_name"]), corpus[1]
    assert clip.frames.shape == tuple(item["video"].shape)
    assert np.abs(clip.frames.astype(int) - item["video"].numpy()).mean() < 6
    assert lines[1]["caption"] == item["caption"]
    with pytest.raises(ValueError, match="another corpus"):
        write_corpus(PresenterCorpus(bank, size=64, length=3, seconds=1.0, seed=9), tmp_path)


def test_errors_name_the_argument(bank):
    with pytest.raises(ValueError, match="split='dev'"):
        PresenterCorpus(bank, "dev")
    with pytest.raises(ValueError, match="has no 'de'"):
        PresenterCorpus(bank, languages=["de"])
    with pytest.raises(ValueError, match="event_share=2"):
        CorpusOptions(event_share=2)
    with pytest.raises(ValueError, match="size=8"):
        CorpusOptions(size=8)
    with pytest.raises(ValueError, match=r"seconds=\(3, 1\)"):
        CorpusOptions(seconds=(3, 1))
    with pytest.raises(ValueError, match="no sentence"):
        PresenterCorpus(bank, seconds=0.2)
    with pytest.raises(IndexError, match="index=5"):
        PresenterCorpus(bank, length=5)[5]


def test_a_still_is_one_picture_of_its_clip(bank):
    options = {"length": 8, "seed": 6, "size": 64, "seconds": 2.0, "event_share": 0.3}
    stills, clips = PresenterCorpus(bank, still=True, **options), PresenterCorpus(bank, **options)
    moments = set()
    for index in range(8):
        still, clip = stills[index], clips[index]
        assert (
            still["video"].shape == (1, 64, 64, 3)
            and "audio" not in still
            and still["phones"] == ()
        )
        assert still["captions"] == clip["captions"]
        same = (clip["video"] == still["video"]).flatten(1).all(1).nonzero()
        assert len(same)
        moments.add(int(same[0]))
    assert len(moments) > 3  # not always the same one
