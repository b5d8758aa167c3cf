"""Caption features in the cache: what a frozen text encoder would compute, read instead."""

import pytest
import torch
from tiny import tiny_pipeline

from avdiff.data.cache import LatentCache, cache_presenters, load_codecs
from avdiff.train import finetune
from avdiff.train.loop.config import load_options
from avdiff.train.recipe import Recipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("features")
    tiny_pipeline().save_pretrained(root / "model")
    for name, text in (("plain", False), ("text", True)):
        cache_presenters(
            root / name, load_codecs(root / "model", text), 3, seconds=2.0, languages=["en"]
        )
    return root


def task(root, caches, **changes):
    values = {
        "train_data": root / caches,
        "output_dir": root / "run",
        "rank": 2,
        "train_batch_size": 3,
        "pretrained_model_name_or_path": root / "model",
        **changes,
    }
    return finetune.setup(load_options(Recipe, None, [f"--{k}={v}" for k, v in values.items()]))


def answers(made):
    """Losses of one batch with all random choices fixed."""
    torch.manual_seed(0)
    clips = finetune.TrainingClips(made.dataset.cache, None)
    batch = made.collate([clips[i] for i in range(3)])
    made.common_seed = 0
    return batch, made.loss(batch, "train", torch.Generator().manual_seed(1)).total


def test_cached_features_train_as_the_encoder_would(folders):
    plain_batch, plain = answers(task(folders, "plain"))
    batch, cached = answers(task(folders, "text"))
    assert batch.text is not None and plain_batch.text is None
    assert cached.item() == pytest.approx(plain.item(), rel=1e-3)  # features are fp16


def test_a_text_encoder_that_learns_does_not_read_them(folders):
    made = task(folders, "text", rank=0)
    batch, loss = answers(made)
    assert batch.text is None
    loss.backward()
    assert made.text_encoder.embed.weight.grad is not None


def test_dropped_captions_have_no_features(folders):
    item = LatentCache([folders / "text"])[0]
    assert len(item["text"]) == len(item["captions"])
    made = task(folders, "text", caption_dropout=1.0)
    batch = made.collate([made.dataset[0], made.dataset[1]])
    assert batch.attention_mask.sum() == 0
    kept = task(folders, "text", caption_dropout=0.0, text_dropout=0.0)
    batch = kept.collate([kept.dataset[0], kept.dataset[1]])
    assert batch.text.shape[:2] == batch.attention_mask.shape


def test_features_of_another_encoder_are_refused(folders, tmp_path):
    other = tiny_pipeline()
    with torch.no_grad():
        other.text_encoder.embed.weight.add_(1)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="text features of encoder"):
        task(folders, "text", pretrained_model_name_or_path=tmp_path / "other")
    with pytest.raises(ValueError, match="text_encoder is"):
        LatentCache([folders / "text", folders / "plain"])
