"""Where a run takes place: accelerate's process group, device and trackers; and how it is asked to
stop.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Self, TypeAlias

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedType

from avdiff.core.precision import native_bf16
from avdiff.train.loop.task import FitOptions

# variables by which torchrun and the MPI launchers tell a process how many there are
GROUP_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# what `signal.signal` gives back
SignalHandler: TypeAlias = Callable[[int, FrameType | None], object] | int | None
HANDLED = (
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
    DistributedType.FSDP,
)


def make_accelerator(options: FitOptions) -> Accelerator:
    """Accelerator for this call; a second `fit` in one process may ask for another precision.

    Raises:
        ValueError: unknown tracker, or a kind of distribution this loop does not handle.
    """
    if options.report_to and options.report_to not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(
            f"report_to={options.report_to!r}: needs one of "
            f"{', '.join(map(str, LOGGER_TYPE_TO_CLASS))}"
        )
    refuse_launch(os.environ)
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.report_to or None,
        project_dir=options.output_dir,
    )
    if accelerator.distributed_type not in HANDLED:
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value}: this loop handles one process "
            "or data-parallel ones; choose MULTI_GPU, MULTI_CPU or FSDP (version 2) in `accelerate "
            "config`"
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    # "no" is also what the launcher sets when nobody said anything
    if launched not in ("no", options.mixed_precision):
        accelerator.print(
            f"mixed_precision: accelerate was launched with {launched}, the recipe says "
            f"{options.mixed_precision}; the recipe decides"
        )
    if options.mixed_precision == "bf16" and not native_bf16():
        accelerator.print(
            "mixed_precision='bf16': this device only emulates bf16, far slower than fp32; "
            "choose auto or no"
        )
    return accelerator


def refuse_launch(environment: Mapping[str, str]) -> None:
    """Refuse a launch that would not do what was asked for.

    `accelerate launch --cpu --num_processes N` starts N processes only by way of mpirun, with a
    host file; without one it sets the address of a group and starts a single process in silence,
    whose steps would have a part of the clips that they should.

    Raises:
        ValueError: says how to start instead.
    """

    def asked(name: str) -> bool:
        return environment.get(name, "").lower() in ("1", "true", "yes")

    for name in ("DEEPSPEED", "MEGATRON_LM"):
        if asked(f"ACCELERATE_USE_{name}"):
            raise ValueError(
                f"distributed_type={name}: this loop does not run under it; models too large for "
                "one GPU are cut by FSDP2 (launch with fsdp2.yaml), others train with "
                "multi_gpu.yaml, both beside the recipes"
            )
    grouped = any(name in environment for name in GROUP_SIZES)
    if asked("ACCELERATE_USE_CPU") and "MASTER_PORT" in environment and not grouped:
        raise ValueError(
            "num_processes: accelerate was asked for several processes on the CPU and started one, "
            "since it has no --mpirun_hostfile; start them with `ACCELERATE_USE_CPU=true torchrun "
            "--nproc_per_node 2 -m avdiff.train.finetune RECIPE.toml`, or ask for one"
        )


def open_trackers(accelerator: Accelerator, options: FitOptions) -> None:
    """Start the tracker with the options as its configuration."""
    if options.report_to:
        config = {k: v if v is not None else "" for k, v in vars(options).items()}
        accelerator.init_trackers(Path(options.output_dir).name or "avdiff", config=config)


class Stop:
    """Context in which the first SIGTERM or Ctrl-C asks to stop after the step; a second Ctrl-C
    ends at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, SignalHandler] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
