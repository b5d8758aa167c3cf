"""What a large run rests on: blocks sharded over processes give the same gradients, and the memory
estimate holds.
"""

import ctypes
import gc
import os
import traceback
from pathlib import Path

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.train import finetune
from avdiff.train.joint.dry_run import Plan, activation_bytes, weight_bytes
from avdiff.train.loop.fit import fit
from tests.test_finetune import CLIP, recipe, write_clips
from tests.tiny import fill_zeros


def in_children(work, count):
    """Exit codes of forked processes that run work(rank)."""
    pids = []
    for rank in range(count):
        pid = os.fork()
        if not pid:
            try:
                work(rank)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(77)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def gradients(model):
    generator = torch.Generator().manual_seed(0)
    video = torch.randn(2, CLIP.video_tokens, 64, generator=generator)
    audio = torch.randn(2, CLIP.audio_tokens, 48, generator=generator)
    level = torch.tensor([0.3, 0.8])
    out = model(video, audio, level, level, text=None, positions=Positions.of(CLIP))
    loss = out.video.square().mean() + out.audio.square().mean()
    loss.backward()
    return float(loss.detach())


def test_sharded_blocks_give_the_same_gradients():
    """FSDP2 (fully_shard) over two gloo processes, each DualBlock by itself, against the whole
    model.
    """

    def work(rank):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(33000 + os.getppid() % 2000))
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(0)
        whole = fill_zeros(AVTransformer(**presets.tiny()))
        torch.manual_seed(0)
        parts = fill_zeros(AVTransformer(**presets.tiny()))
        for block in parts.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(parts, mesh=mesh)
        assert gradients(parts) == pytest.approx(gradients(whole), rel=1e-5)
        theirs = dict(parts.named_parameters())
        sharded = 0
        for name, parameter in whole.named_parameters():
            grad = theirs[name].grad
            assert (grad is None) == (parameter.grad is None), name
            if grad is not None:
                sharded += isinstance(grad, DTensor)
                torch.testing.assert_close(
                    grad.full_tensor(), parameter.grad, rtol=1e-4, atol=1e-6, msg=name
                )
        assert sharded > 50
        torch.distributed.destroy_process_group()

    assert in_children(work, 2) == [0, 0]


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux to read a process's peak"
)
@pytest.mark.parametrize("rows", ["16", "64"])
def test_the_memory_estimate_holds_within_a_fifth(tmp_path, rows):
    """The peak of a real run, over what the process had before, against what --dry-run says."""
    data = write_clips(tmp_path / "train", 64)

    def resident(key):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    def work(rank):
        options = {
            "train_batch_size": rows,
            "max_train_steps": "3",
            "checkpointing_steps": "0",
            "ema_decay": "0.9",
            "validation_data": "",
            "preset_changes": "video_dim=192,audio_dim=128,num_layers=6",
        }
        made = recipe((data, data), tmp_path / "out", **options)
        task = finetune.setup(made)
        plan = Plan(task.model, task.clips, task.collate, task.loss, task.device)
        told = weight_bytes(task.model) + activation_bytes(plan)
        weights = sum(p.numel() * 4 for m in task.modules.values() for p in m.parameters())
        gc.collect()
        ctypes.CDLL(None).malloc_trim(
            0
        )  # what earlier tests freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
        before = (
            resident("VmRSS") - weights
        )  # the estimate counts the weights, which are here already
        fit(task, made.training)
        measured = resident("VmHWM") - before
        print(f"estimate {told / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB", flush=True)
        assert measured == pytest.approx(told, rel=0.2)

    assert in_children(work, 1) == [0]
