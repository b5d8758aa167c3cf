"""Weights in slices, one a process, for models too large to be whole on every device: FSDP2,
torch's `fully_shard`.

    accelerate launch --config_file avdiff/bundled/recipes/fsdp2.yaml -m avdiff.train.finetune
    RECIPE

`Accelerator.prepare` takes one model with its optimizer; a task has several modules and an
optimizer for each phase. So `fit` reads what accelerate was launched with and calls `fully_shard`
itself, before it builds the optimizers, which must hold the slices. Blocks of the named classes
become units: their parameters, gradients, moments and averages are DTensors. What lies outside of
blocks stays whole on every rank, and so do Engrams inside of blocks: `prepare` reads them before
any forward would gather them. In the presets that is a few percent of the weights.

Numbers stay those of an unsharded run: slices, gathered weights and gradients are fp32, and bf16
comes from autocast alone (FSDP's own MixedPrecisionPolicy is not used). A checkpoint holds whole
tensors that the first rank writes, so the number of processes may change on resume; the host of the
first rank needs memory for the largest file of it.

Tested on CPU with two gloo processes. Untested, for want of hardware: CUDA and NCCL (streams,
overlap, the memory saved), more than two processes, several machines, and accelerate's FSDP launch
itself, which it ignores on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, broadcast
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from avdiff.core.engram import Engram


@dataclass(frozen=True)
class Sharding:
    """How modules are cut.

    Args:
        blocks: names of the classes whose instances are units; of nested ones the outermost.
        reshard_after_forward: give gathered weights up after the forward and gather them again for
            the backward.
    """

    blocks: tuple[str, ...]
    reshard_after_forward: bool = True

    @classmethod
    def of(cls, plugin: FullyShardedDataParallelPlugin) -> Sharding:
        """The settings of accelerate's plugin.

        Raises:
            ValueError: one that this loop does not follow; the sentence names it as accelerate's
                config file does.
        """
        names = plugin.transformer_cls_names_to_wrap or ()
        followed = {
            "fsdp_version: 2": plugin.fsdp_version == 2,
            "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP": plugin.auto_wrap_policy
            is transformer_auto_wrap_policy,
            "fsdp_transformer_layer_cls_to_wrap: DualBlock,CaptionEncoder": bool(names),
            "fsdp_offload_params: false": not isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "fsdp_activation_checkpointing: false (the recipe has "
            "gradient_checkpointing)": not plugin.activation_checkpointing,
            "fsdp_state_dict_type: FULL_STATE_DICT": getattr(plugin.state_dict_type, "name", "")
            == "FULL_STATE_DICT",
        }
        for wanted, given in followed.items():
            if not given:
                raise ValueError(
                    f"fsdp_config: this loop needs {wanted}; see avdiff/bundled/recipes/fsdp2.yaml"
                )
        return cls(tuple(n.strip() for n in names), bool(plugin.reshard_after_forward))


def requested(accelerator: Accelerator) -> Sharding | None:
    """What accelerate was launched with; None for anything but FSDP.

    Raises:
        ValueError: settings that this loop does not follow.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return None
    if accelerator.parallelism_config is not None:
        raise ValueError(
            "parallelism_config: this loop cuts weights over all processes alike; leave it out"
        )
    return Sharding.of(accelerator.state.fsdp_plugin)


# ------------------------------------------------------------------------------------------ cutting
def shard(modules: Mapping[str, nn.Module], device: torch.device, sharding: Sharding) -> None:
    """Move modules to the device, make them those of the first rank and cut their blocks, one block
    after the other: the device never holds more than one whole block. Parameters in blocks are
    DTensors afterwards.

    Raises:
        ValueError: a class that no module has.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    units = {name: blocks_of(module, sharding.blocks) for name, module in modules.items()}
    found = {type(unit).__name__ for blocks in units.values() for unit in blocks}
    for wanted in sharding.blocks:
        if wanted not in found:
            raise ValueError(
                "fsdp_transformer_layer_cls_to_wrap: no module of this training "
                f"({', '.join(modules)}) "
                f"has a {wanted}; name its blocks, or launch without FSDP"
            )
    for name, module in modules.items():
        _cut(module, units[name], mesh, device, sharding.reshard_after_forward)


def blocks_of(module: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The outermost modules of the named classes, in order."""
    if type(module).__name__ in names:
        return [module]
    return [block for child in module.children() for block in blocks_of(child, names)]


