"""Which weight belongs to whom, and LoRA on chosen branches (peft; saved in diffusers' format)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from avdiff.families.presenter import branch_of, owner_of
from avdiff.latents import MODALITIES
from avdiff.train.loop.fsdp import whole
from avdiff.train.recipe import BRANCHES, TARGETS, AdapterOptions


def add_lora(
    transformer: nn.Module,
    options: AdapterOptions,
    modalities: Sequence[str] = MODALITIES,
) -> None:
    """Freeze the transformer and give linear layers of the wanted branches a trainable low-rank
    update; with one modality only those layers that no other one uses.

    Raises:
        ValueError: a target without a linear layer in this model.
    """
    layers = {
        name: branch_of(f"{name}.weight")
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
    }
    targets: set[str] = set()
    for target in options.lora_targets:
        found = {name for name in layers if _is_target(name, layers[name], target)}
        if not found:
            present = ", ".join(sorted(set(layers.values()) - {"other"}))
            raise ValueError(
                f"lora_targets: {target!r} has no linear layer in this model; it has {present}"
            )
        targets |= found
    if len(modalities) == 1:
        targets = {name for name in targets if owner_of(f"{name}.weight") == modalities[0]}
    chosen = [name for name in layers if name in targets]  # in the order of the model
    ranks = {
        name: options.branch_rank[layers[name]]
        for name in chosen
        if layers[name] in options.branch_rank
    }
    scale = (options.lora_alpha or options.rank) / options.rank
    config = LoraConfig(
        r=options.rank,
        lora_alpha=scale * options.rank,
        lora_dropout=options.lora_dropout,
        target_modules=chosen,
        rank_pattern={_exactly(name): rank for name, rank in ranks.items()},
        alpha_pattern={_exactly(name): scale * rank for name, rank in ranks.items()},
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)  # type: ignore[operator]


def _is_target(layer: str, branch: str, target: str) -> bool:
    """Whether a layer belongs to a branch, to a kind of `TARGETS`, or to all branches."""
    if target == "all":
        return branch in BRANCHES
    if target in TARGETS:
        kind = TARGETS[target]
        return branch in kind.branches and owner_of(f"{layer}.weight") == kind.owner
    return branch == target


def _exactly(name: str) -> str:
    """peft reads the keys of its patterns as regular expressions over the end of a name."""
    return "^" + re.escape(name)


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """name -> layer with an update."""
    return {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def delta_norms(module: nn.Module, group_of: Callable[[str], str] = branch_of) -> dict[str, float]:
    """Frobenius norm of the update scale * B A of each branch, or other group of weights: one that
    stays at 0 learns nothing. All ranks must call it where weights are in slices.
    """
    squares: dict[str, float] = {}
    for name, layer in lora_layers(module).items():
        group = group_of(f"{name}.weight")
        for adapter in layer.active_adapters:
            a = whole(layer.lora_A[adapter].weight).float()
            b = whole(layer.lora_B[adapter].weight).float()
            # |BA|^2 = sum((B'B) * (AA')) needs no matrix of the layer's full size
            square = float(((b.T @ b) * (a @ a.T)).sum()) * layer.scaling[adapter] ** 2
            squares[group] = squares.get(group, 0.0) + square
    return {group: max(square, 0.0) ** 0.5 for group, square in squares.items()}


def adapter_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of the updates alone."""
    return {n: t for n, t in module.state_dict().items() if ".lora_" in n}


def load_adapter_state(module: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Inverse of `adapter_state`; names must match exactly."""
    own = adapter_state(module)
    wrong = sorted(own.keys() ^ state.keys())
    if wrong:
        raise ValueError(
            f"the saved adapter does not fit: {wrong[0]} and {len(wrong) - 1} more differ"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])


def scale_branches(module: nn.Module, scales: Mapping[str, float]) -> None:
    """Multiply the updates of branches for good, e.g. {"audio": 0.0} strips the audio part of an
    adapter.

    Raises:
        ValueError: an unknown branch, or one without an update.
    """
    layers = {n: branch_of(n + ".weight") for n in lora_layers(module)}
    for branch in scales:
        if branch not in layers.values():
            raise ValueError(
                f"scale_branches: {branch!r} has no update here; {_listed(set(layers.values()))} "
                "have"
            )
    with torch.no_grad():
        for name, layer in lora_layers(module).items():
            for adapter in layer.active_adapters:
                layer.lora_B[adapter].weight.mul_(scales.get(layers[name], 1.0))


def merge(module: Any) -> None:
    """Add the updates to the weights and remove the adapter: a plain model that gives the same
    output.
    """
    module.fuse_lora()
    module.unload_lora()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
