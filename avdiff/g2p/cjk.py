"""Japanese and Chinese: words and their sounds from segmenters' readings, in the speech bank's
symbols.

fugashi with unidic-lite (MIT, BSD) segments Japanese and says how each word is pronounced in kana;
jieba and pypinyin (both MIT) do the same for Chinese in pinyin. Kana and pinyin are regular, so two
small tables turn them into phonemes.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any
from unicodedata import normalize

# ----------------------------------------------------------------------------------------- Japanese
_VOWELS = dict(zip("アイウエオ", "aiɯeo", strict=True))
_ROWS = {
    "カキクケコ": "k",
    "ガギグゲゴ": "ɡ",
    "サシスセソ": "s",
    "ザジズゼゾ": "ʣ",
    "タチツテト": "t",
    "ダヂヅデド": "d",
    "ナニヌネノ": "n",
    "ハヒフヘホ": "h",
    "バビブベボ": "b",
    "パピプペポ": "p",
    "マミムメモ": "m",
    "ラリルレロ": "ɾ",
}
_IRREGULAR = {
    "シ": "ɕi",
    "ス": "sɨ",
    "ジ": "ʥi",
    "ズ": "zɨ",
    "チ": "ʨi",
    "ツ": "ʦɨ",
    "ヂ": "ʥi",
    "ヅ": "zɨ",
    "ニ": "ɲi",
    "ヒ": "çi",
    "フ": "ɸɯ",
    "ヤ": "ja",
    "ユ": "jɯ",
    "ヨ": "jo",
    "ワ": "βa",
    "ヰ": "i",
    "ヱ": "e",
    "ヲ": "o",
    "ン": "ɴ",
    "ッ": "ʔ",
    "ー": "ː",
    "ヴ": "vɯ",
    "ヶ": "ke",
    "ヵ": "ka",
    "ヮ": "βa",
}
_PALATAL = {
    "シ": "ɕ",
    "ジ": "ʥ",
    "チ": "ʨ",
    "ヂ": "ʥ",
    "ニ": "ɲ",
    "ヒ": "ç",
    "フ": "ɸʲ",
    "ヴ": "vʲ",
    "テ": "tʲ",
    "デ": "dʲ",
}
_SMALL = dict(zip("ァィゥェォャュョ", "aiɯeoaɨo", strict=True))
_NASALS = (("mbp", "m"), ("kɡ", "ŋ"), ("tdnzɾ", "n"), ("ʨʥɲ", "ɲ"))


@cache
def kana_table() -> dict[str, str]:
    """Mora -> phonemes: single kana, and kana with a small one."""
    table = dict(_VOWELS)
    for row, consonant in _ROWS.items():
        for kana, vowel in zip(row, "aiɯeo", strict=True):
            table[kana] = consonant + ("ʲ" if vowel == "i" else "") + vowel
    table |= _IRREGULAR
    for row, consonant in _ROWS.items():
        for kana in row:
            for small, vowel in _SMALL.items():
                palatal = small in "ャュョ"
                stem = _PALATAL.get(
                    kana, consonant + "ʲ" if palatal or small == "ィ" else table[kana][:-1]
                )
                if not palatal and kana in "シジチヂ":
                    stem = _PALATAL[kana]
                elif not palatal and small != "ィ":
                    stem = table[kana].rstrip("aiɯeoɨʲ")
                table[kana + small] = stem + (
                    vowel if palatal else {"ィ": "i"}.get(small, _SMALL[small])
                )
    table |= {"ウ" + small: "β" + _SMALL[small] for small in "ァィェォ"} | {"イェ": "je"}
    table |= {"ヴ" + small: "v" + _SMALL[small] for small in "ァィェォ"} | {"ヴュ": "vʲɨ"}
    return table | _SMALL


def read_kana(kana: str) -> str:
    """Hiragana or katakana -> phonemes, long vowels and nasals settled; other characters are
    dropped.
    """
    kana = "".join(chr(ord(c) + 0x60) if "ぁ" <= c <= "ゖ" else c for c in normalize("NFKC", kana))
    table = kana_table()
    out = ""
    i = 0
    while i < len(kana):
        width = 2 if kana[i : i + 2] in table else 1
        out += table.get(kana[i : i + width], "")
        i += width
    return settle_nasals(out)


def settle_nasals(phonemes: str) -> str:
    """The moraic nasal takes the place of what follows it."""
    for followers, nasal in _NASALS:
        phonemes = re.sub(f"ɴ(?=[{followers}])", nasal, phonemes)
    return phonemes


@cache
def _tagger() -> Any:
    import fugashi  # type: ignore[import-untyped]

    return fugashi.Tagger()


def segment_japanese(text: str) -> list[tuple[str, str]]:
    """Words and their kana pronunciation ("" where the dictionary has none)."""
    return [(word.surface, _kana(word)) for word in _tagger()(text)]


def _kana(word: Any) -> str:
    spoken = getattr(word.feature, "pron", None) or getattr(word.feature, "kana", None)
    if spoken and spoken != "*":
        return str(spoken)
    return word.surface if re.fullmatch(r"[ぁ-ゖァ-ヺー]+", word.surface) else ""


# ------------------------------------------------------------------------------------------ Chinese
_INITIALS = {
    "b": "p",
    "p": "pʰ",
    "m": "m",
    "f": "f",
    "d": "t",
    "t": "tʰ",
    "n": "n",
    "l": "l",
    "g": "k",
    "k": "kʰ",
    "h": "x",
    "j": "ʨ",
    "q": "ʨʰ",
    "x": "ɕ",
    "zh": "ꭧ",
    "ch": "ꭧʰ",
    "sh": "ʂ",
    "r": "ɻ",
    "z": "ʦ",
    "c": "ʦʰ",
    "s": "s",
}
# "T" is where the tone goes: after the vowels, before a final nasal.
_FINALS = {
    "a": "aT",
    "o": "woT",
    "e": "ɤT",
    "ai": "aiT",
    "ei": "eiT",
    "ao": "auT",
    "ou": "ouT",
    "an": "aTn",
    "en": "əTn",
    "ang": "aTŋ",
    "eng": "əTŋ",
    "ong": "ʊTŋ",
    "er": "ɚT",
    "i": "iT",
    "ia": "jaT",
    "ie": "jeT",
    "iao": "jauT",
    "iou": "jouT",
    "ian": "jɛTn",
    "in": "iTn",
    "iang": "jaTŋ",
    "ing": "iTŋ",
    "iong": "jʊTŋ",
    "u": "uT",
    "ua": "waT",
    "uo": "woT",
    "uai": "waiT",
    "uei": "weiT",
    "uan": "waTn",
    "uen": "wəTn",
    "uang": "waTŋ",
    "ueng": "wəTŋ",
    "v": "yT",
    "ve": "ɥeT",
    "van": "ɥɛTn",
    "vn": "yTn",
    "ê": "ɛT",
    "io": "joT",
    "m": "m",
    "n": "n",
    "ng": "ŋ",
}
_ARROWS = {"1": "→", "2": "↗", "3": "↓", "4": "↘", "": "", "5": ""}


def read_pinyin(initial: str, final: str) -> str:
    """Initial and final with its tone digit ("sh", "i4") in pypinyin's strict form -> phonemes with
    a tone arrow.
    """
    tone = final[-1] if final[-1:].isdigit() else ""
    vowels = final.removesuffix(tone)
    shape = (
        "ɨT"
        if vowels == "i" and initial in ("zh", "ch", "sh", "r", "z", "c", "s")
        else _FINALS.get(vowels, "")
    )
    return _INITIALS.get(initial, "") + shape.replace("T", _ARROWS[tone])


def _private_cache() -> Path:
    """Folder of the user's own, mode 0700, in their cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "avdiff" / "jieba"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError:  # a home that cannot be written: a new folder for this process alone
        return Path(tempfile.mkdtemp(prefix="avdiff-jieba-"))
    return folder


@cache
def _jieba() -> Any:
    import jieba  # type: ignore[import-untyped]

    jieba.setLogLevel(logging.ERROR)
    # jieba reads its cache with marshal, by default under a name in the shared temporary folder
    # that anybody could have written
    jieba.dt.tmp_dir = str(_private_cache())
    jieba.initialize()
    return jieba


def segment_chinese(text: str) -> list[str]:
    """Words of a run of Chinese text."""
    return [word for word in _jieba().lcut(text) if word.strip()]


def read_chinese(word: str) -> str:
    """Phonemes of a word, each character by its reading in that word.

    Tones are those of the characters, as in the bank: it writes no tone sandhi and leaves that to
    the voice.
    """
    from pypinyin import Style, lazy_pinyin

    initials = lazy_pinyin(word, style=Style.INITIALS, strict=True, errors="ignore")
    finals = lazy_pinyin(word, style=Style.FINALS_TONE3, strict=True, errors="ignore")
    return "".join(read_pinyin(i, f) for i, f in zip(initials, finals, strict=True))
