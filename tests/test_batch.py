"""A clip never depends on its neighbours in a batch, in generation and in training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from avdiff.clip import ClipSpec
from avdiff.corpus.events.scene import onset_phones
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.phone import Phone
from avdiff.phonetics.track import PhonemeTrack, track_from_phones
from avdiff.pipelines.pipeline_av import AVDiffPipeline
from avdiff.train import finetune
from tests.test_finetune import recipe, write_clips
from tests.tiny import fill_zeros, tiny_components

CLIP = ClipSpec(num_frames=9, height=64, width=64)
SECONDS = float(CLIP.seconds)


def words(count: int) -> tuple[Phone, ...]:
    """`count` phones that fill half of the clip."""
    length = SECONDS / 2 / count
    return tuple(
        Phone("aeiouktps"[n % 9], n * length, (n + 1) * length, n % 3) for n in range(count)
    )


# Words of very different lengths, none at all, strokes, and words that outlast the clip.
SCRIPTS = [words(1), words(40), (), onset_phones((0.05, 0.2)), (*words(9), Phone("a", 1.0, 9.0))]


def listening_transformer(onset_track: bool = True) -> AVTransformer:
    """A tiny model that reads words and strokes."""
    torch.manual_seed(0)
    config = dict(tiny_components()["transformer"].config)
    changes = {"num_phonemes": 128, "onset_track": onset_track}
    kept = {name: value for name, value in config.items() if not name.startswith("_")}
    return fill_zeros(AVTransformer(**{**kept, **changes})).eval()


@pytest.mark.parametrize("warped", [False, True])
def test_words_are_read_as_if_alone(warped: bool) -> None:
    model = listening_transformer()
    positions = Positions.of(CLIP)
    warps = [np.full(CLIP.mel_frames, 0.03)] * len(SCRIPTS) if warped else None
    track = track_from_phones(SCRIPTS, CLIP, warps)
    assert track.phoneme_mask is not None
    assert len(set(track.phoneme_mask.sum(1).tolist())) == len(SCRIPTS)
    singles = [track_from_phones([s], CLIP, warps and warps[:1]) for s in SCRIPTS]
    with torch.no_grad():
        together = model.prepare(None, None, positions, track)
        joined = model.prepare(None, None, positions, PhonemeTrack.cat(singles))
        for i, single in enumerate(singles):
            alone = model.prepare(None, None, positions, single)
            for batch in (together, joined):
                close(batch.audio_phonemes[i], alone.audio_phonemes[0])
                close(batch.video_phonemes[i], alone.video_phonemes[0])
                for layer, read in alone.memory.items():
                    close(batch.memory[layer].values[i], read.values[0])


def close(value: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.isfinite().all()
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)


def test_joined_tracks_agree_about_the_picture() -> None:
    heard, seen = (track_from_phones([words(2)], CLIP, to_video=flag) for flag in (False, True))
    with pytest.raises(ValueError, match="given in 1 of 2 batches"):
        PhonemeTrack.cat([heard, seen])


def test_a_track_without_mask_is_all_its_own() -> None:
    track = track_from_phones([words(3)], CLIP)
    model = listening_transformer()
    bare = replace(track, phoneme_mask=None)
    told, same = (model.prepare(None, None, Positions.of(CLIP), t) for t in (track, bare))
    assert torch.equal(told.audio_phonemes, same.audio_phonemes)


def test_generated_batch_equals_single_prompts() -> None:
    pipe = AVDiffPipeline(**{**tiny_components(), "transformer": listening_transformer()})
    pipe.set_progress_bar_config(disable=True)
    prompts = [
        'A man says "no"',
        'A woman with red hair and glasses says "one two three four five six seven eight"',
        "a ball bounces three times",
        "a talking face",
    ]

    def generate(chosen: list[int]):
        seeds = [torch.Generator().manual_seed(i) for i in chosen]
        return pipe(
            [prompts[i] for i in chosen],
            seconds=3.5,
            height=64,
            width=64,
            num_inference_steps=2,
            output_type="latent",
            generator=seeds,
        )

    together = generate([0, 1, 2, 3])
    for i in range(len(prompts)):
        alone = generate([i])
        np.testing.assert_allclose(together.frames[i], alone.frames[0], atol=1e-4)
        np.testing.assert_allclose(together.audio[i], alone.audio[0], atol=1e-4)


def test_training_loss_of_a_batch_equals_that_of_single_clips(tmp_path) -> None:
    caches = (write_clips(tmp_path / "train", 4), write_clips(tmp_path / "held", 1))
    task = finetune.setup(recipe(caches, tmp_path / "out"))
    task.transformer = fill_zeros(task.transformer)
    rows = [task.dataset[i] for i in range(4)]
    clip = rows[0].clip
    rows = [
        replace(row, phones=words(count) if count else (), caption="a woman " * count)
        for row, count in zip(rows, (1, 60, 0, 7), strict=True)
    ]

    def losses(chosen: list[int]) -> torch.Tensor:
        batch = task.collate([rows[i] for i in chosen])
        generators = [torch.Generator().manual_seed(i) for i in chosen]
        clean = batch.tokens
        positions = Positions.of(clip)
        noised = task.objective.noised(clean, positions, generators, task.recipe.objective.tasks)
        with torch.no_grad():
            output, _ = task.predict(batch, noised, positions, batch.track)
        lost = task.objective.row_losses(output, clean, noised)
        return torch.stack([lost.video, lost.audio])

    together = losses([0, 1, 2, 3])
    alone = torch.cat([losses([i]) for i in range(4)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.unique().numel() == together.numel()
