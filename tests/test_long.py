"""Long clips: segments that continue each other, in constant memory, written as they come."""

from __future__ import annotations

import weakref
from fractions import Fraction

import numpy as np
import pytest
import torch
from tiny import tiny_pipeline

from avdiff.media.write import MediaError, probe, write_clip
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.pipelines.prompt import ClipLength, plan_clip
from avdiff.pipelines.request import FrameFormat
from avdiff.pipelines.streaming import Segment, streams

SHORT = dict(
    segment=0.6, overlap=0.2, num_inference_steps=1, guidance_scale=1.0, audio_guidance_scale=1.0
)
SAMPLES = 33600  # of 1.4 s


@pytest.fixture(scope="module")
def pipe() -> AVDiffPipeline:
    return tiny_pipeline()


def stream(pipe: AVDiffPipeline, prompt: str = "a ball bounces", seconds: float = 1.4, **changes):
    return pipe.stream(
        prompt, seconds, **{**SHORT, "generator": torch.Generator().manual_seed(0), **changes}
    )


def test_segments_add_up_and_each_is_given_the_end_of_the_last(pipe, monkeypatch) -> None:
    calls, results = [], []
    plain = AVDiffPipeline.__call__

    def listen(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        calls.append(kwargs)
        results.append(out)
        return out

    monkeypatch.setattr(AVDiffPipeline, "__call__", listen)
    segments = list(stream(pipe))
    assert [len(s.frames) for s in segments] == [
        17,
        12,
        6,
    ]  # 35 frames: calls of 17, 5 + 12 and 5 + 6
    assert sum(s.audio.shape[1] for s in segments) == SAMPLES
    assert [kw["num_frames"] for kw in calls] == [17, 17, 11]
    for before, kwargs, after in zip(results, calls[1:], results[1:], strict=False):
        torch.testing.assert_close(
            kwargs["video"][0].permute(1, 0, 2, 3) / 2 + 0.5, before.frames[0, -5:]
        )
        assert torch.equal(kwargs["audio"], before.audio[..., -4800:])
        torch.testing.assert_close(after.frames[0, :5], before.frames[0, -5:], atol=1e-6, rtol=0)
    whole = torch.cat([s.audio for s in segments], dim=1)
    assert torch.equal(whole[:, : 16320 - 240], results[0].audio[0, :, : 16320 - 240])


def test_a_given_clip_comes_first_and_is_continued(pipe) -> None:
    g = torch.Generator().manual_seed(1)
    video, sound = (
        torch.rand(1, 3, 9, 128, 128, generator=g) * 2 - 1,
        torch.rand(1, 1, 8640, generator=g) - 0.5,
    )
    first, *rest = stream(pipe, seconds=0.9, video=video, audio=sound)
    torch.testing.assert_close(first.frames, (video[0].permute(1, 2, 3, 0) + 1) / 2)
    assert (
        torch.equal(first.audio, sound[0, :, : 8640 - 240])
        and sum(len(s.frames) for s in rest) == 23 - 9
    )
    with pytest.raises(ValueError, match="video without sound"):
        stream(pipe, video=video)
    with pytest.raises(ValueError, match=r"what is given lasts 0\.36 s"):
        stream(pipe, seconds=0.3, video=video, audio=sound)


def test_sound_may_drive_a_long_picture(pipe) -> None:
    sound = torch.rand(1, 1, SAMPLES, generator=torch.Generator().manual_seed(1)) - 0.5
    segments = list(stream(pipe, audio=sound))
    assert sum(len(s.frames) for s in segments) == 35
    torch.testing.assert_close(torch.cat([s.audio for s in segments], dim=1), sound[0])
    with pytest.raises(ValueError, match=r"the sound that drives the picture lasts 1\.4 s"):
        stream(pipe, seconds=2, audio=sound)


def test_one_modality_alone(pipe) -> None:
    assert all(s.audio is None for s in stream(pipe, generate_audio=False, seconds=0.8))
    sound = list(stream(pipe, generate_video=False, seconds=0.8))
    assert all(s.frames is None for s in sound) and sum(s.audio.shape[1] for s in sound) == 21 * 960


def test_words_are_laid_on_the_clock_of_the_whole_clip(pipe, monkeypatch) -> None:
    tracks = []
    plain = AVDiffPipeline.__call__

    def listen(self, *args, **kwargs):
        tracks.append(kwargs["phoneme_track"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(AVDiffPipeline, "__call__", listen)
    prompt = 'A man says "one two"'
    list(stream(pipe, prompt, seconds=1.6))
    # phoneme of each mel frame
    heard = [t.phonemes[0].gather(0, t.frame_to_phone[0]) for t in tracks]
    whole = plan_clip([prompt], FrameFormat(clock=pipe.clock), ClipLength(1.6)).track
    expected = whole.phonemes[0].gather(0, whole.frame_to_phone[0])
    start = 0
    for part, frames in zip(heard, (17, 17, 17), strict=False):
        span = expected[start * 4 : start * 4 + len(part)]
        assert torch.equal(part[: len(span)], span)
        start += frames - 5
    assert heard[0].any() and heard[1].any()


def test_what_is_written_has_full_length(pipe, tmp_path) -> None:
    frames, sound = streams(stream(pipe))
    write_clip(tmp_path / "long.mp4", frames, 25, sound, 24000)
    info = probe(tmp_path / "long.mp4")
    assert (info.num_frames, info.audio_seconds) == (35, Fraction(7, 5))


def test_sound_in_pieces_is_the_sound_in_one(tmp_path) -> None:
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, (1, 5000)).astype(np.float32)
    for name, audio in (
        ("a", sound),
        ("b", iter([sound[:, :10], sound[:, 10:3000], sound[:, 3000:]])),
    ):
        write_clip(tmp_path / f"{name}.wav", None, None, audio, 24000)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    with pytest.raises(MediaError, match="2 channels follows one with 1"):
        write_clip(tmp_path / "c.wav", None, None, iter([sound, np.repeat(sound, 2, 0)]), 24000)
    with pytest.raises(MediaError, match="no piece"):
        write_clip(tmp_path / "c.wav", None, None, iter([]), 24000)
    assert not list(tmp_path.glob("*c*"))


def test_readers_side_by_side_keep_memory_constant() -> None:
    alive: list[weakref.ref] = []

    def endless():
        while True:
            segment = Segment(torch.zeros(4, 8, 8, 3), torch.zeros(1, 100))
            alive.extend((weakref.ref(segment.frames), weakref.ref(segment.audio)))
            yield segment

    frames, sound = streams(endless())
    for _ in range(50):
        next(sound)
        for _ in range(4):
            next(frames)
        assert (
            len(alive) <= 104 and sum(ref() is not None for ref in alive) <= 4
        )  # this segment's and the next
