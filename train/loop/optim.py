"""Optimizers by phase, gradients averaged over processes, gradient norms by group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from diffusers.optimization import get_scheduler
from torch import nn
from torch.distributed.tensor import DTensor

from avdiff.train.loop.fsdp import local, split_by_sharding
from avdiff.train.loop.task import FitOptions, ParameterGroup, Task

NO_DECAY_OWNERS = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
)
NO_DECAY_ENDINGS = ("bias", "table", "embedding", "embeddings", "token", "tokens")
BUCKET = 2**24  # elements of one all-reduce: 64 MB of fp32


def build_optimizer(task: Task, phase: str, options: FitOptions) -> torch.optim.Optimizer:
    """The task's own optimizer, or AdamW over `task.parameters(phase)`, split into parameters with
    and without decay.

    Raises:
        ValueError: no parameters, a parameter twice, one that belongs to no module of the task, or
            an own optimizer over weights in slices.
    """
    custom = task.optimizer(phase, options)
    if custom is not None:
        if any(isinstance(p, DTensor) for group in custom.param_groups for p in group["params"]):
            raise ValueError(
                f"optimizer: {type(custom).__name__} works on whole matrices, and FSDP keeps "
                "slices of them; choose adamw, or launch without FSDP"
            )
        return custom
    names = parameter_names(task.modules)
    spared = _undecayed(task.modules)
    groups = []
    seen = set()
    for entry in _as_groups(task.parameters(phase)):
        params = list(entry["params"])
        for p in params:
            if id(p) not in names:
                raise ValueError(
                    f"parameters({phase!r}): a parameter of shape {tuple(p.shape)} belongs to "
                    "none of the "
                    f"modules {', '.join(task.modules)}; it would not be saved"
                )
            if id(p) in seen:
                raise ValueError(f"parameters({phase!r}): {names[id(p)]} appears twice")
            seen.add(id(p))
        decayed = [p for p in params if p.ndim > 1 and id(p) not in spared]
        rest = [p for p in params if p.ndim <= 1 or id(p) in spared]
        common = {k: v for k, v in entry.items() if k != "params"}
        groups += [{**common, "params": part} for part in split_by_sharding(decayed)]
        groups += [
            {**common, "params": part, "weight_decay": 0.0} for part in split_by_sharding(rest)
        ]
    if not groups:
        raise ValueError(f"parameters({phase!r}): nothing to train; is everything frozen?")
    return torch.optim.AdamW(
        groups,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=True,
    )


def eight_bit(groups: Sequence[ParameterGroup], options: FitOptions) -> torch.optim.Optimizer:
    """bitsandbytes' AdamW with moments in eight bits (Dettmers et al., arXiv 2110.02861); its
    states need an accelerator or a recent CPU build of the package.
    """
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found, unused-ignore]

    return AdamW8bit(
        list(groups),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )


@contextmanager
def only_phase(params: Mapping[str, Sequence[nn.Parameter]], phase: str) -> Iterator[None]:
    """Parameters of the other phases ask for no gradient meanwhile (no graph for a generator that
    rests).
    """
    others = {id(p): p for name, held in params.items() if name != phase for p in held}
    for p in params[phase]:
        others.pop(id(p), None)
    for p in others.values():
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others.values():
            p.requires_grad_(True)


def build_scheduler(
    optimizer: torch.optim.Optimizer, options: FitOptions
) -> torch.optim.lr_scheduler.LambdaLR:
    """Warm-up, then cosine, constant or linear, by diffusers' `get_scheduler`; every group keeps
    its own peak.
    """
    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )


def parameter_names(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """id of each parameter -> "module.path.to.weight"."""
    return {
        id(p): f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters()
    }


@torch.no_grad()
def average_gradients(params: Sequence[nn.Parameter], world_size: int) -> None:
    """Mean over ranks; a parameter that no rank used keeps None, so that AdamW leaves it
    bit-identical.

    Gradients in slices are left alone: FSDP has averaged them during the backward.
    """
    params = [p for p in params if not isinstance(p, DTensor)]
    if world_size == 1 or not params:
        return
    used = torch.tensor([float(p.grad is not None) for p in params], device=params[0].device)
    torch.distributed.all_reduce(used)
    bucket: list[torch.Tensor] = []
    for parameter, count in zip(params, used.tolist(), strict=True):
        if count:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
        if sum(g.numel() for g in bucket) >= BUCKET:
            _reduce(bucket, world_size)
            bucket = []
    if bucket:
        _reduce(bucket, world_size)


@torch.no_grad()
def group_norms(
    params: Sequence[nn.Parameter], groups: Mapping[int, str]
) -> dict[str, torch.Tensor]:
    """Euclidean norm of the gradients of each group; `groups` maps id(parameter) -> group.

    Of gradients in slices that over all ranks, which must call it together.
    """
    members: dict[str, list[torch.Tensor]] = {}
    sliced: dict[str, list[torch.Tensor]] = {}
    for p in params:
        if p.grad is not None:
            kind = sliced if isinstance(p.grad, DTensor) else members
            kind.setdefault(groups[id(p)], []).append(local(p.grad))
    norms = {name: torch.nn.utils.get_total_norm(grads) for name, grads in members.items()}
    if sliced:
        squares = torch.stack(
            [torch.nn.utils.get_total_norm(grads).square() for grads in sliced.values()]
        )
        torch.distributed.all_reduce(squares)
        for name, norm in zip(sliced, squares.sqrt(), strict=True):
            norms[name] = torch.hypot(norms[name], norm) if name in norms else norm
    return norms


@torch.no_grad()
def clip_gradients(params: Sequence[nn.Parameter], max_norm: float, total: torch.Tensor) -> None:
    """Scale gradients of norm `total` down to `max_norm`, as torch's `clip_grads_with_norm_`, in
    slices or whole.
    """
    grads = [local(p.grad) for p in params if p.grad is not None]
    if grads:
        torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0).to(grads[0].device))


def _as_groups(entries: Iterable[nn.Parameter | ParameterGroup]) -> list[ParameterGroup]:
    """Loose parameters become one group ahead of the given ones."""
    loose = []
    groups = []
    for entry in entries:
        if isinstance(entry, nn.Parameter):
            loose.append(entry)
        else:
            groups.append(entry)
    first: list[ParameterGroup] = [{"params": loose}] if loose else []
    return first + groups


def _undecayed(modules: Mapping[str, nn.Module]) -> set[int]:
    """ids of embeddings, norms and tables; 1-D parameters are spared anyway."""
    spared: set[int] = set()
    for module in modules.values():
        for owner in module.modules():
            for name, p in owner.named_parameters(recurse=False):
                if isinstance(owner, NO_DECAY_OWNERS) or name.endswith(NO_DECAY_ENDINGS):
                    spared.add(id(p))
    return spared


def _reduce(grads: Sequence[torch.Tensor], world_size: int) -> None:
    flat = torch.cat([g.reshape(-1) for g in grads])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
