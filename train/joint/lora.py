"""Which weight belongs to whom, and LoRA on chosen branches (peft; saved in diffusers' format)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from avdiff.train.loop.fsdp import whole
from avdiff.train.recipe import BRANCHES, AdapterOptions

_ROLES = (  # the first that matches
    ("memory", r"(^|\.)memory\."),
    ("text", r"(^|\.)(text_encoder|text_register|text_attn|phoneme_encoder)(\.|$)"),
    ("shared", r"(^|\.)shared[._]"),
    ("cross", r"(^|\.)(cross_attn|cross_gate|cross_gate_proj)(\.|$)"),
    ("video", r"(^|\.|_)video(\.|$)"),
    ("audio", r"(^|\.|_)audio(\.|$)"),
)


def branch_of(name: str) -> str:
    """Branch of a parameter by its name: video, audio, cross, shared, text, memory; "other" for
    none of them.
    """
    return next((branch for branch, pattern in _ROLES if re.search(pattern, name)), "other")


def owner_of(name: str) -> str:
    """ "video" or "audio" if only that branch of the transformer uses the parameter, else
    "both".
    """
    if re.search(r"(^|\.)(memory\.|shared[._])", name):
        return "both"
    for modality in ("video", "audio"):
        if re.search(rf"(^|\.|_){modality}(\.|$)", name):
            return modality
    return "both"


def add_lora(transformer: nn.Module, options: AdapterOptions) -> None:
    """Freeze the transformer and give linear layers of the wanted branches a trainable low-rank
    update.

    Raises:
        ValueError: a target without a linear layer in this model.
    """
    wanted = set(BRANCHES) if "all" in options.lora_targets else set(options.lora_targets)
    layers = {
        n: branch_of(n + ".weight")
        for n, m in transformer.named_modules()
        if isinstance(m, nn.Linear)
    }
    for branch in sorted(wanted):
        if branch not in layers.values() and "all" not in options.lora_targets:
            raise ValueError(
                f"lora_targets: {branch!r} has no linear layer in this model; it has "
                f"{', '.join(sorted(set(layers.values()) - {'other'}))}"
            )
    targets = [n for n, branch in layers.items() if branch in wanted]
    ranks = {n: options.branch_rank[layers[n]] for n in targets if layers[n] in options.branch_rank}
    scale = (options.lora_alpha or options.rank) / options.rank
    config = LoraConfig(
        r=options.rank,
        lora_alpha=scale * options.rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets,
        rank_pattern={_exactly(n): r for n, r in ranks.items()},
        alpha_pattern={_exactly(n): scale * r for n, r in ranks.items()},
    )
    transformer.requires_grad_(False)
    transformer.add_adapter(config)  # type: ignore[operator]


def _exactly(name: str) -> str:
    """peft reads the keys of its patterns as regular expressions over the end of a name."""
    return "^" + re.escape(name)


def lora_layers(module: nn.Module) -> dict[str, LoraLayer]:
    """name -> layer with an update."""
    return {n: m for n, m in module.named_modules() if isinstance(m, LoraLayer)}


@torch.no_grad()
def delta_norms(module: nn.Module) -> dict[str, float]:
    """Frobenius norm of the update scale * B A of each branch: a branch that stays at 0 learns
    nothing. All ranks must call it where weights are in slices.
    """
    squares: dict[str, float] = {}
    for name, layer in lora_layers(module).items():
        branch = branch_of(name + ".weight")
        for adapter in layer.active_adapters:
            a = whole(layer.lora_A[adapter].weight).float()
            b = whole(layer.lora_B[adapter].weight).float()
            # |BA|^2 = sum((B'B) * (AA')) needs no matrix of the layer's full size
            square = float(((b.T @ b) * (a @ a.T)).sum()) * layer.scaling[adapter] ** 2
            squares[branch] = squares.get(branch, 0.0) + square
    return {branch: max(square, 0.0) ** 0.5 for branch, square in squares.items()}


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
