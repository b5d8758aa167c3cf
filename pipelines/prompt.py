"""What a prompt asks for: descriptions for the text encoder, words on the clock, and the length of
the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from avdiff.clip import ClipSpec
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.prompt import onset_track, onsets_in_caption
from avdiff.g2p.pronounce import read
from avdiff.models.prompt_domain import PromptDomain
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import PhonemeTrack, track_from_phones

DEFAULT_SECONDS = 2.5  # a clip without words


@dataclass(frozen=True)
class Request:
    """A batch of prompts, understood. `phones` are the words of each clip with times in seconds."""

    clip: ClipSpec
    descriptions: list[str]
    phones: list[tuple[Phone, ...]]
    track: PhonemeTrack | None


def understand(
    prompts: list[str] | None,
    frame: dict[str, Any],
    seconds: float | Fraction | None = None,
    num_frames: int | None = None,
    language: str | None = None,
    track: PhonemeTrack | None = None,
    prompt_domain: PromptDomain | None = None,
    given: bool = False,
    begin: float = 0.0,
    event_seeds: Sequence[int] | None = None,
) -> Request:
    """Read prompts.

    Args:
        prompts: texts with the spoken words in double quotes, or None when embeddings were given.
        frame: keyword arguments of `ClipSpec` other than its length.
        seconds, num_frames: length of the clip; with neither, as long as the longest of the words
            takes.
        language: of the words; None finds it out for each prompt.
        script: used as it is in place of the prompts' words.
        world: what the model can make; None takes every prompt. given: sound or pictures come with
            the prompts.
        begin: seconds at which the words begin.
        event_seeds: for each prompt; events without words get a script of their strokes then,
            unless sound or pictures are given, which tell when.

    Raises:
        ValueError: both lengths are given, a prompt beyond the world, or words that do not fit into
            the length.
    """
    if seconds is not None and num_frames is not None:
        raise ValueError(f"seconds={seconds} and num_frames={num_frames}: give one of them")
    parsed = [parse_prompt(p) for p in prompts or []]
    for prompt, (description, words) in zip(prompts or [], parsed, strict=True):
        if prompt_domain is not None:
            prompt_domain.check(prompt, description, words, given or track is not None)
    spoken: list[tuple[Phone, ...]] = [()] * len(parsed)
    if track is None:
        spoken = [
            tuple(
                p._replace(start=p.start + begin, end=p.end + begin)
                for p in read(words, language).phones
            )
            if words
            else ()
            for _, words in parsed
        ]
    needed = max((phones[-1].end for phones in spoken if phones), default=DEFAULT_SECONDS)
    clip = (
        ClipSpec(num_frames, **frame)
        if num_frames is not None
        else ClipSpec.from_seconds(needed if seconds is None else seconds, **frame)
    )
    for (_, words), phones in zip(parsed, spoken, strict=True):
        if phones and phones[-1].start > float(
            clip.seconds
        ):  # the last is the silence after the words
            raise ValueError(
                f"{words!r} takes {phones[-1].start:.1f} s to say, but the clip lasts "
                f"{float(clip.seconds):.1f} s: ask for a longer clip or fewer words"
            )
    if track is None and event_seeds is not None and not given:
        spoken = [
            phones
            if words or not is_event(description, prompt_domain)
            else onset_track(description, float(clip.seconds), seed)
            for (description, words), phones, seed in zip(parsed, spoken, event_seeds, strict=True)
        ]
    if track is None and any(spoken):
        track = track_from_phones(spoken, clip)
    return Request(clip, [description for description, _ in parsed], spoken, track)


def is_event(description: str, prompt_domain: PromptDomain | None = None) -> bool:
    """Whether a prompt without words is about something that sounds when it is struck."""
    return onsets_in_caption(description) is not None or (
        prompt_domain is not None and prompt_domain.is_event(description)
    )
