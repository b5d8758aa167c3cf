"""The presenter corpus: clip number -> a drawn presenter who speaks, or an object that sounds, with
the exact truth.

Everything about a clip follows from (seed, split, index): the same in any process, with any number
of workers, and the same scene at any size or frame rate.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from avdiff.clip import ClipSpec, as_fps, midpoints
from avdiff.corpus.attribute_list import attribute_list, caption_with_list
from avdiff.corpus.augment import Plan, degrade, draw_plan
from avdiff.corpus.captions import event_captions, join_sentences, speech_captions
from avdiff.corpus.cast import CastMember, cast_members
from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import Event, sample_event
from avdiff.corpus.events.sound import event_audio
from avdiff.corpus.face.presenter import (
    Identity,
    identity_key,
    lip_points,
    pose_track,
    render_face,
    sample_identity,
)
from avdiff.corpus.sample import ClipSample
from avdiff.corpus.speech.concatenate import (
    Concatenation,
    UtteranceSegment,
    choose_pieces,
    join_pieces,
    tile,
)
from avdiff.corpus.speech.read import (
    LANGUAGES,
    SAMPLE_RATE,
    SPLITS,
    SpeechCorpus,
    Utterance,
    normalised_text,
)
from avdiff.phonetics.visemes import viseme_track

PAUSE_SECONDS = (0.2, 0.6)  # between sentences
LEAD_SECONDS = (0.04, 0.35)  # before the first word
TAIL_SECONDS = (0.05, 0.4)  # after the last word
SPARE_SECONDS = (
    0.5  # sound made beyond the clip, so that rounding to whole frames never asks for more
)
SHARES = ("event_share", "augment_share", "full_captions", "attribute_lists", "names")
LONGEST_EVENT = 4.0  # seconds, where clips may be shorter or longer


@dataclass(frozen=True)
class CorpusOptions:
    """How clips are made. Audio is 24 kHz mono.

    Args:
        size: pixels of the square picture. fps: frame rate.
        seconds: (shortest, longest) clip, or one number: every clip has the fewest frames that last
            so long.
        max_sentences: sentences in a clip; 1 for single utterances.
        event_share: share of clips with sounding objects. augment_share: share of speech clips with
            degraded sound.
        keep_clean: return the undegraded sound too, as `audio_clean`.
        video, audio: leave one out to save its time.
        full_captions: chance of a caption that tells most of what is there to be seen, where people
            tell some of it.
        attribute_lists: share of captions with a list of all that is seen behind them.
        names: share of speech clips with a member of the cast, whose captions say the name.
        still: one picture of a random moment instead, without sound or words: many presenters for
            little time.
    """

    size: int = 128
    fps: Fraction | float | str = 25
    seconds: float | tuple[float, float] = (2.0, 6.0)
    max_sentences: int = 4
    event_share: float = 0.2
    augment_share: float = 0.2
    full_captions: float = 0.0
    attribute_lists: float = 0.0
    names: float = 0.0
    keep_clean: bool = False
    video: bool = True
    audio: bool = True
    still: bool = False

    def __post_init__(self) -> None:
        if not 16 <= self.size <= 4096:
            raise ValueError(f"size={self.size}: needs 16 to 4096 pixels")
        low, high = self.range
        if not 0.2 <= low <= high <= 60:
            raise ValueError(
                f"seconds={self.seconds}: needs a number, or (shortest, longest), from 0.2 to 60"
            )
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: needs a share from 0 to 1")
        if self.max_sentences < 1:
            raise ValueError(f"max_sentences={self.max_sentences}: needs at least 1")
        as_fps(self.fps)

    @property
    def range(self) -> tuple[float, float]:
        """(shortest, longest) clip in seconds."""
        return self.seconds if isinstance(self.seconds, tuple) else (self.seconds, self.seconds)


class PresenterCorpus(Dataset):
    """Clips by number. Items are `ClipSample`s:

    video (F, S, S, 3) uint8 and audio (1, samples) float32 tensors (absent if not wanted), fps
    Fraction, sample_rate, caption str, captions list, language, text (spoken words, "" for events),
    phones tuple that tiles the clip (empty for events), mouth (F, 6) and lip_points (F, K, 2)
    float32 arrays at the middle of each frame (absent for events), attributes dict of strings, kind
    "speech" or "event", impacts tuple of seconds, split, index; with keep_clean also audio_clean
    (1, samples).

    Args:
        bank: a `SpeechCorpus` (any split), or the folder of one; None as in `SpeechCorpus`.
        split: "train", "val", "test" or "test_voices": sentences and presenters of one are in no
            other, and the voices of the last are in no other.
        languages: codes to keep; None keeps all that the bank holds.
        length: number of clips; any index below it is one clip.
        seed: another seed gives another corpus.

    Raises:
        ValueError: an option out of range, or a bank without sentences for this split and these
            languages.
    """

    def __init__(
        self,
        bank: SpeechCorpus | str | os.PathLike[str] | None = None,
        split: str = "train",
        languages: Sequence[str] | None = None,
        length: int = 10_000,
        seed: int = 0,
        options: CorpusOptions | None = None,
        **changes: Any,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: needs one of {', '.join(SPLITS)}")
        if options is not None and changes:
            raise ValueError(
                f"options and {', '.join(changes)} given: needs either the record or single options"
            )
        self.options = options or CorpusOptions(**changes)
        self.bank = bank if isinstance(bank, SpeechCorpus) else SpeechCorpus(bank)
        self.split = split
        self.length = length
        self.seed = seed
        self.utterances = split_utterances(self.bank, split, languages)
        longest = self.options.range[1]
        self._fitting = [u for u in self.utterances if u.duration - 0.35 <= longest]
        if not self._fitting and self.options.event_share < 1:
            raise ValueError(
                f"split={split!r}, languages={languages}: the bank has no sentence of at most "
                f"{longest} s there"
            )
        self._by_voice: dict[tuple[str, str], list[Utterance]] = defaultdict(list)
        for utterance in self._fitting:
            self._by_voice[utterance.lang, utterance.voice].append(utterance)
        self._cast = members_by_voice(self.bank) if self.options.names else {}

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[ClipSample]:
        return (self[i] for i in range(self.length))

    def __getitem__(self, index: int) -> ClipSample:
        if not 0 <= index < self.length:
            raise IndexError(f"index={index}: this corpus has clips 0 to {self.length - 1}")
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        make = self._event if rng.random() < self.options.event_share else self._speech
        return make(rng, {"sample_rate": SAMPLE_RATE, "split": self.split, "index": index})

    def _clip(self, seconds: float) -> ClipSpec:
        """The clip of at least `seconds`; the picture's size is not bound to the codec's grid
        here.
        """
        return ClipSpec.from_seconds(round(seconds, 4), as_fps(self.options.fps))

    def _times(self, clip: ClipSpec, moment: np.random.Generator) -> np.ndarray:
        """Seconds at which pictures are drawn: the middle of each frame, or of one."""
        times = _middles(clip)
        first = int(moment.integers(len(times)))
        return times[first : first + 1] if self.options.still else times

    def _speech(self, rng: np.random.Generator, item: ClipSample) -> ClipSample:
        """A presenter says one or more sentences."""
        words, face, motion, phrase, sound, moment = rng.spawn(6)
        plan = draw_plan(sound, self.options.augment_share)
        passage, clip = self._passage(words, plan)
        first = passage.utterances[0]
        (extra,) = rng.spawn(1)  # after the others: what they draw stays as it was
        member = self._member(extra, first)
        if member is None:
            identity = sample_identity(
                face, first.gender, "test" if self.split == "test_voices" else self.split
            )
        else:
            identity = member.identity
        times = self._times(clip, moment)
        mouth = viseme_track(passage.phones, times)
        poses = pose_track(motion, times, passage.phones)
        text = join_sentences([u.text for u in passage.utterances], first.lang, phrase)
        attributes = {
            **identity.attributes(),
            "identity": identity_key(identity),
            "voice": first.voice,
            "augmented": ",".join(plan.kinds),
            **({"name": member.name} if member else {}),
        }
        captions = speech_captions(
            attributes,
            text,
            first.lang,
            phrase,
            self.options.full_captions,
            member.name if member else "",
        )
        captions = self._listed(captions, identity, extra)
        item |= {
            "kind": "speech",
            "language": first.lang,
            "text": text,
            "captions": captions,
            "caption": captions[int(phrase.integers(len(captions)))],
            "phones": () if self.options.still else tile(passage.phones, float(clip.seconds)),
            "mouth": mouth,
            "lip_points": np.stack(
                [lip_points(identity, m, p) for m, p in zip(mouth, poses, strict=True)]
            ),
            "attributes": attributes,
            "contacts": (),
            "fps": clip.fps,
        }
        if self.options.audio and not self.options.still:
            degraded = (
                degrade(sound, passage.audio, plan.kinds, SAMPLE_RATE)
                if plan.kinds
                else passage.audio
            )
            item["audio"] = torch.from_numpy(degraded[: clip.num_samples].copy())[None]
            if self.options.keep_clean:
                item["audio_clean"] = torch.from_numpy(passage.audio[: clip.num_samples].copy())[
                    None
                ]
        if self.options.video:
            item["video"] = _stack(
                lambda i: render_face(identity, mouth[i], poses[i], self.options.size), len(times)
            )
        return item

    def _member(self, rng: np.random.Generator, spoken: Utterance) -> CastMember | None:
        """For a share of clips, somebody of the cast who has this voice."""
        members = self._cast.get((spoken.lang, spoken.voice), ())
        if not members or rng.random() >= self.options.names:
            return None
        return members[int(rng.integers(len(members)))]

    def _listed(
        self, captions: list[str], shown: Identity | Event, rng: np.random.Generator
    ) -> list[str]:
        """Captions, a share of them with a list of all that is seen behind."""
        share = self.options.attribute_lists
        if not share:
            return captions
        listed = attribute_list(shown)
        return [caption_with_list(c, listed) if rng.random() < share else c for c in captions]

    def _passage(self, rng: np.random.Generator, plan: Plan) -> tuple[Concatenation, ClipSpec]:
        """Sentences of one voice, and the clip that holds them; sound and phones reach
        `SPARE_SECONDS` further.
        """
        shortest, longest = self.options.range
        lead = rng.uniform(*LEAD_SECONDS)
        tail = rng.uniform(*TAIL_SECONDS)
        wanted = rng.uniform(shortest, longest)
        pieces, pauses, spoken = self._pieces(rng, plan, wanted - lead - tail)
        seconds = (
            longest if shortest == longest else min(max(spoken + lead + tail, shortest), longest)
        )
        room = seconds - spoken
        lead = room * lead / (lead + tail) if shortest == longest else min(lead, room)
        # nothing above depends on the frame rate; only here is the clip rounded up to whole groups
        # of frames
        clip = self._clip(seconds)
        return join_pieces(
            pieces, pauses, lead, round((seconds + SPARE_SECONDS) * SAMPLE_RATE)
        ), clip

    def _pieces(
        self, rng: np.random.Generator, plan: Plan, room: float
    ) -> tuple[list[UtteranceSegment], list[float], float]:
        """Sentences of one voice, the pause before each, and their length together."""
        for _ in range(
            100
        ):  # `_fitting` is a rough cut: now and then a sentence is too long after all
            first = self._fitting[int(rng.integers(len(self._fitting)))]
            pieces, pauses = choose_pieces(
                rng,
                first,
                self._by_voice[first.lang, first.voice],
                room,
                self.options.max_sentences,
                lambda: float(rng.uniform(*PAUSE_SECONDS)),
                plan.pitch,
            )
            spoken = sum(piece.seconds for piece in pieces) + sum(pauses)
            if spoken <= self.options.range[1]:
                return pieces, pauses, spoken
        raise ValueError(
            f"seconds={self.options.seconds}: too short for the sentences of this bank"
        )

    def _event(self, rng: np.random.Generator, item: ClipSample) -> ClipSample:
        """An object sounds."""
        shape, phrase, moment = rng.spawn(3)
        low, high = self.options.range
        seconds = shape.uniform(low, max(low, min(high, LONGEST_EVENT)))
        clip = self._clip(seconds)
        event = sample_event(shape, seconds)
        languages = sorted({u.lang for u in self.utterances}) or list(LANGUAGES)
        language = str(phrase.choice(languages))
        (extra,) = rng.spawn(1)
        captions = self._listed(event_captions(event, language, phrase), event, extra)
        item |= {
            "kind": "event",
            "language": language,
            "text": "",
            "captions": captions,
            "caption": captions[int(phrase.integers(len(captions)))],
            "phones": (),
            "attributes": event.attributes(),
            "contacts": event.contacts,
            "fps": clip.fps,
        }
        if self.options.audio and not self.options.still:
            item["audio"] = torch.from_numpy(event_audio(event, clip.num_samples, SAMPLE_RATE))[
                None
            ]
        if self.options.video:
            times = self._times(clip, moment)
            item["video"] = _stack(
                lambda i: render_event(event, float(times[i]), self.options.size), len(times)
            )
        return item


def split_utterances(
    bank: SpeechCorpus, split: str, languages: Sequence[str] | None = None
) -> list[Utterance]:
    """Utterances of a split whose normalized text is in no earlier split (train before val, test,
    test_voices).

    Raises:
        ValueError: a language that the bank does not hold.
    """
    held = {u.lang for u in bank}
    for language in languages or ():
        if language not in held:
            raise ValueError(
                f"languages={list(languages or ())}: this bank has no {language!r}, only "
                f"{', '.join(sorted(held))}"
            )
    earlier = SPLITS[: SPLITS.index(split)]
    taken = {normalised_text(u.text) for u in bank if u.split in earlier}
    return [
        u
        for u in bank
        if u.split == split
        and (not languages or u.lang in languages)
        and normalised_text(u.text) not in taken
    ]


def members_by_voice(bank: SpeechCorpus) -> dict[tuple[str, str], list[CastMember]]:
    """(language, voice) -> the members of the cast who speak it with this voice.

    Only voices of training are given away, so a member sounds alike in every split.
    """
    voices: dict[tuple[str, str], set[str]] = defaultdict(set)
    for utterance in bank:
        if utterance.split == "train":
            voices[utterance.lang, utterance.gender].add(utterance.voice)
    members: dict[tuple[str, str], list[CastMember]] = defaultdict(list)
    for (language, gender), held in sorted(voices.items()):
        for member in cast_members():
            if member.gender == gender:
                members[language, member.voice(sorted(held))].append(member)
    return dict(members)


def _middles(clip: ClipSpec) -> np.ndarray:
    """Middle of each frame in seconds: (F,)."""
    return midpoints(clip.num_frames, float(clip.fps))


def _stack(draw: Callable[[int], np.ndarray], frames: int) -> torch.Tensor:
    """Draw every frame -> (F, S, S, 3) uint8."""
    return torch.from_numpy(np.stack([draw(i) for i in range(frames)]))
