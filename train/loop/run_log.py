"""What a run says while it runs: means since the last line, a JSONL file, a progress bar or plain
lines.

Every line of `log.jsonl` is one JSON object with "step". It is appended by a single write, so that
a killed run leaves whole lines, and cut back to the checkpoint's step on resume, so that no step is
told twice.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class MetricAverager:
    """Running sums of named values; `pop` returns the means and starts again. The state survives a
    checkpoint.
    """

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, total: float, count: float = 1) -> None:
        """Take in `count` values that add up to `total`."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += total
        entry[1] += count

    def merge(self, states: Iterable[Mapping[str, list[float]]]) -> None:
        """Take in the states of other ranks."""
        for state in states:
            for name, (total, count) in state.items():
                self.add(name, total, count)

    def pop(self) -> dict[str, float]:
        """Means of everything seen since the last call."""
        means = {name: total / count for name, (total, count) in self._sums.items() if count}
        self._sums = {}
        return means

    def state_dict(self) -> dict[str, list[float]]:
        """The sums so far."""
        return {name: list(entry) for name, entry in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Take over saved sums."""
        self._sums = {name: list(entry) for name, entry in state.items()}


class RunLogger:
    """Writes `log.jsonl` and the console; silent on every rank but the first.

    Args:
        path: the JSONL file. steps: steps of the whole run. active: False makes every method do
            nothing.
    """

    def __init__(self, path: Path, steps: int, active: bool = True) -> None:
        self.path = path
        self.steps = steps
        self.active = active
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._first = 0
        self._bar: Progress | None = None
        self._task: Any = None

    def start(self, step: int) -> None:
        """Begin at `step`: drop lines of later steps, show the bar if somebody is watching."""
        self._started = time.monotonic()
        self._first = step
        if not self.active:
            return
        self._cut(step)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=self.steps, completed=step, note="")
            self._bar.start()

    def tick(self, step: int, loss: float) -> None:
        """One step is done."""
        if self._bar:
            self._bar.update(self._task, completed=step, note=f"loss {loss:.4g}")

    def record(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line to the file and, without a progress bar, print it."""
        if not self.active:
            return
        self._append({"step": step, **{k: _plain(v) for k, v in values.items()}})
        if not self._bar:
            # Buckets and gradient norms are for the file: a console line should be read, not
            # searched.
            details = ("grad_norm", "experts")
            brief = {
                k: v for k, v in values.items() if k.count("/") <= 1 and not k.startswith(details)
            }
            shown = " ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in brief.items()
            )
            self._console.print(f"step {step}/{self.steps} {self._left(step)}{shown}", markup=False)

    def warn(self, step: int, text: str) -> None:
        """A warning: to the console, and as a line of its own to the file."""
        if self.active:
            self._append({"step": step, "warning": text})
            self.say(f"warning at step {step}: {text}")

    def say(self, text: str) -> None:
        """A sentence for the person at the console."""
        if self.active:
            self._console.print(text, markup=False)

    def stop(self) -> None:
        """Take the bar down."""
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _append(self, line: Mapping[str, Any]) -> None:
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, (json.dumps(line) + "\n").encode())
        finally:
            os.close(handle)

    def _left(self, step: int) -> str:
        done = step - self._first
        if done <= 0 or step >= self.steps:
            return ""
        left = int((time.monotonic() - self._started) / done * (self.steps - step))
        return f"left {left // 3600}:{left % 3600 // 60:02d}:{left % 60:02d} "

    def _cut(self, step: int) -> None:
        """Keep only whole lines up to `step`."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a full disk
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """All lines of a `log.jsonl`."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _plain(value: Any) -> Any:
    """JSON has no NaN: null instead."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
