"""PromptDomain: what a pipeline can draw and say, declared in its own folder.

A prompt beyond it is answered by a sentence in place of a clip of mush.

A small model knows a small world: the presenter knows its presenters and six kinds of sounding
objects. The declaration is a component of the pipeline like its scheduler; a pipeline without one
takes every prompt.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config

_CJK = "\u3005\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A word of letters with their combining marks (Devanagari), or one character of Chinese or
# Japanese.
_TOKEN = re.compile(
    rf"[{_CJK}]|(?:(?![{_CJK}])[^\W\d_][\u0300-\u036f\u0900-\u0963\u0970-\u097f]*)+"
)


class PromptDomain(ConfigMixin):
    """The world of a pipeline, as word lists joined by spaces; characters in place of words for
    Chinese and Japanese.

    Args:
        about: what the model makes, as the rest of a sentence that begins with "this model".
        vocabulary: language -> words that its captions use. filler: words that say nothing about
            the picture (words of two Latin letters are filler by themselves).
        people: words for somebody who speaks. objects, actions: a clip without words needs one of
            each; actions are stems. foreign: words that always ask for something else.
        scripts: first words of Unicode names of the letters that can be spoken, such as LATIN.
    """

    config_name = "prompt_domain_config.json"

    @register_to_config
    def __init__(
        self,
        about: str = "",
        vocabulary: Mapping[str, str] | None = None,
        filler: str = "",
        people: str = "",
        objects: str = "",
        actions: str = "",
        foreign: str = "",
        scripts: tuple[str, ...] = (),
    ) -> None:
        self.about = about
        self.scripts = tuple(scripts)
        self._known = _words((vocabulary or {}).values())
        self._filler, self._people, self._objects, self._foreign = (
            _words([text]) for text in (filler, people, objects, foreign)
        )
        self._actions = tuple(actions.casefold().split())

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], subfolder: str | None = None, **options: Any
    ) -> PromptDomain:
        """Read what `save_pretrained` wrote, from a folder or a hub name."""
        config, _ = cls.load_config(path, subfolder=subfolder, return_unused_kwargs=True, **options)
        return cls.from_config(config)

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write the declaration as JSON."""
        self.save_config(folder)

    def check(self, prompt: str, description: str, spoken: str | None, given: bool = False) -> None:
        """Refuse a prompt that this model cannot follow.

        Args:
            prompt: as the user wrote it. description, spoken: its two parts. given: sound, pictures
                or a script came with the prompt, so that it needs neither words nor an event.

        Raises:
            ValueError: one sentence: what is beyond this world, what the model makes, and the two
                ways on.
        """
        fault = self.fault(description, spoken, given)
        if fault:
            shown = prompt if len(prompt) <= 60 else f"{prompt[:57]}..."
            raise ValueError(
                f"prompt={shown!r}: {fault}; this model {self.about}; load a larger one for "
                "anything else "
                "(from_pretrained, or --model), or try all the same with check_prompt=False "
                "(--skip-domain-check)"
            )

    def fault(self, description: str, spoken: str | None, given: bool = False) -> str | None:
        """What of a prompt lies outside, or None."""
        strange = next((c for c in spoken or "" if c.isalpha() and not self._can_spell(c)), None)
        if strange is not None and self.scripts:
            return f"the words hold {strange!r}, a letter of a script that it cannot speak"
        text = unicodedata.normalize("NFC", description).casefold()
        words = _TOKEN.findall(text)
        asked = self._found(self._foreign, words, text)
        if asked:
            return f"it asks for {asked!r}"
        if not spoken and not given and not self._is_event(words, text):
            return "it has no words in quotes and no event that sounds"
        telling = [w for w in words if w not in self._filler and not (len(w) <= 2 and w.isascii())]
        unknown = [w for w in telling if w not in self._known]
        if 2 * len(unknown) > len(telling):
            return f"it speaks of {', '.join(map(repr, unknown[:3]))}"
        if (
            unknown
            and not self._found(self._people, words, text)
            and not self._is_event(words, text)
        ):
            return f"nobody speaks in it, and {unknown[0]!r} is unknown"
        return None

    def _can_spell(self, letter: str) -> bool:
        return unicodedata.name(letter, "").startswith(self.scripts)

    def is_event(self, description: str) -> bool:
        """Whether a description names an object that sounds and what happens to it."""
        text = unicodedata.normalize("NFC", description).casefold()
        return self._is_event(_TOKEN.findall(text), text)

    def _is_event(self, words: list[str], text: str) -> bool:
        if not self._found(self._objects, words, text):
            return False
        return any(
            stem in text if _is_cjk(stem) else any(w.startswith(stem) for w in words)
            for stem in self._actions
        )

    @staticmethod
    def _found(listed: frozenset[str], words: Iterable[str], text: str) -> str | None:
        """The first listed word of a text; Chinese and Japanese words are looked for inside the
        text.
        """
        found = next((w for w in words if w in listed), None)
        return found or next((w for w in sorted(listed) if _is_cjk(w) and w in text), None)


def caption_words(texts: Iterable[str]) -> list[str]:
    """The different words of some texts, cut as a prompt's words are, in alphabetical order."""
    return sorted(
        {w for text in texts for w in _TOKEN.findall(unicodedata.normalize("NFC", text).casefold())}
    )


def _words(texts: Iterable[str]) -> frozenset[str]:
    return frozenset(
        w for text in texts for w in unicodedata.normalize("NFC", text).casefold().split()
    )


def _is_cjk(word: str) -> bool:
    return re.match(f"[{_CJK}]", word) is not None
