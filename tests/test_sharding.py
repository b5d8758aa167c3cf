"""Weights in slices: two gloo processes train like one, resume bit for bit and export what they
gathered together.

accelerate ignores FSDP on a CPU, so the tests hand `fit` the cutting that accelerate would have
asked for.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor

from avdiff.files import RECIPES
from avdiff.models.transformer import AVTransformer
from avdiff.train import finetune
from avdiff.train.loop.checkpoint import read_tensors, read_tree
from avdiff.train.loop.fit import fit
from avdiff.train.loop.fsdp import Sharding
from avdiff.train.loop.run_log import read_log
from tests.test_finetune import recipe, write_clips
from tests.test_fit import Plain, options
from tests.test_scale import in_children

CONFIG = RECIPES / "fsdp2.yaml"
CUT = Sharding(("DualBlock", "CaptionEncoder"))
STEPS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return write_clips(root / "train", 32), write_clips(root / "held", 8, seed=1)


def made(data, folder, **changes):
    """Two micro-batches a step, norms that are clipped, averages, memory tables that learn."""
    return recipe(
        data,
        folder,
        **{
            "max_train_steps": str(STEPS),
            "train_batch_size": "2",
            "max_grad_norm": "0.2",
            "gradient_accumulation_steps": "2",
            "ema_decay": "0.9",
            "log_every": "1",
            "checkpointing_steps": "0",
            "validation_steps": str(STEPS),
            "validation_items": "2",
            **changes,
        },
    )


def on_two(work):
    """Run work(rank) on two gloo processes; it must raise nothing."""

    def child(rank):
        port = str(35000 + os.getppid() % 2000)
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
            ACCELERATE_USE_CPU="true",
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        work(rank)
        torch.distributed.destroy_process_group()

    assert in_children(child, 2) == [0, 0]


def trained(wanted, sharding=None):
    task = finetune.setup(wanted)
    fit(task, wanted.training, sharding)
    return task


def column(folder, *names):
    lines = [line for line in read_log(Path(folder) / "log.jsonl") if names[0] in line]
    return np.array([[line[name] for name in names] for line in lines])


def tensors(folder):
    """Everything in a run's last checkpoint and its export."""
    last = Path(folder) / f"checkpoint-{STEPS}"
    files = [*last.glob("*.safetensors"), *(Path(folder) / "final").glob("*/*.safetensors")]
    flat = {f"{f.parent.name}/{f.name}/{k}": v for f in files for k, v in read_tensors(f).items()}
    moments = read_tree(last / "training.pt")["optimizers"]["main"]["state"]
    return flat | {f"moments/{i}/{k}": v for i, entry in moments.items() for k, v in entry.items()}


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "adapter"])
def test_two_processes_train_like_one(data, tmp_path, kind):
    """The same losses, gradient norms, held-out losses and exported weights as one process with the
    same batch.
    """
    changes = {"checkpointed": {"gradient_checkpointing": "true"}}.get(kind, {})
    if kind == "adapter":
        finetune.setup(made(data, tmp_path / "base")).save(tmp_path / "base")
        changes = {"pretrained_model_name_or_path": str(tmp_path / "base"), "rank": "2"}

    def work(rank):
        task = trained(made(data, tmp_path / "two", **changes), CUT)
        cut = [n for n, p in task.model.named_parameters() if isinstance(p, DTensor)]
        assert len(cut) > 50
        assert {n.split(".")[1] for n in cut if n.startswith("transformer")} == {
            "transformer_blocks"
        }
        assert not [n for n in cut if ".memory." in n]

    on_two(work)
    trained(made(data, tmp_path / "one", train_batch_size="4", **changes))
    names = [
        n
        for n in read_log(tmp_path / "one" / "log.jsonl")[0]
        if n == "loss" or n.startswith("grad_norm/")
    ]
    assert {"loss", "grad_norm/video", "grad_norm/cross"} <= set(names)
    names += [
        n for n in read_log(tmp_path / "one" / "log.jsonl")[0] if n.startswith("adapter_norm/")
    ]
    assert kind == "adapter" or "grad_norm/memory_table" in names
    one, two = column(tmp_path / "one", *names), column(tmp_path / "two", *names)
    assert len(two) == STEPS
    np.testing.assert_allclose(two, one, rtol=1e-3, atol=1e-6)
    held = [
        n
        for line in read_log(tmp_path / "one" / "log.jsonl")
        for n in line
        if n.startswith("validation/")
    ]
    np.testing.assert_allclose(
        column(tmp_path / "two", *held[:4]), column(tmp_path / "one", *held[:4]), rtol=1e-3
    )


