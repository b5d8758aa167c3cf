"""Memory of this process, from Linux's own counters."""

from __future__ import annotations

from pathlib import Path

STATUS = Path("/proc/self/status")


def reset_peak() -> None:
    """Start the peak anew from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def resident(peak: bool = False) -> int:
    """Bytes that are resident now, or at most since `reset_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024
