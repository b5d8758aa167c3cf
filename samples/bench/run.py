"""`make bench`: every bench of this folder, one table, one JSON file.

    python samples/bench/run.py [--quick] [--only moe engram] [--output bench.json]

A bench is a module with `run(quick: bool) -> list[dict]`: name, ratio (or value and unit), spread,
aim, note. What is compared is timed by turns, so that a busy machine slows both sides; still,
measure where nothing else runs.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import platform
import sys
import time
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch: ratios on one thread are the steadiest
BENCHES = ("transformer", "moe", "engram", "training", "generation")


def main(arguments: list[str] | None = None) -> int:
    """Run the benches and print the table; 1 if an aim was missed, 2 if a bench is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=BENCHES, default=BENCHES, help="these benches alone"
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer rounds, smaller tables, shorter clips"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("bench.json"), help="JSON file (default bench.json)"
    )
    parser.add_argument(
        "--folder", type=Path, default=None, help="where the large Engram table may lie meanwhile"
    )
    given = parser.parse_args(arguments)
    here = Path(__file__).parent
    missing = [name for name in given.only if not (here / f"{name}.py").is_file()]
    if missing or not given.output.absolute().parent.is_dir():
        wrong = (
            f"{missing[0]}.py is not in {here}"
            if missing
            else f"{given.output}: its folder does not exist"
        )
        print(f"bench: {wrong}", file=sys.stderr)
        return 2
    results: dict[str, Any] = {"machine": machine(), "quick": given.quick, "benches": {}}
    for name in given.only:
        print(f"bench: {name} ...", file=sys.stderr)
        start = time.perf_counter()
        with get_context("spawn").Pool(
            1
        ) as own:  # a process of its own: memory that one left behind is not another's
            rows = own.apply(run_bench, (name, given.quick, given.folder))
        results["benches"][name] = {"rows": rows, "seconds": round(time.perf_counter() - start, 1)}
        draft = given.output.with_name(f".{given.output.name}.partial")
        draft.write_text(json.dumps(results, indent=1) + "\n")
        draft.replace(given.output)
    rows = [row for bench in results["benches"].values() for row in bench["rows"]]
    show(rows)
    print(f"written to {given.output}")
    return int(any(verdict(row) == "missed" for row in rows))


def run_bench(name: str, quick: bool, folder: Path | None) -> list[dict[str, Any]]:
    """Rows of one bench."""
    sys.path.insert(0, str(Path(__file__).parent))
    bench = import_module(name)
    takes_folder = "folder" in inspect.signature(bench.run).parameters
    return bench.run(quick, **({"folder": folder} if takes_folder else {}))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "load": load,
    }


def verdict(row: dict[str, Any]) -> str:
    """Whether a row keeps its aim; an aim is the most that may be, unless `aim_is` says "least"."""
    aim, value = row.get("aim"), row.get("ratio", row.get("value"))
    if aim is None or value is None:
        return ""
    return "met" if (value >= aim if row.get("aim_is") == "least" else value <= aim) else "missed"


def show(rows: list[dict[str, Any]]) -> None:
    """One table of all rows."""
    from rich.console import Console
    from rich.table import Table

    table = Table("measured", "value", "+-", "aim", "", "note")
    for row in rows:
        value, unit = row.get("ratio", row.get("value")), row.get("unit", "x")
        cell = "" if value is None else f"{value:.3g} {unit}"
        spread, aim = row.get("spread"), row.get("aim")
        note = row.get("note") or (f"against {row['against']}" if "against" in row else "")
        table.add_row(
            row["name"],
            cell,
            "" if spread is None else f"{spread:.2g}",
            "" if aim is None else f"{aim:g}",
            verdict(row),
            note,
        )
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
