"""What a prompt asks for: descriptions for the text encoder, words on the clock, and the length of
the clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from avdiff.clip import ClipSpec, as_fps
from avdiff.corpus.captions import parse_prompt
from avdiff.corpus.prompt import onset_track, onsets_in_caption
from avdiff.g2p.pronounce import read
from avdiff.models.prompt_domain import PromptDomain
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import PhonemeTrack, track_from_phones
from avdiff.pipelines.request import FrameFormat, GenerationRequest

DEFAULT_SECONDS = 2.5  # a clip without words


@dataclass(frozen=True)
class ClipPlan:
    """A batch of prompts, understood.

    Args:
        clip: size and length of all. descriptions: captions without the spoken words. phones: the
            words of each clip with times in seconds. track: the same for the transformer; None
            where nobody speaks and nothing is struck.
    """

    clip: ClipSpec
    descriptions: list[str]
    phones: list[tuple[Phone, ...]]
    track: PhonemeTrack | None


@dataclass(frozen=True)
class ClipLength:
    """Length of a clip that is asked for or follows from what is given; None where the words
    decide. speech_start: seconds at which the words begin.
    """

    seconds: float | Fraction | None = None
    num_frames: int | None = None
    speech_start: float = 0.0


def clip_length(request: GenerationRequest) -> ClipLength:
    """The length that is asked for, else that of what is given; words begin after the sound that
    the clip continues, else at 0.
    """
    fps = as_fps(request.frame.fps)  # type: ignore[arg-type]
    samples = 0 if request.audio is None else request.audio.shape[-1]
    heard = Fraction(samples, request.frame.sample_rate)
    seconds = request.seconds
    num_frames = request.num_frames
    length = seconds if num_frames is None else num_frames / fps
    if length is None and request.video is not None:
        num_frames = request.video.shape[2]
    elif length is None and request.audio is not None:
        seconds = heard
    start = request.speech_start
    if start is None:
        step = request.frame.clock.video_stride / fps
        start = float(heard) if length is not None and length - heard > step else 0.0
    return ClipLength(seconds, num_frames, start)


def plan_clip(
    prompts: list[str] | None,
    frame: FrameFormat,
    length: ClipLength = ClipLength(),
    language: str | None = None,
    phoneme_track: PhonemeTrack | None = None,
    prompt_domain: PromptDomain | None = None,
    has_media: bool = False,
    event_seeds: Sequence[int] | None = None,
) -> ClipPlan:
    """Read prompts.

    Args:
        prompts: texts with the spoken words in double quotes, or None when embeddings were given.
        length: with neither seconds nor frames, the clip is as long as the longest of the words
            takes.
        language: of the words; None finds it out for each prompt.
        phoneme_track: used as it is in place of the prompts' words.
        prompt_domain: what the model can make; None takes every prompt.
        has_media: sound or pictures come with the prompts.
        event_seeds: for each prompt; events without words get an onset track then, unless sound or
            pictures are given, which tell when.

    Raises:
        ValueError: a prompt beyond the domain, or words that do not fit into the length.
    """
    parsed = [parse_prompt(prompt) for prompt in prompts or []]
    for prompt, (description, words) in zip(prompts or [], parsed, strict=True):
        if prompt_domain is not None:
            known = has_media or phoneme_track is not None
            prompt_domain.check(prompt, description, words, known)
    spoken: list[tuple[Phone, ...]] = [()] * len(parsed)
    if phoneme_track is None:
        spoken = [_spoken(words, language, length.speech_start) for _, words in parsed]
    clip = _clip_of(frame, length, spoken)
    _check_words_fit([words for _, words in parsed], spoken, clip)
    if phoneme_track is None and event_seeds is not None and not has_media:
        spoken = _with_onsets(parsed, spoken, event_seeds, clip, prompt_domain)
    if phoneme_track is None and any(spoken):
        phoneme_track = track_from_phones(spoken, clip)
    return ClipPlan(clip, [description for description, _ in parsed], spoken, phoneme_track)


def _spoken(words: str | None, language: str | None, start: float) -> tuple[Phone, ...]:
    """Phones of some words, the first at `start` seconds."""
    if not words:
        return ()
    phones = read(words, language).phones
    return tuple(p._replace(start=p.start + start, end=p.end + start) for p in phones)


def _clip_of(
    frame: FrameFormat, length: ClipLength, spoken: Sequence[tuple[Phone, ...]]
) -> ClipSpec:
    if length.num_frames is not None:
        return frame.frames(length.num_frames)
    needed = max((phones[-1].end for phones in spoken if phones), default=DEFAULT_SECONDS)
    return frame.seconds(needed if length.seconds is None else length.seconds)


def _check_words_fit(
    words: Sequence[str | None], spoken: Sequence[tuple[Phone, ...]], clip: ClipSpec
) -> None:
    for text, phones in zip(words, spoken, strict=True):
        # the last phone is the silence after the words
        if phones and phones[-1].start > float(clip.seconds):
            raise ValueError(
                f"{text!r} takes {phones[-1].start:.1f} s to say, but the clip lasts "
                f"{float(clip.seconds):.1f} s: ask for a longer clip or fewer words"
            )


def _with_onsets(
    parsed: Sequence[tuple[str, str | None]],
    spoken: Sequence[tuple[Phone, ...]],
    seeds: Sequence[int],
    clip: ClipSpec,
    prompt_domain: PromptDomain | None,
) -> list[tuple[Phone, ...]]:
    """Words as they are, and onset tracks of the events without words."""
    seconds = float(clip.seconds)
    tracks = []
    for (description, words), phones, seed in zip(parsed, spoken, seeds, strict=True):
        struck = not words and is_event(description, prompt_domain)
        tracks.append(onset_track(description, seconds, seed) if struck else phones)
    return tracks


def is_event(description: str, prompt_domain: PromptDomain | None = None) -> bool:
    """Whether a prompt without words is about something that sounds when it is struck."""
    return onsets_in_caption(description) is not None or (
        prompt_domain is not None and prompt_domain.is_event(description)
    )


def seeds_of(generator: torch.Generator | list[torch.Generator] | None, batch: int) -> list[int]:
    """A seed for the onsets of each clip's event."""
    if isinstance(generator, list):
        return [one.initial_seed() for one in generator]
    first = int(torch.randint(2**62, ())) if generator is None else generator.initial_seed()
    return [first + number for number in range(batch)]
