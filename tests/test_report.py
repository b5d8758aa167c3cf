"""Reports: summaries, intervals, files, the page, and the comparison of two runs."""

from __future__ import annotations

import csv
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from avdiff.evaluation.report.report import (
    compare,
    interval,
    print_comparison,
    print_rows,
    print_summary,
    read_report,
    summarise,
    worst_first,
    write_reports,
)
from avdiff.media.write import write_clip

ROWS = [
    {
        "file": "a.mp4",
        "status": "ok",
        "error": "",
        "offset_ms": 10.0,
        "words": 10,
        "word_errors": 1,
        "within": True,
    },
    {
        "file": "b.mp4",
        "status": "ok",
        "error": "",
        "offset_ms": -90.0,
        "words": 2,
        "word_errors": 2,
        "within": False,
    },
    {
        "file": "c.mp4",
        "status": "no_face",
        "error": "no face in 40 frames",
        "offset_ms": float("nan"),
    },
]


def test_interval_of_the_mean_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        found = interval(rng.normal(5.0, 2.0, 40), resamples=300, seed=trial)
        assert found.low <= found.mean <= found.high
        covered += found.low <= 5.0 <= found.high
    assert (
        178 <= covered <= 199
    )  # 95 % of 200, with room for chance and the bootstrap's small shortfall


def test_interval_of_one_clip_and_of_nothing() -> None:
    assert interval([3.0]).mean == 3.0
    assert math.isnan(interval([3.0]).low)
    assert math.isnan(interval([0.0, 0.0], [0.0, 0.0]).mean)
    with pytest.raises(ValueError, match="one length above 0"):
        interval([])


def test_summary_counts_every_clip_and_divides_sums() -> None:
    summary = summarise(ROWS)
    assert summary["clips"] == 3
    assert summary["status"] == {"ok": 2, "no_face": 1}
    numbers = summary["numbers"]
    assert numbers["wer"].mean == pytest.approx(3 / 12)  # not the mean of 0.1 and 1.0
    assert numbers["offset_ms"].mean == pytest.approx(-40)
    assert numbers["offset_ms"].n == 2
    assert numbers["within"].mean == 0.5
    assert "words" not in numbers


def test_failures_come_first_then_the_worst() -> None:
    assert [row["file"] for row in worst_first(ROWS)] == ["c.mp4", "b.mp4", "a.mp4"]
    scored = [{"file": str(i), "score": s} for i, s in enumerate((0.5, 0.1, 0.9))]
    assert [row["file"] for row in worst_first(scored)] == ["1", "0", "2"]
    assert [row["file"] for row in worst_first(ROWS, "word_errors")] == ["c.mp4", "b.mp4", "a.mp4"]


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    rows = [{**row, "curve": [0.1, float("nan")], "odd": np.float32(0.5)} for row in ROWS]
    header = {"backend": "lip_network", "weights": "abc", "score": float("inf")}
    write_reports(rows, header, json=tmp_path / "deep" / "r.json", csv=tmp_path / "r.csv")
    saved = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert saved["header"] == {"backend": "lip_network", "weights": "abc", "score": None}
    assert saved["rows"][2]["offset_ms"] is None
    assert saved["rows"][0]["curve"] == [0.1, None]
    assert saved["summary"]["numbers"]["offset_ms"]["n"] == 2
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["status"] for line in lines] == ["ok", "ok", "no_face"]
    assert lines[1]["offset_ms"] == "-90.0"
    assert lines[2]["offset_ms"] == ""
    assert "curve" not in lines[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "r.csv"]  # nothing is left aside


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))


