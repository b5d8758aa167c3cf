"""The benches' own arithmetic, and what `run.py` says when it cannot run; the measuring itself is
`make bench`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "samples" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.delitem(sys.modules, "run", raising=False)
    return importlib.import_module("run")


def test_an_aim_is_met_or_missed(bench: ModuleType) -> None:
    assert bench.verdict({"ratio": 1.2, "aim": 1.35}) == "met"
    assert bench.verdict({"value": 1.4, "aim": 1.35}) == "missed"
    assert bench.verdict({"value": 1.4, "aim": 1.35, "aim_is": "least"}) == "met"
    assert bench.verdict({"value": 1.4, "aim": None}) == bench.verdict({"aim": 1.0}) == ""


def test_what_is_missing_is_told_before_anything_runs(
    bench: ModuleType, tmp_path: Path, monkeypatch, capsys
) -> None:
    assert bench.main(["--only", "moe", "--output", str(tmp_path / "none" / "x.json")]) == 2
    assert "its folder does not exist" in capsys.readouterr().err
    monkeypatch.setattr(bench, "BENCHES", ("nothing",))
    monkeypatch.setattr(
        bench.argparse.ArgumentParser,
        "parse_args",
        lambda self, _: bench.argparse.Namespace(
            only=["nothing"], quick=True, output=tmp_path / "x.json", folder=None
        ),
    )
    assert bench.main([]) == 2 and "nothing.py is not in" in capsys.readouterr().err


def test_rows_become_a_table_and_a_file(tmp_path: Path) -> None:
    """Each bench runs in a process of its own: what one does to its process, the next does not
    see.
    """
    shutil.copy(BENCH / "run.py", tmp_path)
    row = (
        '{"name": "a / b", "ratio": 1.25, "spread": 0.1, "aim": 1.35, "note": str("left" in '
        "vars(os))}"
    )
    for name in ("moe", "engram"):
        (tmp_path / f"{name}.py").write_text(
            f"import os\ndef run(quick):\n    found = [{row}]\n    os.left = 1\n    return found\n"
        )
    command = [
        sys.executable,
        tmp_path / "run.py",
        "--only",
        "moe",
        "engram",
        "--output",
        tmp_path / "b.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = json.loads((tmp_path / "b.json").read_text())
    rows = [said["benches"][name]["rows"][0] for name in ("moe", "engram")]
    assert [row["ratio"] for row in rows] == [1.25, 1.25] and [row["note"] for row in rows] == [
        "False",
        "False",
    ]
    assert (
        said["machine"]["torch"] and "a / b" in done.stdout and not list(tmp_path.glob(".*partial"))
    )


def test_ratios_go_round_by_round(bench: ModuleType) -> None:
    timing = importlib.import_module("timing")
    row = timing.ratio("x", [2.0, 4.0, 60.0], [1.0, 2.0, 20.0], 1.0)
    assert row["ratio"] == 2.0 and row["spread"] == pytest.approx(1.0) and timing.spread([3.0]) == 0
    turns: list[str] = []
    times = timing.by_turns({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert "".join(turns) == "ab" * 4 and [len(t) for t in times.values()] == [3, 3]


def test_each_bench_can_be_run_by_name(bench: ModuleType) -> None:
    for name in ("moe", "engram", "generation"):
        signature = inspect.signature(importlib.import_module(name).run)
        assert next(iter(signature.parameters)) == "quick"


def test_the_table_has_no_holes_and_no_nan(bench: ModuleType, tmp_path: Path) -> None:
    engram, torch = importlib.import_module("engram"), importlib.import_module("torch")
    from avdiff.core.memory_table import MappedRows

    engram.write_table(tmp_path / "t.safetensors", 5000)
    file = tmp_path / "t.safetensors"
    assert file.stat().st_blocks * 512 >= file.stat().st_size
    rows = MappedRows(file).read(torch.arange(5000)).float()
    assert rows.isfinite().all() and rows.abs().max() < 2 and len(np.unique(rows.numpy())) > 10_000
