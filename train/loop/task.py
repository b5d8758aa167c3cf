"""What a trainer hands to `fit`: the `Task` it implements, the `Loss` it returns, the `FitOptions`
it is run with.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import torch
from diffusers import ModelMixin
from torch import nn

from avdiff.core.precision import native_bf16
from avdiff.train.loop.checkpoint import write_tensors
from avdiff.train.loop.dataloader import SizedItems
from avdiff.train.loop.sparse_optim import RowOptimizer

BatchT = TypeVar("BatchT")  # what a task's `collate` makes


class ParameterGroup(TypedDict, total=False):
    """A group of parameters in torch's form: what it names overrides the options.

    Args:
        params: the parameters. lr: peak learning rate. weight_decay: decoupled decay. muon: whether
            `MuonAdam` turns their momentum into orthogonal matrices.
    """

    params: list[nn.Parameter]
    lr: float
    weight_decay: float
    muon: bool


@dataclass(frozen=True)
class Loss:
    """What one micro-batch costs.

    Args:
        total: scalar to differentiate, a mean over rows.
        parts: named values for the log, any shape, usually one per row (n,); a part may be empty.
            They are detached, averaged over rows, micro-batches and ranks, and never
            differentiated. Logged as "loss/<name>".
        metrics: the same for values that are no losses; logged under their own names.
    """

    total: torch.Tensor
    parts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    metrics: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Task(Generic[BatchT]):
    """What is trained on what. Subclass it, set the attributes in `__init__`, implement `loss`.

    Attributes:
        modules: name -> module. All of them are moved to the device, put in training mode, saved
            and restored; those in `ema_modules` (None: all) are averaged too. Every trained
            parameter must belong to one of them.
        dataset: map-style without anything random in its items, or a `SeededDataset`, whose items
            are drawn from the seed of their row.
        collate: list of items -> batch (None: torch's default).
        groups: None, or a key per item; a micro-batch never mixes keys (buckets of equal shape).
        phases: the optimizers, in the order in which each step runs them; GANs have ("generator",
            "discriminator").
        device: set by `fit` before anything else happens.
        step: set by `fit` before each `validate`: optimizer steps done.
        common_seed: set by `fit` before each `loss`: seed for what a micro-batch shares, the same
            on all ranks.
    """

    modules: dict[str, nn.Module]
    dataset: SizedItems
    collate: Callable[[Any], BatchT] | None = None
    groups: Sequence[Hashable] | None = None
    phases: tuple[str, ...] = ("main",)
    ema_modules: tuple[str, ...] | None = None
    device: torch.device = torch.device("cpu")
    common_seed: int = 0
    step: int = 0

    def loss(self, batch: BatchT, phase: str, generator: torch.Generator) -> Loss:
        """Loss of one micro-batch (tensors are on the device, bf16 autocast is on if asked for).

        `generator` is on the device and seeded from (seed, step, phase, first row): draw every
        noise from it, or one row at a time from `row_generators(generator, B)`, whose noise does
        not depend on how a step is split. Only the parameters of `phase` require gradients
        meanwhile.
        """
        raise NotImplementedError

    def parameters(self, phase: str) -> Iterable[nn.Parameter] | Iterable[ParameterGroup]:
        """Parameters of a phase, or torch parameter groups ({"params", "lr", "weight_decay"}
        override the options).

        Default: every parameter of every module that requires gradients. Norms, biases, embeddings,
            tables and other
        1-D parameters get no weight decay in any case.
        """
        return (
            p for module in self.modules.values() for p in module.parameters() if p.requires_grad
        )

    def optimizer(self, phase: str, options: FitOptions) -> torch.optim.Optimizer | None:
        """Optimizer of a phase; None (the default) is AdamW over `parameters(phase)`."""
        return None

    def row_optimizer(self, phase: str) -> RowOptimizer | None:
        """Optimizer of memory tables that learn with this phase: their gradients are logged and
        clipped with the rest. The task steps it in `after_step`.
        """
        return None

    def phases_at(self, step: int) -> tuple[str, ...]:
        """Phases that run at `step` (0 is the first); default: all. A discriminator may start
        late.
        """
        return self.phases

    def validate(self) -> dict[str, float]:
        """Metrics on held-out data, computed with the averaged weights in eval mode, without
        gradients.

        Called on every rank; only the first rank's numbers are kept. The global generators are put
        back afterwards.
        """
        return {}

    def after_step(self, phase: str, lr: float) -> None:
        """Called after the optimizer's step: train what is no `nn.Parameter` (memory tables by
        gathered rows).

        `lr` is options.learning_rate times the schedule, whatever the rates of the parameter
        groups.
        """

    def report(self) -> dict[str, float]:
        """Further values for each log line (norms of adapters, load of experts)."""
        return {}

    def warnings(self, values: Mapping[str, float]) -> Iterable[str]:
        """Sentences for the console and the log when the values of a log line show trouble."""
        return ()

    def norm_group(self, name: str) -> str:
        """Key under which a parameter's gradient norm is logged; `name` is
        "module.path.to.weight".
        """
        return name.split(".", 1)[0]

    def describe_group(self, key: Hashable) -> str:
        """A key of `groups` in words."""
        return f"group {key}"

    def settings(self) -> dict[str, object]:
        """JSON-able facts that must not change between interruption and resume (model config,
        dataset).
        """
        return {"dataset_size": len(self.dataset)}

    def module_state(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of `modules[name]` to save; adapters override it to leave the frozen base out."""
        return self.modules[name].state_dict()

    def load_module_state(self, name: str, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `module_state`."""
        self.modules[name].load_state_dict(state)

    def extra_state_dict(self) -> dict[str, torch.Tensor]:
        """Further tensors to save: tables, running balances. Flat, the same on every rank."""
        return {}

    def load_extra_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Inverse of `extra_state_dict`."""

    def save(self, directory: Path) -> None:
        """Export for use, called with the averaged weights in place: at the end and for each best
        validation.
        """
        for name, module in self.modules.items():
            if isinstance(module, ModelMixin):
                module.save_pretrained(directory / name)
            else:
                write_tensors(directory / f"{name}.safetensors", module.state_dict())


@dataclass(frozen=True)
class FitOptions:
    """How a task is trained. Names follow the diffusers examples."""

    output_dir: str
    """Folder for checkpoints, log.jsonl and the exported weights."""
    max_train_steps: int = 1000
    """Optimizer steps of the whole run, resumed ones included."""
    train_batch_size: int = 8
    """Rows of one micro-batch on one process."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler: str = "cosine"
    """Shape after the warm-up: cosine, constant or linear."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.99
    """Decay of the second moment."""
    adam_epsilon: float = 1e-8
    """Added to the denominator."""
    adam_weight_decay: float = 0.01
    """Decoupled weight decay of matrices; norms, biases, embeddings and tables have none."""
    max_grad_norm: float = 1.0
    """Gradients of a phase are clipped to this global norm; 0 switches clipping off."""
    ema_decay: float = 0.0
    """Decay of the weights' moving average, used for validation and export; 0 switches it off."""
    mixed_precision: str = "no"
    """no, bf16 (autocast; weights, optimizer and averages stay fp32), or auto: bf16 where the
    device multiplies it in hardware, no elsewhere.
    """
    checkpointing_steps: int = 500
    """Save a checkpoint every so many steps; 0 saves only at the end."""
    checkpoints_total_limit: int = 2
    """Keep this many newest checkpoints; 0 keeps all."""
    resume_from_checkpoint: str | None = None
    """latest, a checkpoint's path, or nothing for a fresh start."""
    allow_changed_options: bool = False
    """Go on although options or data differ from those of the checkpoint."""
    validation_steps: int = 0
    """Validate every so many steps and at the end; 0 never."""
    best_metric: str = ""
    """Metric that decides which weights are kept in output_dir/best: name if lower is better, +name
    if higher is.
    """
    log_every: int = 10
    """Steps between log lines."""
    report_to: str = ""
    """Tracker known to accelerate besides log.jsonl: tensorboard, trackio, wandb..."""
    seed: int = 0
    """Seed of data order, noise and dropout."""
    dataloader_num_workers: int = 0
    """Processes that load data; 0 loads in the training process."""
    max_seconds: float = 0.0
    """Save and stop after this many seconds; 0 has no limit."""

    def __post_init__(self) -> None:
        at_least = {
            "max_train_steps": 1,
            "train_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "log_every": 1,
            "lr_warmup_steps": 0,
            "checkpointing_steps": 0,
            "checkpoints_total_limit": 0,
            "validation_steps": 0,
            "dataloader_num_workers": 0,
            "seed": 0,
            "learning_rate": 0,
            "adam_weight_decay": 0,
            "max_grad_norm": 0,
            "max_seconds": 0,
        }
        for name, low in at_least.items():
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}={getattr(self, name)}: needs at least {low}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(
                f"ema_decay={self.ema_decay}: needs a number from 0 (off) to below 1, such as 0.999"
            )
        for name, fits in (
            ("lr_scheduler", ("cosine", "constant", "linear")),
            ("mixed_precision", ("no", "bf16", "auto")),
        ):
            if getattr(self, name) not in fits:
                raise ValueError(f"{name}={getattr(self, name)!r}: needs {' or '.join(fits)}")
        if (
            self.mixed_precision == "auto"
        ):  # decided here, so that a checkpoint tells which one it was
            object.__setattr__(self, "mixed_precision", "bf16" if native_bf16() else "no")

    def fixed(self) -> dict[str, object]:
        """The options that shape the result, and so must not change on resume."""
        free = {
            "output_dir",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "resume_from_checkpoint",
            "allow_changed_options",
            "validation_steps",
            "best_metric",
            "log_every",
            "report_to",
            "dataloader_num_workers",
            "max_seconds",
        }
        if self.lr_scheduler == "constant":
            free.add("max_train_steps")  # then it bends no curve
        return {name: value for name, value in vars(self).items() if name not in free}


@dataclass(frozen=True)
class FitSummary:
    """How a run ended.

    Args:
        step: optimizer steps done in all. reason: finished, interrupted (signal) or time
            (max_seconds).
        seconds: wall-clock of this call. samples_per_second: rows over all ranks, this call.
        data_wait: share of the time spent waiting for data, 0 to 1.
        losses: means of the last logged window. metrics: last validation. checkpoint: newest one.
    """

    step: int
    reason: str
    seconds: float
    samples_per_second: float
    data_wait: float
    losses: dict[str, float]
    metrics: dict[str, float]
    checkpoint: Path | None


def row_generators(generator: torch.Generator, rows: int) -> list[torch.Generator]:
    """One generator per row of a micro-batch, seeded `generator.initial_seed() + row`.

    Row k of a step gets the same numbers whether the step is one batch, several micro-batches or
    several processes.
    """
    first = generator.initial_seed()
    return [torch.Generator(generator.device).manual_seed(first + k) for k in range(rows)]
