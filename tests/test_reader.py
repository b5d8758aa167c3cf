"""The pronunciation reader: text, numbers, kana and pinyin, linking, the networks, timing, and
their training.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from avdiff.g2p.cjk import read_chinese, read_kana, segment_chinese, segment_japanese
from avdiff.g2p.connected_speech import Spoken, link
from avdiff.g2p.lexicon import LANGUAGES, english_plural, load_lexicon
from avdiff.g2p.networks import Networks, default_networks
from avdiff.g2p.normalize import detect_language, normalize_text, split_text
from avdiff.g2p.numbers import HINDI, cardinal, spell_numbers, split_decimal
from avdiff.g2p.pronounce import LEAD, TAIL, Reading, pronounce_words, read
from avdiff.models.g2p.networks import DurationPredictor, Pronouncer
from avdiff.phonetics.phone import SILENCE, inventory
from avdiff.train.g2p.letter_alignment import UNITS, align_words
from avdiff.train.g2p.sentences import edit_distance
from avdiff.train.g2p.train_g2p import Spelling, WordTask, fold, pack
from avdiff.train.loop.fit import FitOptions, fit

SENTENCES = {
    "en": "Good morning, can you see the yellow house?",
    "es": "Buenos días, ¿puede ver la casa amarilla?",
    "fr": "Bonjour, pouvez-vous voir la maison jaune ?",
    "hi": "नमस्ते, क्या आप पीला घर देख सकते हैं?",
    "it": "Buongiorno, vede la casa gialla?",
    "ja": "おはようございます、黄色い家が見えますか",
    "pt": "Bom dia, você consegue ver a casa amarela?",
    "zh": "早上好，你能看见那个黄色的房子吗？",
}


# ------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "零"),
        (10, "十"),
        (15, "十五"),
        (20, "二十"),
        (105, "一百零五"),
        (110, "一百一十"),
        (1001, "一千零一"),
        (1010, "一千零一十"),
        (10000, "一万"),
        (10500, "一万零五百"),
        (120034, "十二万零三十四"),
        (100000000, "一亿"),
    ],
)
def test_chinese_numbers(number: int, words: str) -> None:
    assert cardinal(number, "zh") == words


def test_hindi_numbers() -> None:
    assert len(HINDI) == len(set(HINDI)) == 100
    assert cardinal(58, "hi") == "अट्ठावन" and cardinal(123456, "hi") == (
        "एक लाख तेईस हज़ार चार सौ छप्पन"
    )
    assert cardinal(10**7, "hi") == "एक करोड़"


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "58 apples", "fifty eight apples"),
        ("en", "$3.50!", "three dollars fifty !"),
        (
            "en",
            "1,234,567",
            "one million two hundred and thirty four thousand five hundred and sixty seven",
        ),
        ("en", "at 10:05", "at ten o five"),
        ("en", "3rd", "third"),
        ("en", "007", "zero zero seven"),
        ("es", "3,5 km", "tres coma cinco km"),
        ("es", "1.200 €", "mil doscientos euros"),
        ("fr", "71 %", "soixante et onze pour cent"),
        ("it", "21", "ventuno"),
        ("pt", "16", "dezesseis"),
        ("zh", "50%", "百分之五十"),
        ("ja", "58円", "五十八円"),
        ("hi", "25 रुपये", "पच्चीस रुपये"),
        ("en", "-4 °", "minus four degrees"),
    ],
)
def test_numbers_in_text(language: str, text: str, words: str) -> None:
    assert spell_numbers(text, language).split() == words.split()


def test_no_digit_is_left_and_marks_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("0123456789.,: -%$a"), 12))
        for language in LANGUAGES:
            assert not any(c in "0123456789%$" for c in spell_numbers(text, language))
    assert split_decimal("1.234,5", "en") == ("1234", "5") and split_decimal("1,234.5", "es") == (
        "1234",
        "5",
    )
    assert split_decimal("1.234", "es") == ("1234", "") and split_decimal("1.234", "en") == (
        "1",
        "234",
    )


# --------------------------------------------------------------------------------------------- text
@pytest.mark.parametrize("language", LANGUAGES)
def test_language_is_detected(language: str) -> None:
    assert detect_language(SENTENCES[language]) == language
    assert detect_language(SENTENCES[language].upper()) == language
    assert detect_language("鉄道、図書館") == "ja" and detect_language("铁路，图书馆") == "zh"


def test_text_becomes_words_and_pauses() -> None:
    assert normalize_text("\u201cIt\u2019s  \u200bﬁne\u201d… 'yes'") == "It's fine . 'yes'"
    pieces = split_text("Hello, world… it's 2 ('nice')!", "en")
    assert [(p.text, p.is_word) for p in pieces] == [
        ("Hello", True),
        (",", False),
        ("world", True),
        (".", False),
        ("it's", True),
        ("two", True),
        (",", False),
        ("nice", True),
        (",", False),
    ]
    assert [p.text for p in split_text("el QRST, NASA", "es") if p.is_word] == [
        "el",
        "Q",
        "R",
        "S",
        "T",
        "NASA",
    ]


# ------------------------------------------------------------------------------------------ eastern
@pytest.mark.parametrize(
    ("kana", "phonemes"),
    [
        ("トーキョー", "toːkʲoː"),
        ("がっこう", "ɡaʔkoɯ"),
        ("サンポ", "sampo"),
        ("コンニチワ", "koɲɲiʨiβa"),
        ("シューカン", "ɕɨːkaɴ"),
        ("ジュウ", "ʥɨɯ"),
        ("ファイト", "ɸaito"),
        ("ヴァン", "vaɴ"),
        ("りょこう", "ɾʲokoɯ"),
        ("ひゃく", "çakɯ"),
    ],
)
def test_kana(kana: str, phonemes: str) -> None:
    assert read_kana(kana) == phonemes


def test_kana_and_pinyin_agree_with_the_lexicon() -> None:
    words = {
        w: p.replace(" ", "")
        for w, p in load_lexicon("ja").words.items()
        if all("ァ" <= c <= "ー" for c in w)
    }
    assert (
        len(words) > 2000 and sum(read_kana(w) == p for w, p in words.items()) / len(words) > 0.98
    )
    words = {
        w: p.replace(" ", "")
        for w, p in load_lexicon("zh").words.items()
        if all("一" <= c <= "鿿" for c in w)
    }
    sample = dict(list(words.items())[::10])
    assert sum(read_chinese(w) == p for w, p in sample.items()) / len(sample) > 0.97


def test_segmenters() -> None:
    assert ("東京", "トーキョー") in segment_japanese("東京へ行きます")
    assert segment_chinese("我想要桃子") == ["我", "想要", "桃子"]


# ------------------------------------------------------------------------------------------ linking
@pytest.mark.parametrize(
    ("language", "words", "linked"),
    [
        ("en", [("player", "plˈAɚ"), ("in", "ɪn")], "plˈAɚɹ ɪn"),
        ("en", [("player", "plˈAɚ"), ("two", "tˈuː")], "plˈAɚ tˈuː"),
        ("es", [("la", "la"), ("vaca", "bˈaka")], "la βˈaka"),
        ("es", [("un", "un"), ("vaso", "bˈaso")], "um bˈaso"),
        ("fr", [("les", "le"), ("amis", "amˈi")], "lez amˈi"),
        ("fr", [("les", "le"), ("chats", "ʃˈa")], "le ʃˈa"),
        ("fr", [("les", "le"), ("héros", "eʁˈo")], "le eʁˈo"),
        ("pt", [("muito", "mwˈiŋtʊ"), ("azul", "azˈuʊ")], "mwˈiŋtw azˈuʊ"),
        ("pt", [("os", "ʊs"), ("dias", "ʤˈiæs")], "ʊz ʤˈiæs"),
        ("it", [("la", "la"), ("casa", "kˈaza")], "la kˈaza"),
    ],
)
def test_neighbours(language: str, words: list[tuple[str, str]], linked: str) -> None:
    assert " ".join(w.phonemes for w in link([Spoken(*w) for w in words], language)) == linked


# ------------------------------------------------------------------------------------------ reading
@pytest.mark.parametrize(
    ("text", "phonemes"),
    [
        ("What a lovely book!", "wˌʌt ɐ lˈʌvli bˈʊk"),
        ("the office opens at four", "ðɪ ˈɑːfɪs ˈOpənz æt fˈɔːɹ"),
        ("Buenos días", "bwˈenos ðˈias"),
        ("Il est six heures", None),
        ("今日は不思議な日です", "kʲoː βa ɸɯɕiɡʲi na çi desɨ"),
        ("他想要83个桃子", None),
        ("क्या आप फूल देख सकते हैं?", "kːjaː ˌaːp pʰˈuːl dˈeːkʰ sˈʌktˌeː hɛ̃"),
    ],
)
def test_known_sentences(text: str, phonemes: str | None) -> None:
    reading = read(text)
    assert reading.words and (phonemes is None or reading.phonemes == phonemes)


@pytest.mark.parametrize("language", LANGUAGES)
def test_reading_tiles_its_time(language: str) -> None:
    reading = read(SENTENCES[language] + " 42. Xzqv!")
    check_tiles(reading)
    assert reading.language == language and 1.5 < reading.duration < 12
    assert sum(p.symbol == SILENCE for p in reading.phones) >= 3  # both ends and the comma
    assert all(p.symbol in inventory()[0] and 0 <= p.stress_tone < 7 for p in reading.phones)
    assert reading.phones[0].end == LEAD and math.isclose(
        reading.phones[-1].end - reading.phones[-1].start, TAIL
    )


def check_tiles(reading: Reading) -> None:
    assert reading.phones[0].start == 0
    assert all(
        a.end == b.start and b.end > b.start
        for a, b in zip(reading.phones, reading.phones[1:], strict=False)
    )
    assert all(
        a.end <= b.start and a.start < a.end
        for a, b in zip(reading.words, reading.words[1:], strict=False)
    )


def test_length_speed_and_times_of_words() -> None:
    text = "Good morning, my friends"
    natural, double = read(text), read(text, speed=2)
    assert math.isclose(natural.duration - LEAD - TAIL, 2 * (double.duration - LEAD - TAIL))
    exact = read(text, seconds=3.3)
    check_tiles(exact)
    assert math.isclose(exact.duration, 3.3) and [p.symbol for p in exact.phones] == [
        p.symbol for p in natural.phones
    ]
    timed = read(text, word_times=[(0.2, 0.5), None, None, (2.0, 2.5)])
    check_tiles(timed)
    assert (timed.words[0].start, timed.words[0].end, timed.words[3].start, timed.words[3].end) == (
        0.2,
        0.5,
        2.0,
        2.5,
    )
    assert 0.5 <= timed.words[1].start < timed.words[2].end <= 2.0
    touching = read("go home", word_times=[(0.5, 1.0), (1.0, 1.5)])
    assert touching.words[0].end == touching.words[1].start == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "   "}, "no word"),
        ({"text": "?!"}, "no word"),
        ({"text": "hi", "language": "xx"}, "needs one of en, es"),
        ({"text": "hello", "seconds": 0.1}, "too short"),
        ({"text": "hello", "speed": 0}, "0.25 to 4"),
        ({"text": "a b", "word_times": [(0.1, 0.2)]}, "1 entries"),
        ({"text": "a" * 5000}, "at most 4000"),
        ({"text": "say привет"}, "'привет' is in a script"),
        ({"text": "go home", "word_times": [(1.0, 0.5), None]}, "ascending"),
    ],
)
def test_bad_input_gets_a_sentence(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(**options)  # type: ignore[arg-type]


def test_unknown_words_are_read_by_the_network() -> None:
    networks = default_networks()
    invented = ["blonting", "grepshaw", "flimbert", "zonk"]
    together = pronounce_words(invented, "en", networks)
    apart = [Networks.load().spell([w], "en")[0] for w in invented]
    assert together == apart  # neither padding nor company changes a word
    expected = ["blˈɑːntɪŋ", "ɡɹˈɛpʃɔː", "flˈɪmbɚt", "zˈɑːŋk"]
    assert all(edit_distance(p, q) <= 2 for p, q in zip(together, expected, strict=True))
    assert read("日本のgrepshaw").words[-1].phonemes == together[1]
    mixed = read("I said नमस्ते and 谢谢", "en")
    assert [w.phonemes for w in mixed.words[2::2]] == ["nəmˈʌsteː", "ɕje↘ɕje↘"]
    assert networks.spell(["łódź"], "en")[0] and networks.spell(["x" * 90], "it")[0]


@pytest.mark.parametrize(
    ("word", "phonemes"),
    [
        ("ponies", "pˈOniz"),
        ("foxes", "fˈɑːksᵻz"),
        ("cats", "kˈæts"),
        ("emma's", "ˈɛməz"),
        ("glass", None),
        ("xs", None),
    ],
)
def test_plurals_follow_their_stems(word: str, phonemes: str | None) -> None:
    words = {
        "pony": "pˈOni",
        "fox": "fˈɑːks",
        "cat": "kˈæt",
        "emma": "ˈɛmə",
        "glas": "x",
        "x": "ˈɛks",
    }
    assert english_plural(word, words) == phonemes


# ----------------------------------------------------------------------------------------- networks
def tiny_reader() -> Pronouncer:
    torch.manual_seed(0)
    model = Pronouncer(
        ["en", "it"],
        "abcd",
        ["", "a", "b", "ab"],
        dim=16,
        num_blocks=3,
        chunk_dim=8,
        table_size=50,
        memory_dim=4,
    )
    torch.nn.init.normal_(model.memory.to_v.weight, std=0.3)
    return model.eval()


def test_names_one_by_one_equal_all_at_once() -> None:
    model = tiny_reader()
    letters, languages = model.encode_words(["abcda", "dc", "bb"], ["en", "it", "it"])
    read_ = model.read_memory(letters, languages)
    chunks = model.spell(letters, languages, read_)
    logits = model(letters, languages, chunks, read_)
    present = letters != 0
    assert (
        torch.equal(logits.argmax(-1)[present], chunks[present])
        and len(set(chunks[present].tolist())) > 1
    )
    alone = model.encode_words(["dc"], ["it"])
    assert torch.allclose(
        model(*alone, chunks[1:2, :2], model.read_memory(*alone)), logits[1:2, :2], atol=1e-5
    )


def test_memory_sees_one_letter_ahead_and_one_language() -> None:
    model = tiny_reader()
    words = ["abca", "abda", "abca"]
    read_ = model.read_memory(*model.encode_words(words, ["en", "en", "it"]))
    same = (read_.values[0] == read_.values[1]).all(-1).tolist()
    assert same == [
        True,
        False,
        False,
        False,
    ]  # place 1 already knows its right neighbour; place 0 does not
    assert not torch.equal(read_.values[0], read_.values[2])
    off = model.pronounce(words, ["en"] * 3, use_memory=False)
    assert len(off) == 3


def test_networks_are_saved_and_read_again(tmp_path: Path) -> None:
    model = tiny_reader()
    model.save_pretrained(tmp_path)
    again = Pronouncer.from_pretrained(tmp_path).eval()
    assert again.pronounce(["abcd", "dcba"], ["en", "it"]) == model.pronounce(
        ["abcd", "dcba"], ["en", "it"]
    )
    timer = DurationPredictor(5, 7, 8, dim=8).eval()
    ids, stress_tones = torch.tensor([[1, 2, 3, 5, 5], [1, 2, 3, 4, 1]]), torch.zeros(2, 5).long()
    languages = torch.tensor([0, 3])
    padded = timer(ids, stress_tones, languages)[0, :3]
    assert torch.allclose(
        padded, timer(ids[:1, :3], stress_tones[:1, :3], languages[:1])[0], atol=1e-6
    )


# ----------------------------------------------------------------------------------------- training
def test_letters_are_aligned_with_sounds() -> None:
    words = {w: p for w, p in load_lexicon("es").words.items() if " " not in p}
    pairs = list(words.items())[:1500]
    aligned = align_words(pairs, rounds=3)
    assert all(
        "".join(chunks) == p for (_, p), chunks in zip(pairs, aligned, strict=True) if chunks
    )
    assert sum(chunks is None for chunks in aligned) < 20
    chosen = dict(zip([w for w, _ in pairs], aligned, strict=True))
    assert chosen["noche"] == ["n", "ˈo", "", "ʧ", "e"] or chosen["noche"] == [
        "n",
        "ˈo",
        "ʧ",
        "",
        "e",
    ]
    assert UNITS.findall("ˈɑːɹkʰ") == ["ˈɑː", "ɹ", "kʰ"]


def test_words_are_packed_and_held_out_by_hash() -> None:
    spellings = [Spelling("a" * (1 + i % 9), "es", "a", ("a",)) for i in range(100)]
    packs = pack(spellings, 0)
    spread = [max(len(s.word) for s in p) - min(len(s.word) for s in p) for p in packs]
    assert sum(map(len, packs)) == 100 and max(spread) < 5
    folds = [fold(w, "en") for w in load_lexicon("en").words]
    assert 0.03 < folds.count("test") / len(folds) < 0.07 and fold("house", "en") == fold(
        "house", "en"
    )


def test_training_learns_and_trains_the_table(tmp_path: Path) -> None:
    spellings = [Spelling(w, "es", w, tuple(w)) for w in load_lexicon("es").words if w.isalpha()][
        :400
    ]
    task = WordTask(spellings, dim=32, num_blocks=3, chunk_dim=16, table_size=300, memory_dim=4)
    before = task.reader.memory.table.rows.clone()  # type: ignore[union-attr]
    options = FitOptions(
        str(tmp_path), max_train_steps=30, train_batch_size=2, learning_rate=1e-2, log_every=1
    )
    fit(task, options)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:3])
    changed = (task.reader.memory.table.rows != before).any(1)  # type: ignore[union-attr]
    assert changed.any() and not changed.all()
    for memory in ("off", "frozen", "shuffled"):
        control = WordTask(
            spellings, memory, dim=32, num_blocks=3, chunk_dim=16, table_size=300, memory_dim=4
        )
        batch = control.collate([control.dataset[0]])
        assert torch.isfinite(control.loss(batch, "main", torch.Generator().manual_seed(0)).total)
    with pytest.raises(ValueError, match="memory='x'"):
        WordTask(spellings, "x")
