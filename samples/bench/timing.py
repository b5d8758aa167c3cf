"""What the benches share: functions timed by turns, and ratios with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


def by_turns(
    functions: dict[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each function in each of `rounds` rounds, in turn, after one call each that does
    not count.
    """
    for function in functions.values():
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            function()
            times[name].append(clock() - start)
    return times


def ratio(
    name: str, above: Sequence[float], below: Sequence[float], aim: float | None, note: str = ""
) -> dict[str, Any]:
    """Row of a bench: the median of the round-by-round ratios, and the distance between their
    quartiles.
    """
    ratios = [a / b for a, b in zip(above, below, strict=True)]
    row = {
        "name": name,
        "ratio": statistics.median(ratios),
        "spread": spread(ratios),
        "aim": aim,
        "note": note,
    }
    return row | {"seconds": statistics.median(above)}


def spread(values: Sequence[float]) -> float:
    """Distance between the quartiles; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low
