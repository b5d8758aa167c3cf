"""A user's folder of good and bad clips, into codec training and through a cache into the
transformer's training.
"""

import numpy as np
import pytest
import torch

from avdiff.data.cache import Codecs, LatentCache
from avdiff.data.cache_clips import cache_clips
from avdiff.data.clips import ClipOptions
from avdiff.train import finetune
from avdiff.train.codecs import train_codec as codecs
from avdiff.train.loop.fit import fit
from tests.bad_clips import make_folder
from tests.test_finetune import recipe
from tests.tiny import tiny_audio_vae, tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("own") / "clips"
    return root, *make_folder(root)


def test_training_uses_the_good_clips_and_names_the_bad_ones(folder, tmp_path):
    root, good, bad = folder
    torch.manual_seed(0)
    made = cache_clips(
        tmp_path / "cache",
        root,
        Codecs(tiny_vae().eval(), tiny_audio_vae().eval()),
        ClipOptions(buckets="64x64x25"),
    )
    assert set(made.names) == good
    assert bad <= set(made.refused)
    assert all(made.refused.values())
    told = recipe(
        (str(tmp_path / "cache"), ""),
        tmp_path / "out",
        validation_data="",
        train_batch_size="1",
        max_train_steps=str(len(good)),
        checkpointing_steps="0",
    )
    task = finetune.setup(told)
    used, inner = [], task.dataset.__class__.sample
    cache = LatentCache([tmp_path / "cache"])
    names = [cache.items[i][1]["name"] for i in range(len(cache))]

    class Watched(task.dataset.__class__):
        def sample(self, index, seed):
            used.append(names[index])
            return inner(self, index, seed)

    task.dataset.__class__ = Watched
    summary = fit(task, told.training)
    assert summary.step == len(good)
    assert sorted(used) == sorted(good)  # one epoch: each good clip once, no other
    assert np.isfinite(list(summary.losses.values())).all()


@pytest.mark.parametrize(
    ("codec", "more"),
    [
        ("video_vae", ("--size", "64", "--clips", "16", "--clip_frames", "5")),
        ("audio_vae", ("--segment_seconds", "0.4")),
    ],
)
def test_a_codec_trains_on_clips_of_ones_own(folder, tmp_path, capsys, codec, more):
    root, _, _ = folder
    kind = {"video_vae": tiny_vae, "audio_vae": tiny_audio_vae}[codec]
    torch.manual_seed(0)
    kind().save_pretrained(tmp_path / "start")
    summary = codecs.main(
        [
            "--codec",
            codec,
            "--data",
            str(root),
            "--start_from",
            str(tmp_path / "start"),
            "--output_dir",
            str(tmp_path / "out"),
            "--max_train_steps",
            "2",
            "--train_batch_size",
            "4",
            "--checkpointing_steps",
            "0",
            *more,
        ]
    )
    assert summary.step == 2
    said = capsys.readouterr().out
    assert "left out: zero_length.mp4" in said
    assert list((tmp_path / "out" / "final").iterdir())


def test_a_decoder_alone_keeps_latents_and_their_statistics(tmp_path):
    torch.manual_seed(0)
    start = tiny_vae()
    start.latents_mean.fill_(0.25)
    start.save_pretrained(tmp_path / "start")
    words = [
        "--codec",
        "video_vae",
        "--clips",
        "16",
        "--clip_frames",
        "3",
        "--size",
        "64",
        "--output_dir",
        str(tmp_path / "out"),
        "--max_train_steps",
        "2",
        "--train_batch_size",
        "4",
        "--checkpointing_steps",
        "0",
    ]
    codecs.main([*words, "--start_from", str(tmp_path / "start"), "--decoder_only", "true"])
    before = start.state_dict()
    after = type(start).from_pretrained(tmp_path / "out" / "final" / "vae").state_dict()
    moved = {
        name.split(".")[0] for name, value in after.items() if not torch.equal(value, before[name])
    }
    assert moved == {"decoder"}
    with pytest.raises(ValueError, match="decoder_only=true: is for a video_vae with start_from"):
        codecs.main([*words, "--decoder_only", "true"])


def test_a_folder_without_clips_is_refused(tmp_path):
    for data, answer in (
        (tmp_path / "none", "no such folder"),
        (tmp_path, "needs at least 2 files with video, has 0"),
    ):
        with pytest.raises(ValueError, match=answer):
            codecs.main(
                ["--codec", "video_vae", "--data", str(data), "--output_dir", str(tmp_path / "out")]
            )
    with pytest.raises(ValueError, match="the vocoder learns from the speech bank's pitch tracks"):
        codecs.main(
            ["--codec", "vocoder", "--data", str(tmp_path), "--output_dir", str(tmp_path / "out")]
        )