def test_page_stands_alone(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    sound = (0.1 * np.sin(np.arange(11520) / 9)).astype(np.float32)
    write_clip(tmp_path / "one clip.mp4", frames, 25, sound, 24000)
    rows = [
        {
            "file": str(tmp_path / ("one clip.mp4")),
            "status": "ok",
            "error": "",
            "offset_ms": 40.0,
            "offset_frames": 1.0,
            "prompt": '<script>alert("x")</script>',
            "mouth_curve": [0.1] * 5 + [None] + [0.8] * 6,
            "expected_curve": np.linspace(0, 1, 12),
        },
        {"file": str(tmp_path / "gone.mp4"), "status": "error", "error": "<b>cut short</b>"},
    ]
    write_reports(rows, {"backend": "lip & network"}, html=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    parsed = Page()
    parsed.feed(text)
    kinds = [tag for tag, _ in parsed.tags]
    assert "track" not in kinds and "b" not in kinds and "link" not in kinds
    sources = [attrs["src"] for _, attrs in parsed.tags if "src" in attrs]
    assert sources and all(source.startswith("data:") for source in sources)
    assert "http" not in text
    assert "prefers-color-scheme:dark" in text
    assert (
        kinds.count("polyline") == 6
    )  # two runs around the gap and one whole curve, each with its outline
    assert "lip &amp; network" in text and "cut short" in text
    assert text.index("gone.mp4") < text.index("one clip.mp4</h2>")


def test_large_clips_are_linked_relative_to_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("avdiff.evaluation.report.page.EMBEDDED", 10)
    frames = np.zeros((5, 64, 64, 3), np.uint8)
    (tmp_path / "clips").mkdir()
    write_clip(tmp_path / "clips" / "a b.mp4", frames, 25, np.zeros(4800, np.float32), 24000)
    write_reports(
        [{"file": str(tmp_path / "clips" / "a b.mp4")}], {}, html=tmp_path / "pages" / "r.html"
    )
    assert 'src="../clips/a%20b.mp4"' in (tmp_path / "pages" / "r.html").read_text()


def test_pairing_finds_a_difference_that_the_spread_of_clips_would_hide() -> None:
    rng = np.random.default_rng(1)
    hard = rng.normal(0, 10, 50)
    a = [{"file": f"x/{i}.mp4", "score": hard[i]} for i in range(50)]
    b = [
        {"file": f"y/{i}.mp4", "score": hard[i] + 1 + rng.normal(0, 0.3)} for i in range(49, -1, -1)
    ]
    (found,) = compare(a, b)
    assert found.key == "score"
    assert found.difference.mean == pytest.approx(1.0, abs=0.2)
    assert found.clear and found.difference.low > 0.8
    apart = interval([row["score"] for row in a])
    assert apart.high - apart.low > 2  # the clips alone would not have told


def test_comparison_of_ratios_and_of_reports_on_disk(tmp_path: Path) -> None:
    first = [{"id": str(i), "words": 5, "word_errors": i % 2} for i in range(10)]
    second = [{"id": str(i), "words": 5, "word_errors": 2} for i in range(12)]
    write_reports(first, {}, json=tmp_path / "a.json")
    write_reports(second, {}, json=tmp_path / "b.json")
    (found,) = compare(tmp_path / "a.json", tmp_path / "b.json")
    assert (found.key, found.a, found.b) == ("wer", pytest.approx(0.1), pytest.approx(0.4))
    assert found.difference.n == 10
    assert read_report(tmp_path / "a.json")[3] == {"id": "3", "words": 5, "word_errors": 1}
    print_comparison([found])


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no clip in common"):
        compare([{"file": "a", "x": 1}], [{"file": "b", "x": 1}])
    with pytest.raises(ValueError, match="a name of its own"):
        compare([{"file": "a"}, {"file": "z/a"}], [{"file": "a"}])
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no JSON report"):
        compare(tmp_path / "bad.json", [{"file": "a"}])


def test_tables_say_it_all(capsys: pytest.CaptureFixture) -> None:
    print_rows(ROWS)
    print_summary(summarise(ROWS), {"weights": "abc [not markup]"})
    shown = capsys.readouterr().out
    assert "no face in 40 frames" in shown
    assert "3 clips: 2 ok, 1 no_face" in shown
    assert "abc [not markup]" in shown
