"""Where a run takes place: accelerate's process group, device and trackers; and how it is asked to
stop.
"""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Self

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from accelerate.utils import DistributedType

from avdiff.core.precision import native_bf16
from avdiff.train.loop.task import FitOptions

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
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=options.report_to or None,
        project_dir=options.output_dir,
    )
    if accelerator.distributed_type not in HANDLED:
        raise ValueError(
            f"distributed_type={accelerator.distributed_type.value}: this loop handles one "
            "process or "
            "data-parallel ones; choose MULTI_GPU, MULTI_CPU or FSDP (version 2) in `accelerate "
            "config`"
        )
    if options.mixed_precision == "bf16" and not native_bf16():
        accelerator.print(
            "mixed_precision='bf16': this device only emulates bf16, far slower than fp32; "
            "choose auto or no"
        )
    return accelerator


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
        self._before: dict[int, Any] = {}

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