def _cut(
    module: nn.Module,
    blocks: list[nn.Module],
    mesh: DeviceMesh,
    device: torch.device,
    reshard: bool,
) -> None:
    whole = {p for part in module.modules() if isinstance(part, Engram) for p in part.parameters()}
    for block in blocks:
        move_buffers(block, device)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)
    move_buffers(module, device)
    if (
        blocks and module not in blocks
    ):  # a root without weights of its own: it lines up the gathers of its blocks
        rest = {p for p in module.parameters() if not isinstance(p, DTensor)}
        fully_shard(module, mesh=mesh, ignored_params=rest)


@torch.no_grad()
def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the tensors of a module that are not in slices to the device, and make them those of the
    first rank.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    for tensor in (*module.parameters(), *module.buffers()):
        if not isinstance(tensor, DTensor):
            tensor.data = tensor.data.to(device)
            if several and torch.distributed.get_world_size() > 1:
                tensor.copy_(broadcast(tensor.detach().clone()))


def reshard(modules: Mapping[str, nn.Module]) -> None:
    """Drop gathered weights that a forward without a backward may have left: they would outlive a
    change of slices.
    """
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()


# -------------------------------------------------------------------------------- slices and wholes
def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a DTensor, sharing its memory (call it without gradients); any other
    tensor itself.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor gathered, on every rank; any other tensor itself. All ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def split_by_sharding(params: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Whole parameters and sliced ones, empty lists left out: a fused kernel takes no mixture."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for p in params:
        kinds[isinstance(p, DTensor)].append(p)
    return [kind for kind in kinds if kind]


@torch.no_grad()
def gathered(tree: Any, first: bool) -> Any:
    """Nested dicts and lists with every DTensor as a whole CPU tensor on the `first` rank, and None
    on the others.

    All ranks must call it. torch's own `get_optimizer_state_dict` is not used: it invents moments
    for parameters that never had a gradient, and a resumed run would count their steps differently.
    """
    if isinstance(tree, DTensor):
        tensor = tree.full_tensor()  # one at a time: the device holds no second model
        return tensor.cpu() if first else None
    if isinstance(tree, Mapping):
        return {key: gathered(value, first) for key, value in tree.items()}
    return [gathered(value, first) for value in tree] if isinstance(tree, list) else tree


def slices(
    state: Mapping[str, torch.Tensor], like: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Whole tensors, the same on all ranks, cut as those of the same name in `like`."""
    return {name: _slice(tensor, like.get(name)) for name, tensor in state.items()}


def optimizer_slices(saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A gathered optimizer state with each tensor of a parameter's shape cut as that parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        **saved,
        "state": {
            i: {
                key: _slice(value, params[i])
                if torch.is_tensor(value) and value.shape == params[i].shape
                else value
                for key, value in entry.items()
            }
            for i, entry in saved["state"].items()
        },
    }


def _slice(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).clone()


@contextmanager
def exportable(modules: Mapping[str, nn.Module], first: bool) -> Iterator[None]:
    """Inside it, on the `first` rank, sharded modules save like whole ones: `state_dict` gives
    whole CPU tensors and their class has its own name again. All ranks must enter it; modules that
    were never cut are left alone.
    """
    undo: list[Any] = []
    for module in modules.values():
        if isinstance(module, FSDPModule):
            found = gathered(module.state_dict(), first)
            if first:
                undo.append(_presented(module, found))
    try:
        yield
    finally:
        for handle, module, kind in undo:
            handle.remove()
            module.__class__ = kind


def _presented(module: nn.Module, found: dict[str, torch.Tensor]) -> tuple[Any, nn.Module, type]:
    """Let `state_dict` answer with `found`, under the class that `fully_shard` has put a subclass
    over.
    """

    def answer(_: nn.Module, state: dict[str, Any], prefix: str, __: Any) -> None:
        state.update({prefix + name: tensor for name, tensor in found.items()})

    kind = type(module)
    module.__class__ = next(
        c for c in kind.__mro__ if issubclass(c, nn.Module) and not issubclass(c, FSDPModule)
    )
    return module.register_state_dict_post_hook(answer), module, kind
