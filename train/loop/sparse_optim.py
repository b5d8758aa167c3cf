"""Optimizers for memory tables: only the rows that a forward touched are read, updated and written.

Use beside the optimizer of the dense weights:

    rows = RowAdagrad([table for _, table in memory_tables(model)], lr=0.05)   # from now on the
    tables collect loss.backward()                                  # once, or several times to
    accumulate clip_with_rows(model.parameters(), rows, 1.0)
    rows.step(); rows.zero_grad()

Shape legend: R rows of a table, D channels, U unique rows touched since the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import distributed

from avdiff.core.memory_table import MemoryTable, merge_rows

Touched = tuple[torch.Tensor, torch.Tensor]


class RowOptimizer(torch.optim.Optimizer):
    """Base of the two below: gathers what was touched, keeps the state, writes back.

    Args:
        tables: tables in RAM, float32 or bfloat16 (written with stochastic rounding: plain rounding
            would lose every update below 2^-9 of a value). seed: of the rounding.
    """

    def __init__(
        self, tables: Sequence[MemoryTable], defaults: dict[str, Any], seed: int = 0
    ) -> None:
        for table in tables:
            if table.rows is None or table.rows.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    "tables: only tables in RAM, of float32 or bfloat16, can be trained"
                )
        self.tables = list(tables)
        super().__init__([{"params": [t.rows for t in tables]}], defaults)
        self.generator = torch.Generator().manual_seed(seed)
        self._gathered: list[Touched | None] | None = None
        for table in self.tables:
            table.collecting = True

    def touched(self) -> list[Touched | None]:
        """Rows (U,) and gradients (U, D) of each table, merged over micro-batches and ranks; kept
        until `step`.
        """
        fresh = [gather_rows(t.take_pending(), t.dim, t.rows) for t in self.tables]
        kept = self._gathered or [None] * len(fresh)
        self._gathered = [_join(a, b) for a, b in zip(kept, fresh, strict=True)]
        return self._gathered

    def grad_norm(self) -> torch.Tensor:
        """L2 norm of all row gradients, to be joined with that of the dense weights."""
        squares = [g.square().sum() for g in (t[1] for t in self.touched() if t is not None)]
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    def scale_grads(self, factor: float | torch.Tensor) -> None:
        """Multiply all row gradients: clipping, or the mean over micro-batches."""
        for entry in self.touched():
            if entry is not None:
                entry[1].mul_(factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the touched rows in place."""
        loss = closure() if closure is not None else None
        group = self.param_groups[0]
        for table, key, entry in zip(self.tables, group["params"], self.touched(), strict=True):
            if entry is None or table.rows is None:
                continue
            rows, grads = entry
            values = table.rows[rows].float()
            values -= self._update(self._state(key, table.rows), rows, grads, group)
            whole = table.rows.dtype == torch.float32
            table.rows[rows] = values if whole else _round_up_or_down(values, self.generator)
        self._gathered = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget what was touched."""
        self._gathered = None
        for table in self.tables:
            table.pending.clear()

    def state_dict(self) -> dict[str, Any]:
        """State for exact resume, the generator of the rounding included."""
        return super().state_dict() | {"generator": self.generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        state_dict = dict(state_dict)
        self.generator.set_state(state_dict.pop("generator").cpu())
        super().load_state_dict(state_dict)
        for i, key in enumerate(
            self.param_groups[0]["params"]
        ):  # torch casts state to the table's type: undo
            if i in state_dict["state"]:
                self.state[key] = {
                    k: v.clone().to(key.device) for k, v in state_dict["state"][i].items()
                }

    def flat_state(self) -> dict[str, torch.Tensor]:
        """The same state as plain tensors by name, for a safetensors file."""
        flat = {
            f"{i}.{name}": value
            for i, key in enumerate(self.param_groups[0]["params"])
            for name, value in self.state[key].items()
        }
        return flat | {"generator": self.generator.get_state()}

    def load_flat_state(self, flat: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `flat_state`."""
        self.generator.set_state(flat["generator"].cpu())
        for i, key in enumerate(self.param_groups[0]["params"]):
            own = {
                name.split(".", 1)[1]: value
                for name, value in flat.items()
                if name.startswith(f"{i}.")
            }
            self.state[key] = {name: value.clone().to(key.device) for name, value in own.items()}

    def _state(self, key: torch.Tensor, table: torch.Tensor) -> dict[str, torch.Tensor]:
        if not self.state[key]:
            self.state[key] = self._new_state(table)
        return self.state[key]

    def _new_state(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError

    def _update(
        self,
        state: dict[str, torch.Tensor],
        rows: torch.Tensor,
        grads: torch.Tensor,
        group: dict[str, Any],
    ) -> torch.Tensor:
        """(U,), (U, D) -> what is subtracted from the rows (U, D)."""
        raise NotImplementedError


class RowAdagrad(RowOptimizer):
    """Row-wise Adagrad, one float of state a row: G_r += mean(g_r^2); w_r -= lr g_r / (sqrt(G_r) +
    eps).
    """

    def __init__(
        self, tables: Sequence[MemoryTable], lr: float = 0.05, eps: float = 1e-8, seed: int = 0
    ) -> None:
        super().__init__(tables, {"lr": lr, "eps": eps}, seed)

    def _new_state(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sum": torch.zeros(len(table), device=table.device)}

    def _update(
        self,
        state: dict[str, torch.Tensor],
        rows: torch.Tensor,
        grads: torch.Tensor,
        group: dict[str, Any],
    ) -> torch.Tensor:
        total = state["sum"][rows] + grads.square().mean(-1)
        state["sum"][rows] = total
        return group["lr"] * grads / (total.sqrt() + group["eps"])[:, None]


class RowAdam(RowOptimizer):
    """Lazy Adam without weight decay: momentum of each value in the table's type, second moment one
    float a row.

    Moments of untouched rows do not decay, and the bias correction counts the steps of each row by
    itself.
    """

    def __init__(
        self,
        tables: Sequence[MemoryTable],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(tables, {"lr": lr, "betas": betas, "eps": eps}, seed)

    def _new_state(self, table: torch.Tensor) -> dict[str, torch.Tensor]:
        one = torch.zeros(len(table), device=table.device)
        return {"mean": torch.zeros_like(table), "square": one, "steps": one.clone()}

    def _update(
        self,
        state: dict[str, torch.Tensor],
        rows: torch.Tensor,
        grads: torch.Tensor,
        group: dict[str, Any],
    ) -> torch.Tensor:
        first, second = group["betas"]
        steps = state["steps"][rows] + 1
        mean = state["mean"][rows].float().lerp(grads, 1 - first)
        square = state["square"][rows].lerp(grads.square().mean(-1), 1 - second)
        state["steps"][rows], state["square"][rows] = steps, square
        state["mean"][rows] = mean.to(state["mean"].dtype)
        root = (square / (1 - second**steps)).sqrt() + group["eps"]
        return group["lr"] * mean / ((1 - first**steps) * root)[:, None]


def clip_with_rows(
    parameters: Iterable[torch.Tensor], rows: RowOptimizer | None, max_norm: float
) -> torch.Tensor:
    """Clip dense and row gradients by their common norm, as if the table were a parameter; returns
    the norm.
    """
    dense = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None])
    if rows is not None:
        norm = torch.hypot(norm, rows.grad_norm().to(norm))
    torch.nn.utils.clip_grads_with_norm_(dense, max_norm, norm)
    if rows is not None:
        rows.scale_grads((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def gather_rows(entry: Touched | None, dim: int, like: torch.Tensor | None) -> Touched | None:
    """Mean of the row gradients over all ranks of the process group; unchanged when there is none.

    Every rank must call it at the same point, touched or not.
    """
    if (
        not (distributed.is_available() and distributed.is_initialized())
        or distributed.get_world_size() == 1
    ):
        return entry
    world_size = distributed.get_world_size()
    device = None if like is None else like.device
    rows, grads = entry or (
        torch.empty(0, dtype=torch.int64, device=device),
        torch.empty(0, dim, device=device),
    )
    counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=device))
    most = int(torch.cat(counts).max())
    if most == 0:
        return None
    padded = torch.nn.functional.pad(rows, (0, most - len(rows)))
    padded_grads = torch.nn.functional.pad(grads, (0, 0, 0, most - len(rows)))
    all_rows = [torch.empty_like(padded) for _ in range(world_size)]
    all_grads = [torch.empty_like(padded_grads) for _ in range(world_size)]
    distributed.all_gather(all_rows, padded)
    distributed.all_gather(all_grads, padded_grads)
    kept = [int(c) for c in counts]
    return merge_rows(
        torch.cat([r[:n] for r, n in zip(all_rows, kept, strict=True)]),
        torch.cat([g[:n] for g, n in zip(all_grads, kept, strict=True)]) / world_size,
    )


def _join(a: Touched | None, b: Touched | None) -> Touched | None:
    if a is None or b is None:
        return b if a is None else a
    return merge_rows(torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))


def _round_up_or_down(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """fp32 -> bf16, up or down with probability by distance, so that small updates survive on
    average.
    """
    bits = values.cpu().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32)
    return ((bits + noise) & -65536).view(torch.float32).to(values.device, torch.bfloat16)