def test_resume_is_bitwise_and_the_export_is_what_was_gathered(data, tmp_path):
    """Stopped after a step and resumed, even with blocks that stay gathered; against torch's own
    way of gathering.
    """

    def work(rank):
        common = {"best_metric": "video"}
        task = trained(made(data, tmp_path / "whole", **common), CUT)
        gather = StateDictOptions(full_state_dict=True, cpu_offload=True)
        found = get_model_state_dict(task.transformer, options=gather)  # on all ranks
        trained(made(data, tmp_path / "parts", **common, max_seconds="1e-6"), CUT)
        trained(
            made(data, tmp_path / "parts", **common, resume_from_checkpoint="latest"),
            replace(CUT, reshard_after_forward=False),
        )
        if rank == 0:
            saved = read_tensors(
                tmp_path / "whole" / f"checkpoint-{STEPS}" / "transformer.safetensors"
            )
            assert saved.keys() == found.keys()
            assert [k for k in saved if not torch.equal(saved[k], found[k])] == []

    on_two(work)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert any("moments" in name for name in whole)
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
    average = read_tensors(tmp_path / "whole" / f"checkpoint-{STEPS}" / "ema.safetensors")
    for folder in ("final", "best"):
        place = tmp_path / "whole" / folder / "transformer"
        assert '"AVTransformer"' in (place / "config.json").read_text()
        exported = AVTransformer.from_pretrained(place).state_dict()
        followed = [name for name in exported if f"transformer.{name}" in average]
        assert len(followed) > 100
        assert [
            n for n in followed if not torch.equal(exported[n], average[f"transformer.{n}"])
        ] == []
    with pytest.raises(ValueError, match="was trained with FSDP; launch it the same way"):
        trained(made(data, tmp_path / "whole", resume_from_checkpoint="latest"))


def test_what_does_not_fit_is_refused(data, tmp_path):
    def work(rank):
        with pytest.raises(ValueError, match=r"MuonAdam works on whole matrices.* choose adamw"):
            trained(made(data, tmp_path / "muon", optimizer="muon"), CUT)
        with pytest.raises(ValueError, match=r"no module of this training \(net\) has a DualBlock"):
            fit(Plain(), options(tmp_path / "plain"), CUT)

    on_two(work)


def test_a_full_disk_on_the_first_rank_ends_both(data, tmp_path):
    """The other rank is in the gathers of a checkpoint: the first must finish them before it may
    fail.
    """

    def work(rank):
        (tmp_path / "out").mkdir(exist_ok=True)
        (
            tmp_path / "out" / f".checkpoint-{STEPS}.tmp"
        ).touch()  # a file where the first rank needs a folder
        with pytest.raises(RuntimeError, match=f"checkpoint-{STEPS}"):
            trained(made(data, tmp_path / "out", validation_steps="0"), CUT)

    on_two(work)


def launched(monkeypatch, *words):
    """The plugin that a process gets which accelerate launches with the shipped file and further
    words.
    """
    args = launch_command_parser().parse_args(
        ["--config_file", str(CONFIG), *words, "-m", "avdiff.train.finetune"]
    )
    args, _, _ = _validate_launch_command(args)
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    return FullyShardedDataParallelPlugin()


def test_the_shipped_file_asks_for_this_cutting(monkeypatch):
    assert Sharding.of(launched(monkeypatch)) == CUT


@pytest.mark.parametrize(
    ("words", "needs"),
    [
        (
            (
                "--fsdp_version",
                "1",
                "--fsdp_reshard_after_forward",
                "FULL_SHARD",
                "--fsdp_sync_module_states",
                "false",
            ),
            "fsdp_version: 2",
        ),
        (("--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP"), "TRANSFORMER_BASED_WRAP"),
        (("--fsdp_offload_params", "true"), "fsdp_offload_params: false"),
        (("--fsdp_activation_checkpointing", "true"), "the recipe has gradient_checkpointing"),
        (("--fsdp_state_dict_type", "SHARDED_STATE_DICT"), "FULL_STATE_DICT"),
    ],
)
def test_settings_that_are_not_followed_are_refused(monkeypatch, words, needs):
    with pytest.raises(ValueError, match=needs):
        Sharding.of(launched(monkeypatch, *words))
