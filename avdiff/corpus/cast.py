"""The cast: names that stand for one presenter each, with a face and a voice of their own.

A name decides everything: its gender, its face (an identity of the training split) and, in each
language, one voice among those that speak it. Many names share a first or a last name, so that
neither alone says who somebody is.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from avdiff.corpus.face.identity import Identity, sample_identity

# Script -> first names of women, first names of men, last names, how a full name is written.
_NAMES: dict[str, tuple[str, str, str, str]] = {
    "latin": (
        "Anna Maria Sofia Lucía Camille Giulia Beatriz Chloé Emma Inês Zoë Marta",
        "Marco David Pierre João Miguel Lucas Antonio Noël Peter Javier Matteo Rafael",
        "Rossi Silva García Dupont Novak Müller Costa Moreau Ferrari Santos Nielsen Clark "
        "Okafor Bianchi Almeida Lefèvre Navarro Walsh",
        "{first} {last}",
    ),
    "devanagari": (
        "मीना गीता सीता पूजा राधा आशा अनिता नीता",
        "राम रवि अनिल सुनील मोहन अमित विजय राज",
        "शर्मा वर्मा गुप्ता सिंह कुमार पटेल जोशी मेहता नायर दास",
        "{first} {last}",
    ),
    "han": (
        "芳 娜 静 丽 敏 雪梅 小红 美玲 晓燕 玉兰",
        "伟 强 磊 洋 明 建国 志远 小龙 文杰 国华",
        "王 李 张 刘 陈 杨 赵 黄 周 吴 孙 马",
        "{last}{first}",
    ),
    "kanji": (
        "花子 美咲 陽菜 由美 さくら 恵子 あおい 結衣",
        "太郎 健太 大輔 翔太 一郎 直樹 拓也 誠",
        "佐藤 鈴木 高橋 田中 伊藤 渡辺 山本 中村 小林 加藤",
        "{last}{first}",
    ),
    "cyrillic": (
        "Анна Ольга Елена Ирина Мария Вера",
        "Иван Пётр Олег Борис Павел Антон",
        "Иванова|Иванов Петрова|Петров Попова|Попов Соколова|Соколов Орлова|Орлов Лебедева|Лебедев",
        "{first} {last}",
    ),
    "greek": (
        "Ελένη Μαρία Άννα Σοφία",
        "Νίκος Γιώργος Πέτρος Κώστας",
        "Παππά|Παππάς Νικολάου Γεωργίου Δήμου",
        "{first} {last}",
    ),
}
# Second given names double the Latin names: "Anna Maria Rossi" is not "Anna Rossi".
_MIDDLE = {
    "female": ("", "Maria ", "Clara ", "Rose "),
    "male": ("", "José ", "Paul ", "Luca "),
}
CAST_SPLIT = "train"  # of the identities


@dataclass(frozen=True)
class CastMember:
    """One name and who it is. `gender` is that of the face and of the voice."""

    name: str
    gender: str

    @property
    def identity(self) -> Identity:
        """The face: a function of the name alone."""
        return _identity(self.name, self.gender)

    def voice(self, voices: Sequence[str]) -> str:
        """The member's voice among those of one language and of its gender.

        Each voice is ranked by a hash (highest random weight, Thaler and Ravishankar 1998), so that
        a corpus with further voices moves few members.

        Raises:
            ValueError: there are none.
        """
        if not voices:
            raise ValueError(f"voices=[]: needs at least one for {self.name}")
        return max(voices, key=lambda voice: (_hash(f"{self.name}|{voice}"), voice))


@cache
def cast_members() -> tuple[CastMember, ...]:
    """All named presenters, in a fixed order of all scripts mixed."""
    members = [
        CastMember(name, gender)
        for script in _NAMES
        for gender in ("female", "male")
        for name in _names(script, gender)
    ]
    members.sort(key=lambda member: _hash(member.name))
    return tuple(members)


@cache
def _by_name() -> dict[str, CastMember]:
    return {_folded(member.name): member for member in cast_members()}


def cast_member(name: str) -> CastMember | None:
    """The member of a name in any case and form of its letters; None for a name not in the cast."""
    return _by_name().get(_folded(name))


@cache
def _any_name() -> re.Pattern[str]:
    names = sorted((_folded(member.name) for member in cast_members()), key=len, reverse=True)
    return re.compile(
        "|".join(
            rf"(?<!\w){re.escape(n)}(?!\w)" if n[0] < "ऀ" or " " in n else re.escape(n)
            for n in names
        )
    )


def cast_member_in(text: str) -> CastMember | None:
    """The first member whose name stands in a text; the longest name where several begin there."""
    found = _any_name().search(_folded(text))
    return _by_name()[found[0]] if found else None


def _names(script: str, gender: str) -> list[str]:
    women, men, last_names, pattern = _NAMES[script]
    middles = _MIDDLE[gender] if script == "latin" else ("",)
    names = []
    for first in (women if gender == "female" else men).split():
        for middle in middles:
            if middle.strip() == first:
                continue
            for last in last_names.split():
                form = last.split("|")[0 if gender == "female" else -1]
                names.append(pattern.format(first=f"{first} {middle}".strip(), last=form))
    return names


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@cache
def _identity(name: str, gender: str) -> Identity:
    return sample_identity(np.random.default_rng(_hash(name)), gender, CAST_SPLIT)
