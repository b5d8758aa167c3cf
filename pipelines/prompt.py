"""What a prompt asks for: descriptions for the text encoder, words on the clock, and the length of the clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from avdiff.clip import ClipSpec
from avdiff.data.corpus.captions import parse_prompt
from avdiff.data.corpus.visemes import Phone
from avdiff.data.script import script_from_phones
from avdiff.models.conditions import Script

LEAD_IN, TAIL = 0.2, 0.3  # seconds of silence around the words, as in the presenter corpus
DEFAULT_SECONDS = 2.5  # a clip without words


@dataclass(frozen=True)
class Request:
    """A batch of prompts, understood. `phones` are the words of each clip with times in seconds, for whoever measures."""

    clip: ClipSpec
    descriptions: list[str]
    phones: list[tuple[Phone, ...]]
    script: Script | None


def understand(prompts: list[str] | None, reader: Any, frame: dict[str, Any], seconds: float | None = None,
               num_frames: int | None = None, language: str | None = None, script: Script | None = None) -> Request:
    """Read prompts.

    Args:
        prompts: texts with the spoken words in double quotes, or None when embeddings were given.
        reader: text to timed phones (`PronunciationReader`), or None.
        frame: keyword arguments of `ClipSpec` other than its length.
        seconds, num_frames: length of the clip; with neither, as long as the longest of the words takes.
        script: used as it is in place of the prompts' words.

    Raises:
        ValueError: both lengths are given, words without a reader, or words that do not fit into the length.
    """
    if seconds is not None and num_frames is not None:
        raise ValueError(f"seconds={seconds} and num_frames={num_frames}: give one of them")
    parsed = [parse_prompt(p) for p in prompts or []]
    spoken: list[tuple[Phone, ...]] = [()] * len(parsed)
    if script is None:
        spoken = [_timed(words, reader, language) for _, words in parsed]
    needed = max((phones[-1].end + TAIL for phones in spoken if phones), default=DEFAULT_SECONDS)
    clip = (ClipSpec(num_frames, **frame) if num_frames is not None else
            ClipSpec.from_seconds(needed if seconds is None else seconds, **frame))
    for phones in spoken:
        if phones and phones[-1].end > float(clip.seconds):
            raise ValueError(f"the words take {phones[-1].end:.1f} s, but the clip lasts {float(clip.seconds):.1f} s: "
                             "ask for a longer clip or fewer words")
    if script is None and any(spoken):
        script = script_from_phones(spoken, clip)
    return Request(clip, [description for description, _ in parsed], spoken, script)


def _timed(words: str | None, reader: Any, language: str | None) -> tuple[Phone, ...]:
    """Spoken words -> phones on the clip's clock, after the lead-in."""
    if not words:
        return ()
    if reader is None:
        raise ValueError(f"the prompt has words to speak ({words!r}), but this pipeline has no reader: pass script=")
    return tuple(p._replace(start=p.start + LEAD_IN, end=p.end + LEAD_IN) for p in reader.read(words, language).phones)
