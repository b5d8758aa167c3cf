"""What a recipe will do, before it does it: buckets, steps, trainable weights by branch, memory."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from avdiff.core.memory_table import memory_tables
from avdiff.train.joint.lora import branch_of
from avdiff.train.loop.dataloader import SeededLoader

if TYPE_CHECKING:
    from avdiff.train.finetune import FinetuneTask

# gradients of activations during the backward pass, and the allocator's losses: measured on CPU
IN_FLIGHT = 1.35


def describe_plan(task: FinetuneTask) -> str:
    """Lines for `--dry-run`.

    Raises:
        ValueError: a step needs more clips of one bucket than there are.
    """
    o = task.recipe.training
    loader = SeededLoader(
        task.dataset,
        task.collate,
        o.train_batch_size,
        o.gradient_accumulation_steps,
        groups=task.groups,
    )
    lines = [
        f"{len(task.dataset)} clips, {loader.steps_per_epoch} steps of {loader.rows_per_step} "
        "clips "
        "in an epoch, "
        f"{o.max_train_steps} steps = {o.max_train_steps / loader.steps_per_epoch:.1f} epochs on "
        "one process",
        "",
    ]
    for (clip, *modalities), count in Counter(task.groups).most_common():
        left_out = " (fewer than a batch: never used)" if count < o.train_batch_size else ""
        lines.append(
            f"bucket {clip.num_frames} frames, {clip.width}x{clip.height}, "
            f"{float(clip.seconds):.2f} s, "
            f"{' + '.join(modalities)}: {clip.video_tokens} video and {clip.audio_tokens} audio "
            "tokens, "
            f"{count} clips{left_out}"
        )
    trained = Counter[str]()
    frozen = Counter[str]()
    for name, parameter in task._named():
        (trained if parameter.requires_grad else frozen)[branch_of(name)] += parameter.numel()
    tables = sum(t.num_rows * t.dim for _, t in memory_tables(task.transformer))
    lines += ["", f"{'branch':10}{'trained':>14}{'frozen':>14}"]
    lines += [f"{b:10}{trained[b]:14,}{frozen[b]:14,}" for b in sorted(trained | frozen)]
    lines.append(f"{'tables':10}{tables if task.rows else 0:14,}{0 if task.rows else tables:14,}")
    weights = weight_bytes(task)
    activations = activation_bytes(task)
    lines += [
        "",
        f"memory at the peak: about {(weights + activations) / 2**30:.2f} GB besides Python and "
        "its "
        f"libraries ({weights / 2**30:.2f} for weights, gradients, moments and average, "
        f"{activations / 2**30:.2f} for activations)",
    ]
    return "\n".join(lines)


def weight_bytes(task: FinetuneTask) -> int:
    """Bytes of fp32 weights, and for trained ones of gradient, two moments and the average."""
    copies = 3 + bool(task.recipe.training.ema_decay)
    total = 0
    for module in task.modules.values():
        total += sum(p.numel() * (1 + copies * p.requires_grad) for p in module.parameters())
        total += sum(b.numel() for b in module.buffers())
    return 4 * total


def activation_bytes(task: FinetuneTask) -> int:
    """Bytes that a micro-batch of the largest bucket keeps for its backward pass.

    Measured on one and on two rows and continued in a straight line: what does not grow with the
    batch (weights cast to bf16) is the constant part.
    """
    clip, *_ = max(set(task.groups), key=lambda g: (g[0].video_tokens + g[0].audio_tokens, len(g)))
    index = next(i for i, group in enumerate(task.groups) if group[0] == clip)
    rows = [task.dataset[index]] * 2
    one, two = (_saved_bytes(task, task.collate(rows[:n])) for n in (1, 2))
    saved = one + (task.recipe.training.train_batch_size - 1) * (two - one)
    return round(IN_FLIGHT * saved)


def _saved_bytes(task: FinetuneTask, batch: dict[str, Any]) -> int:
    known = {
        p.untyped_storage().data_ptr()
        for m in task.modules.values()
        for p in (*m.parameters(), *m.buffers())
    }
    saved: dict[
        int, torch.UntypedStorage
    ] = {}  # holding the storages keeps their addresses from being used again

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    bf16 = task.recipe.training.mixed_precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(task.device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = task.loss(batch, "main", torch.Generator(task.device).manual_seed(0))
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    if task.rows is not None:
        task.rows.zero_grad()  # forget the rows that this forward gathered
    return total
