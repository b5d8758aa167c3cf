"""LoRA training: whose weights move, and files that load elsewhere at the same strength."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from avdiff.corpus.attribute_list import attribute_list
from avdiff.models import presets
from avdiff.models.transformer import AVTransformer
from avdiff.train import finetune
from avdiff.train.joint import lora
from avdiff.train.joint.dataset import TrainingClips
from avdiff.train.joint.lora import branch_of, owner_of
from avdiff.train.loop.command import load_recipe
from avdiff.train.loop.fit import fit
from avdiff.train.loop.run_log import read_log
from avdiff.train.recipe import BRANCHES, TARGETS, DataOptions, Recipe
from tests.test_finetune import CLIP, moved, recipe, run, weights, write_clips


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    run(data, folder, max_train_steps="2", checkpointing_steps="0")
    return str(folder / "final")


def test_lora_trains_its_branches_and_loads_elsewhere(data, tmp_path, base):
    options = {
        "pretrained_model_name_or_path": base,
        "rank": "4",
        "lora_targets": "audio,cross",
        "branch_rank": "cross=2",
        "max_train_steps": "3",
        "learning_rate": "1e-2",
        "checkpointing_steps": "0",
    }
    made = recipe(data, tmp_path, **options)
    task = finetune.setup(made)
    before = weights(task)
    fit(task, made.training)
    changed = moved(before, task)
    assert {branch_of(n) for n in changed} == {"audio", "cross"}
    assert all(".lora_" in n for n in changed)
    downs = {n: p for n, p in task.model.named_parameters() if "lora_A" in n}
    assert {len(p) for n, p in downs.items() if branch_of(n) == "cross"} == {2}
    assert set(load_file(tmp_path / "checkpoint-3" / "transformer.safetensors")) == {
        n.removeprefix("transformer.") for n, _ in task.model.named_parameters() if ".lora_" in n
    }
    norms = {k: v for k, v in task.report().items() if k.startswith("adapter_norm")}
    assert norms.keys() == {"adapter_norm/audio", "adapter_norm/cross"}
    assert min(norms.values()) > 0

    def held_out_loss(transformer):
        other = finetune.setup(recipe(data, tmp_path, pretrained_model_name_or_path=base))
        other.transformer = other.modules["transformer"] = transformer.eval()
        with torch.no_grad():
            return other.validate()["audio"]

    loaded = AVTransformer.from_pretrained(base, subfolder="transformer")
    plain = held_out_loss(loaded)
    loaded.load_lora_adapter(tmp_path / "final", weight_name="pytorch_lora_weights.safetensors")
    adapted = held_out_loss(loaded)
    assert adapted == pytest.approx(held_out_loss(task.transformer), rel=1e-5)
    assert adapted != pytest.approx(plain, rel=1e-5)
    lora.merge(loaded)
    assert not lora.lora_layers(loaded)
    assert held_out_loss(loaded) == pytest.approx(adapted, rel=1e-4)
    lora.scale_branches(task.transformer, {"audio": 0.0, "cross": 0.0})
    assert held_out_loss(task.transformer) == pytest.approx(plain, rel=1e-5)


def test_every_weight_has_a_branch():
    task_names = [n for n, _ in AVTransformer(**presets.tiny()).named_parameters()]
    found = {n: (branch_of(n), owner_of(n)) for n in task_names}
    assert {b for b, _ in found.values()} == set(BRANCHES)
    assert found["transformer_blocks.0.video.cross_attn.to_q.weight"] == ("cross", "video")
    assert found["transformer_blocks.0.audio.text_attn.to_q.weight"] == ("text", "audio")
    assert found["phoneme_encoder.to_video.weight"] == ("text", "video")
    assert found["shared_time_proj.video.weight"] == ("shared", "both")
    assert found["proj_in_audio.weight"] == ("audio", "audio")


def test_the_file_tells_rank_and_alpha_of_every_layer(data, tmp_path, base):
    """Alpha is half the rank, and one branch has a rank of its own: a reader that had to guess
    would be wrong for both.
    """
    run(
        data,
        tmp_path,
        pretrained_model_name_or_path=base,
        rank="4",
        lora_alpha="2",
        lora_targets="audio,cross",
        branch_rank="cross=2",
        max_train_steps="2",
        checkpointing_steps="0",
        learning_rate="1e-2",
    )
    path = tmp_path / "final" / "pytorch_lora_weights.safetensors"
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        told = json.loads(file.metadata()["lora_adapter_metadata"])
        assert "sampling_defaults" in file.metadata()
    assert all(name.startswith("transformer.") for name in names)
    assert (told["transformer.r"], told["transformer.lora_alpha"]) == (4, 2)
    loaded = AVTransformer.from_pretrained(base, subfolder="transformer")
    loaded.load_lora_adapter(tmp_path / "final", weight_name=path.name)
    scales = {
        branch_of(f"{name}.weight"): (layer.r["default_0"], layer.scaling["default_0"])
        for name, layer in lora.lora_layers(loaded).items()
    }
    assert scales == {"audio": (4, 0.5), "cross": (2, 0.5)}


def test_a_card_names_no_path_of_the_machine(data, tmp_path, base):
    run(data, tmp_path, pretrained_model_name_or_path=base, rank="2", max_train_steps="1")
    card = (tmp_path / "final" / "README.md").read_text()
    assert str(tmp_path.parent) not in card
    assert base not in card
    assert "cached clips from train." in card
    assert "pipe.load_lora_weights(FOLDER)" in card


@pytest.mark.parametrize(("name", "target"), TARGETS.items())
def test_a_recipe_for_each_purpose_moves_its_stream_alone(data, tmp_path, base, name, target):
    words = [f"lora_{name}.toml", f"--output_dir={tmp_path}", f"--train_data={data[0]}"]
    words += [f"--pretrained_model_name_or_path={base}", "--rank=2", "--max_train_steps=2"]
    made = load_recipe(Recipe, [*words, "--train_batch_size=4", "--lr_warmup_steps=0"])
    task = finetune.setup(made)
    before = weights(task)
    fit(task, made.training)
    changed = moved(before, task)
    assert {branch_of(n) for n in changed} == set(target.branches)
    assert {owner_of(n) for n in changed} == {target.owner}
    assert all(".lora_" in n for n in changed)
    assert set(task.report()) >= {f"update_norm/{target.owner}", f"adapter_norm/{target.owner}"}


def test_a_stream_whose_adapters_rest_is_reported(data, tmp_path, base):
    """Users of other trainers found out after days that only one modality had learned."""
    options = {
        "pretrained_model_name_or_path": base,
        "rank": "2",
        "log_every": "1",
        "checkpointing_steps": "0",
    }
    run(data, tmp_path / "one", **options, lora_targets="video", max_train_steps="2")
    lines = read_log(tmp_path / "one" / "log.jsonl")
    (warning,) = [line["warning"] for line in lines if "warning" in line]
    assert "the adapter has no layer of the audio stream" in warning
    frozen = {"branch_learning_rate": "audio=0,text=0,cross=0,shared=0", "lora_targets": "all"}
    run(data, tmp_path / "two", **options, **frozen, max_train_steps="4")
    lines = read_log(tmp_path / "two" / "log.jsonl")
    said = " ".join(line["warning"] for line in lines if "warning" in line)
    assert "the adapters of the audio stream do not move" in said
    assert "the adapters of the video stream" not in said


def test_a_target_that_the_modalities_leave_alone_is_refused(data, tmp_path, base):
    with pytest.raises(ValueError, match=r"'voice' updates the audio stream, but modalities="):
        recipe(
            data,
            tmp_path,
            pretrained_model_name_or_path=base,
            rank="2",
            modalities="video",
            lora_targets="voice",
        ).check()


def test_captions_are_completed_in_their_share_of_rows(data):
    attributes = {"gender": "female", "hair_color": "red", "hair_style": "bob"}

    class Drawn:
        """A clip as the corpus caches it."""

        def __len__(self):
            return 1

        def __getitem__(self, index):
            captions = ['a woman says "hello"', "a talking face"]
            return {"captions": captions, "attributes": attributes, "phones": ()}

        def clip(self, index):
            return CLIP

    def captions(share):
        shares = {"caption_dropout": 0.0, "text_dropout": 0.0, "attribute_lists": share}
        clips = TrainingClips(Drawn(), DataOptions(**shares))
        return [clips.sample(0, seed).caption for seed in range(60)]

    plain, some, full = captions(0.0), captions(0.5), captions(1.0)
    listed = attribute_list(attributes)
    assert "red hair" in listed
    assert not [caption for caption in plain if listed in caption]
    assert all(caption.endswith(listed) for caption in full)
    assert 15 < sum(listed in caption for caption in some) < 45
    # the same caption is chosen whatever the share
    assert all(long.startswith(short) for long, short in zip(full, plain, strict=True))
