"""What a recipe will do, before it does it: buckets, steps, trainable weights by branch, memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from avdiff.core.memory_table import memory_tables
from avdiff.train.joint.dataset import Batch, BucketKey, TrainingClips
from avdiff.train.joint.lora import branch_of
from avdiff.train.joint.trained_model import TrainedModel
from avdiff.train.loop.dataloader import SeededLoader
from avdiff.train.loop.task import Loss

# gradients of activations during the backward pass, and the allocator's losses: measured on CPU
IN_FLIGHT = 1.35


@dataclass(frozen=True)
class Plan:
    """What a dry run looks at.

    Args:
        model: with its weights chosen. clips: training data. collate: rows -> batch. loss: of a
            batch, under a generator. device: where it would run.
    """

    model: TrainedModel
    clips: TrainingClips
    collate: Callable[..., Batch]
    loss: Callable[[Batch, str, torch.Generator], Loss]
    device: torch.device

    def describe(self) -> str:
        """Lines for `--dry-run`.

        Raises:
            ValueError: a step needs more clips of one bucket than there are.
        """
        weights = weight_bytes(self.model)
        activations = activation_bytes(self)
        total = (weights + activations) / 2**30
        memory = (
            f"memory at the peak: about {total:.2f} GB besides Python and its libraries "
            f"({weights / 2**30:.2f} for weights, gradients, moments and average, "
            f"{activations / 2**30:.2f} for activations)"
        )
        return "\n".join([*self._data(), "", *branch_table(self.model), "", memory])

    def _data(self) -> list[str]:
        """Clips, epochs, buckets."""
        o = self.model.recipe.training
        groups = self.clips.groups()
        loader = SeededLoader(
            self.clips,
            self.collate,
            o.train_batch_size,
            o.gradient_accumulation_steps,
            groups=groups,
        )
        epochs = o.max_train_steps / loader.steps_per_epoch
        lines = [
            f"{len(self.clips)} clips, {loader.steps_per_epoch} steps of {loader.rows_per_step} "
            f"clips in an epoch, {o.max_train_steps} steps = {epochs:.1f} epochs on one process",
            "",
        ]
        for group, count in Counter(groups).most_common():
            left_out = " (fewer than a batch: never used)" if count < o.train_batch_size else ""
            lines.append(f"{describe_bucket(group)}, {count} clips{left_out}")
        return lines


def describe_bucket(group: BucketKey) -> str:
    """A bucket in words: size, length, modalities, tokens."""
    clip, *modalities = group
    return (
        f"bucket {clip.num_frames} frames, {clip.width}x{clip.height}, "
        f"{float(clip.seconds):.2f} s, {' + '.join(modalities)}: "
        f"{clip.video_tokens} video and {clip.audio_tokens} audio tokens"
    )


def branch_table(model: TrainedModel) -> list[str]:
    """Trained and frozen values of each branch."""
    trained = Counter[str]()
    frozen = Counter[str]()
    for name, parameter in model.named_parameters():
        counts = trained if parameter.requires_grad else frozen
        counts[branch_of(name)] += parameter.numel()
    in_tables = sum(t.num_rows * t.dim for _, t in memory_tables(model.transformer))
    learning, resting = (in_tables, 0) if model.rows else (0, in_tables)
    lines = [f"{'branch':10}{'trained':>14}{'frozen':>14}"]
    lines += [f"{b:10}{trained[b]:14,}{frozen[b]:14,}" for b in sorted(trained | frozen)]
    lines.append(f"{'tables':10}{learning:14,}{resting:14,}")
    return lines


def weight_bytes(model: TrainedModel) -> int:
    """Bytes of fp32 weights, and for trained ones of gradient, two moments and the average."""
    copies = 3 + bool(model.recipe.training.ema_decay)
    total = 0
    for module in model.modules.values():
        total += sum(p.numel() * (1 + copies * p.requires_grad) for p in module.parameters())
        total += sum(b.numel() for b in module.buffers())
    return 4 * total


def activation_bytes(plan: Plan) -> int:
    """Bytes that a micro-batch of the largest bucket keeps for its backward pass.

    Measured on one and on two rows and continued in a straight line: what does not grow with the
    batch (weights cast to bf16) is the constant part.
    """
    groups = plan.clips.groups()
    clip = max(set(groups), key=_size)[0]
    index = next(i for i, group in enumerate(groups) if group[0] == clip)
    rows = [plan.clips[index]] * 2
    one, two = (_saved_bytes(plan, plan.collate(rows[:n])) for n in (1, 2))
    saved = one + (plan.model.recipe.training.train_batch_size - 1) * (two - one)
    return round(IN_FLIGHT * saved)


def _size(group: BucketKey) -> tuple[int, int]:
    """Order of buckets by memory: tokens of a clip, then modalities."""
    return group[0].video_tokens + group[0].audio_tokens, len(group)


def _saved_bytes(plan: Plan, batch: Batch) -> int:
    model = plan.model
    known = {
        tensor.untyped_storage().data_ptr()
        for module in model.modules.values()
        for tensor in (*module.parameters(), *module.buffers())
    }
    # holding the storages keeps their addresses from being used again
    saved: dict[int, torch.UntypedStorage] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    bf16 = model.recipe.training.mixed_precision == "bf16"
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast(plan.device.type, torch.bfloat16, enabled=bf16),
    ):
        loss = plan.loss(batch, "main", torch.Generator(plan.device).manual_seed(0))
    total = sum(storage.nbytes() for storage in saved.values())
    del loss
    if model.rows is not None:
        model.rows.zero_grad()  # forget the rows that this forward gathered
    return total
