"""`avdiff eval lipsync`: table, files, self-test, exit codes; the other commands are passed on."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from mixed_clips import RATE, presenter

from avdiff.cli import main as cli
from avdiff.evaluation.lipsync.self_checks import shifted
from avdiff.media.write import write_clip


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips in sync, one with the sound 8 frames late, one silent, one that is no clip."""
    place = tmp_path_factory.mktemp("clips")
    for number in range(2):
        clip = presenter(seconds=2.4, index=number)
        write_clip(place / f"good{number}.mp4", clip["frames"], 25, clip["audio"], RATE)
    write_clip(place / "late.mp4", clip["frames"], 25, shifted(clip["audio"][0], RATE, 320.0), RATE)
    write_clip(place / "silent.mp4", clip["frames"], 25, np.zeros_like(clip["audio"]), RATE)
    (place / "broken.mp4").write_bytes(b"no clip")
    (place / "notes.txt").write_text("not a clip")
    return place


def test_folder_is_measured_and_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        item for kind in ("json", "csv", "html") for item in (f"--{kind}", tmp_path / f"r.{kind}")
    ]
    assert run("lipsync", folder, "--faces", "reader", "--self-test", "--jobs", 2, *files) == 0
    said = capsys.readouterr()
    assert "5 clips: 1 error, 3 ok, 1 no_speech" in said.out and "broken.mp4: error: " in said.out
    assert (
        "self-test on 3 clips" in said.out
        and "AUC" in said.out
        and "only the reader of drawn" in said.err
    )
    report = json.loads((tmp_path / "r.json").read_text())
    rows = {Path(row["file"]).name: row for row in report["rows"]}
    assert set(rows) == {"good0.mp4", "good1.mp4", "late.mp4", "silent.mp4", "broken.mp4"}
    assert abs(rows["late.mp4"]["offset_frames"] - 8) <= 1 and len(rows["late.mp4"]["curve"]) == 61
    assert report["header"]["backend"] == "lip_network" and report["header"]["weights"]
    assert report["summary"]["status"] == {"error": 1, "ok": 3, "no_speech": 1}
    lines = list(csv.DictReader((tmp_path / "r.csv").open()))
    assert len(lines) == 5 and "curve" not in lines[0] and lines[0]["status"] == "error"
    page = (tmp_path / "r.html").read_text()
    assert all(name in page for name in rows) and "<video" in page


def test_exit_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = [folder / "good0.mp4", "--faces", "reader", "--per-face"]
    assert run("lipsync", *good, "--fail-on-offset", 2) == 0
    assert run("lipsync", *good, folder / "late.mp4", "--fail-on-offset", 2) == 1
    assert (
        run("lipsync", folder / "silent.mp4", "--faces", "reader", "--fail-on-offset", 2) == 1
    )  # nothing measured
    assert run("lipsync", folder / "silent.mp4", "--faces", "reader") == 0
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([folder / "nothing.mp4"], "no such file"),
        ([tmp_path / "empty"], "no clip there"),
        ([*good, "--backend", "ears"], "needs lip_network or syncnet"),
        ([*good, "--backend", "syncnet"], "needs --weights PATH"),
        ([*good[:1], "--faces", "mesh", "--landmarker", "x"], "no such file"),
        ([*good, "--evaluators", tmp_path], "no weights in"),
        ([], "Missing argument"),
    ):
        assert run("lipsync", *arguments) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said


def test_other_commands_are_passed_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = [folder / "good0.mp4", "--faces", "reader", "--json"]
    assert (
        run("lipsync", *one, tmp_path / "a.json") == run("lipsync", *one, tmp_path / "b.json") == 0
    )
    capsys.readouterr()
    assert run("compare", tmp_path / "a.json", tmp_path / "b.json") == 0
    assert "offset_ms" in capsys.readouterr().out
    assert run("compare", "--help") == 0 and "usage: avdiff eval compare" in capsys.readouterr().out
    assert run("compare", tmp_path / "a.json", tmp_path / "none.json") == 2
    assert run("compare", tmp_path / "a.json") == 2
