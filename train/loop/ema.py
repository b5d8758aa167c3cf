"""Exponential moving average of the weights: what validation measures and an export holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from avdiff.core.memory_table import memory_tables
from avdiff.train.loop.fsdp import local, reshard, slices


class EMA:
    """fp32 exponential moving average of parameters: shadow <- decay * shadow + (1 - decay) *
    parameter.

    The decay warms up as min(decay, (1 + n) / (10 + n)) at update n, so that early weights are
    forgotten.

    Args:
        modules: the modules to follow. Averaged are parameters with `requires_grad` and memory
            tables that a row optimizer trains; buffers stay as they are.
        decay: in [0, 1).
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self._live: dict[str, torch.Tensor] = {
            f"{m}.{name}": p
            for m, module in modules.items()
            for name, p in module.named_parameters()
            if p.requires_grad
        }
        self._live |= {
            f"{m}.{name}.rows": table.rows
            for m, module in modules.items()
            for name, table in memory_tables(module)
            if table.collecting and table.rows is not None
        }
        self.shadow = {name: p.detach().float().clone() for name, p in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the current parameters."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        live = [local(p.detach()).float() for p in self._live.values()]
        torch._foreach_lerp_([local(s) for s in self.shadow.values()], live, 1 - decay)
        self.updates += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the modules hold the averaged weights; afterwards their own again,
        bit for bit.
        """
        trained = {name: p.detach().clone() for name, p in self._live.items()}
        self._write(self.shadow)
        try:
            yield
        finally:
            self._write(trained)

    @torch.no_grad()
    def _write(self, values: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._live.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Shadow tensors, in slices where the weights are, plus the number of updates."""
        return {**self.shadow, "updates": torch.tensor(self.updates)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over a saved average of whole tensors; names must match exactly."""
        missing = self.shadow.keys() ^ (state.keys() - {"updates"})
        if missing:
            raise ValueError(f"the saved EMA does not fit the model: {_some(missing)}")
        self.updates = int(state["updates"])
        cut = slices(state, self.shadow)
        for name, shadow in self.shadow.items():
            shadow.copy_(cut[name])


@contextmanager
def averaged_weights(modules: Mapping[str, nn.Module], ema: EMA | None) -> Iterator[None]:
    """Averaged weights, eval mode; training mode of every submodule is put back afterwards."""
    modes = [(part, part.training) for module in modules.values() for part in module.modules()]
    reshard(modules)
    with ema.applied() if ema else nullcontext():
        for module in modules.values():
            module.eval()
        try:
            yield
        finally:
            for part, mode in modes:
                part.training = mode
            reshard(modules)


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
