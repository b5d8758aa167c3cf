"""Training the transformer: the objective, what is given, whose weights move, resume, adapters, export."""

import json
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from avdiff.clip import ClipSpec
from avdiff.data.cache import FORMAT, SHARD
from avdiff.data.corpus.phones import inventory
from avdiff.latents import Joint
from avdiff.models.conditions import Positions
from avdiff.train import finetune
from avdiff.train.options import load_options
from avdiff.train.recipe import Recipe

CLIP = ClipSpec(13, Fraction(25), 128, 128)


def write_clips(folder, count, seed=0, clips=(CLIP,)):
    """A latent cache in its real format, of latents that follow from the phones: there is something to learn."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    symbols = inventory()[0][1:7]
    voices, looks = torch.randn(6, 48, generator=torch.Generator().manual_seed(7)), torch.randn(64)
    tensors, records = {}, []
    for i in range(count):
        clip = clips[i % len(clips)]
        ids = torch.randint(0, 6, (3,), generator=generator).tolist()
        length = float(clip.seconds) / 3
        phones = [[symbols[k], n * length, (n + 1) * length, 1] for n, k in enumerate(ids)]
        at = lambda s, ids=ids, length=length: ids[min(2, int(float(s) / length))]  # noqa: E731
        audio = torch.stack([voices[at(s)] for s in clip.audio_seconds()])
        cell = clip.video_grid[1] * clip.video_grid[2]
        video = torch.stack([looks * (0.2 + 0.3 * at(s)) for s in clip.video_seconds() for _ in range(cell)])
        tensors |= {f"{i}/video": video.half(), f"{i}/audio": audio.half()}
        records.append({"index": i, "caption": 'a woman says "hello"', "captions": ['a woman says "hello"', "a talking face"],
                        "phones": phones, "kind": "speech", "split": "train", "sample_rate": 24000, "fps": str(clip.fps),
                        "num_frames": clip.num_frames, "height": clip.height, "width": clip.width})
    assert count <= SHARD
    save_file(tensors, folder / "shard-00000.safetensors")
    (folder / "shard-00000.json").write_text(json.dumps(records))
    (folder / "cache.json").write_text(json.dumps({"format": FORMAT, "count": count, "vae": "v", "audio_vae": "a"}))
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


def recipe(data, folder, **changes):
    values = {"train_data": data[0], "validation_data": data[1], "output_dir": str(folder), "preset": "tiny",
              "vocab_size": "300", "max_train_steps": "6", "train_batch_size": "4", "learning_rate": "2e-3",
              "checkpointing_steps": "2", "log_every": "2", **changes}
    return load_options(Recipe, None, [f"--{k}={v}" for k, v in values.items()])


def test_it_runs(data, tmp_path):
    from avdiff.train.fit import fit
    task = finetune.setup(recipe(data, tmp_path))
    print(fit(task, recipe(data, tmp_path).training))
