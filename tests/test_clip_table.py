"""Tables and folders as users have them: no caption is lost, no file left out without a word."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from bad_clips import CAPTION, RATE, pictures, tone
from PIL import Image
from typer.testing import CliRunner

from avdiff.cli.data import app
from avdiff.corpus.captions import parse_prompt
from avdiff.data.check import check_folder
from avdiff.data.clip_table import find_clips
from avdiff.data.clips import ClipOptions, RealClips
from avdiff.media.write import write_clip

OPTIONS = ClipOptions(buckets="128x64x25;64x64x25", words=False)


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("film") / "a.mp4"
    write_clip(path, pictures(), 25, tone(), RATE)
    return path.read_bytes()


def put(folder: Path, film: bytes, *names: str, caption: str | None = None) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(film)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")


def row(**columns: object) -> str:
    return json.dumps({"file_name": "a.mp4", "caption": CAPTION, **columns}, ensure_ascii=False)


@pytest.mark.parametrize(
    ("text", "spoken", "warned"),
    [
        ('[VISUAL]: A desk.\n[SPEECH]: She says "good morning"\n', "good morning", False),
        ('A woman\n\nA woman says "good morning"\n', "good morning", True),
        ('She says "good morning"\nA desk', "good morning", True),
        ('Says "good morning"\nShe says "good morning"', "good morning", False),
        ('\ufeffA woman says "good morning"\r\n', "good morning", False),
        ("A desk\u2028with a lamp", None, False),
    ],
)
def test_spoken_words_of_several_lines(tmp_path, film, text, spoken, warned) -> None:
    put(tmp_path, film, "a.mp4", caption=text)
    entry = find_clips(tmp_path).entries[0]
    assert parse_prompt(entry.caption)[1] == spoken and bool(entry.warnings) == warned
    if "\u2028" in text:
        assert entry.captions == (text,)


def test_rows_of_csv_lose_nothing(tmp_path, film) -> None:
    put(tmp_path, film, "a.mp4", "b.mp4", "c.mp4")
    (tmp_path / "metadata.csv").write_text(
        'video_path,caption\na.mp4,A bell, and a hand\nb.mp4,"A bell, and a hand"\n'
        f"c.mp4,{'x' * 200_000}\n"
    )
    table = find_clips(tmp_path)
    assert [entry.caption for entry in table.entries] == ["A bell, and a hand"]
    assert "3 cells for 2 columns" in table.refused["metadata.csv:2"]
    assert "no CSV" in table.refused["metadata.csv:4"]


def test_lines_of_json_end_at_line_feeds_only(tmp_path, film) -> None:
    put(tmp_path, film, "a.mp4")
    (tmp_path / "metadata.jsonl").write_text(
        "\ufeff" + row(caption="A bell\u2028is\u0085struck") + "\r\n", encoding="utf-8"
    )
    assert find_clips(tmp_path).entries[0].caption == "A bell\u2028is\u0085struck"


BAD_ROWS = {
    "caption": (row(caption=float("nan")), "has no caption"),
    "caption text": (row(caption="NaN"), "has no caption"),
    "caption number": (row(caption=5), "needs text"),
    "caption list": (row(caption=["x", 3]), "caption=3"),
    "caption long": (row(caption="x" * 20_000), "at most 10000"),
    "surrogate": ('{"file_name": "a.mp4", "caption": "A bell \\ud800"}', "lone surrogate"),
    "deep": ("[" * 100_000, "no JSON"),
    "digits": ('{"file_name": "a.mp4", "caption": ' + "1" * 5000 + "}", "too many digits"),
    "name": (row(file_name=["a.mp4"]), "file_name="),
    "name NUL": (row(file_name="a\0.mp4"), "needs a file's name"),
    "name long": (row(file_name="a" * 5000), "needs a file's name"),
    "phones text": (row(phones="abc"), "phones='abc'"),
    "phones null": (row(phones=[None]), "phones holds None"),
    "phones types": (row(phones=[["a", "x", "y"]]), "needs [symbol, start, end]"),
    "phones order": (row(phones=[["a", 1, 2], ["b", 0.5, 3]]), "in order"),
    "phones infinite": (row(phones=[["a", 0, float("inf")]]), "needs [symbol"),
    "phones huge": (row(phones=[["a", 0, 10**400]]), "needs [symbol"),
    "mouth text": (row(mouth="x"), "mouth='x'"),
    "mouth flat": (row(mouth=[1, 2]), "mouth holds 1"),
    "mouth ragged": (row(mouth=[[1, 2], [1]]), "mouth holds [1]"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_malformed_rows_are_refused_one_by_one(tmp_path, film, case) -> None:
    line, said = BAD_ROWS[case]
    put(tmp_path, film, "a.mp4", "b.mp4")
    good = json.dumps({"file_name": "b.mp4", "caption": CAPTION})
    (tmp_path / "metadata.jsonl").write_text(f"{line}\n{good}\n")
    table = find_clips(tmp_path)
    assert [entry.name for entry in table.entries] == ["b.mp4"]
    assert any(said in reason for reason in table.refused.values()), table.refused
    assert all(len(reason) < 300 and "\n" not in reason for reason in table.refused.values())


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{"video_path": "a.mp4", "caption": CAPTION}]),
        json.dumps({"a.mp4": {"caption": CAPTION}}),
        json.dumps({"a.mp4": CAPTION}),
    ],
)
def test_tables_in_one_json(tmp_path, film, text) -> None:
    put(tmp_path, film, "a.mp4")
    (tmp_path / "metadata.json").write_text(text)
    assert [entry.caption for entry in find_clips(tmp_path).entries] == [CAPTION]


def test_sound_columns_of_other_trainers(tmp_path, film) -> None:
    put(tmp_path, film, "a.mp4")
    write_clip(tmp_path / "b.wav", None, None, tone(seed=4), RATE)
    (tmp_path / "metadata.jsonl").write_text(row(audio_path="b.wav"))
    table = find_clips(tmp_path)
    assert table.entries[0].audio == tmp_path / "b.wav" and not table.left_out


def test_one_file_by_several_ways(tmp_path, film, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(Path("a"), film, "a.mp4", "b.mp4", "c.mp4")
    os.symlink("c.mp4", "a/link.mp4")
    names = [f"{tmp_path}/a/a.mp4", "../a/b.mp4", "link.mp4"]
    rows = [json.dumps({"file_name": name, "caption": CAPTION}) for name in names]
    Path("a/metadata.jsonl").write_text("\n".join(rows))
    table = find_clips("a")
    assert not table.refused and [e.name for e in table.entries] == ["a.mp4", *names[1:]]


def test_linked_folders_are_read_once(tmp_path, film) -> None:
    put(tmp_path / "k", film, "a.mp4", caption=CAPTION)
    put(tmp_path / "l", film, "b.mp4", caption=CAPTION)
    os.symlink("../k", tmp_path / "l" / "k")
    os.symlink("../l", tmp_path / "k" / "back")
    assert [entry.name for entry in find_clips(tmp_path / "l").entries] == ["b.mp4", "k/a.mp4"]


@pytest.mark.parametrize(
    "name", ["12:30:05.mp4", "-x.mp4", "[red]a[bold].mp4", "pipe:0.mp4", "ü €.mp4"]
)
def test_any_name_works(tmp_path, film, monkeypatch, name) -> None:
    put(tmp_path, film, name, caption=CAPTION)
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["check", ".", "--codec", "none"])
    assert done.exit_code == 0 and "1 good, 0 refused" in done.output and name in done.output
    write_clip(name, pictures(0.2), 25)
    assert sorted(os.listdir()) == sorted([name, Path(name).with_suffix(".txt").name])


def test_names_that_are_not_utf8(tmp_path, film) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    put(tmp_path, film, name, caption=CAPTION)
    assert check_folder(tmp_path).good == [name]
    assert "audio" in RealClips(tmp_path, OPTIONS)[0]


def test_files_that_are_no_clips_are_left_out_and_named(tmp_path, film) -> None:
    put(tmp_path, film, "a.mp4", caption=CAPTION)
    others = ["README.md", "LICENSE", ".DS_Store", "readme.txt", "a.json", "notes.pdf", "a.jpg"]
    for name in others:
        (tmp_path / name).write_text("x")
    Image.fromarray(pictures(0.04)[0]).save(tmp_path / "cover.png")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "b.mp4").write_text("x")
    report = check_folder(tmp_path)
    assert report.exit_code == 0 and set(report.left_out) == {*others, "cover.png", ".git"}
    done = CliRunner().invoke(app, ["check", str(tmp_path), "--codec", "none"])
    assert all(f"{name}: left out: " in done.output for name in report.left_out)


def test_names_stay_whole_at_80_columns(tmp_path, film) -> None:
    name = "presenter_0123_take_4b.mp4"
    put(tmp_path, film, name, caption=CAPTION)
    done = CliRunner().invoke(
        app, ["check", str(tmp_path), "--codec", "none"], env={"COLUMNS": "80"}
    )
    rows = [line for line in done.output.splitlines() if name in line and "good" in line]
    assert len(rows) == 1 and len(rows[0]) <= 80


def test_stills_are_clips_of_one_picture(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = pictures(0.04, size=(128, 64), seed=3)[0]
    Image.fromarray(picture).save(tmp_path / "a.jpg", exif=exif, quality=95)
    Image.fromarray(pictures(0.04, size=(70, 64))[0]).save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("A red disc")
    (tmp_path / "b.txt").write_text("A disc")
    clips = RealClips(tmp_path, OPTIONS)
    assert [clips.modalities(i) for i in (0, 1)] == [("video",)] * 2
    assert clips.clip(0).num_frames == 1 and (clips.clip(0).width, clips.clip(0).height) == (
        128,
        64,
    )
    item = clips[0]
    assert item["video"].shape == (1, 64, 128, 3) and "audio" not in item
    wanted = np.rot90(picture, -1).astype(int)
    assert np.abs(item["video"][0].numpy() - wanted).mean() < 6
    assert clips[1]["video"].shape == (1, 64, 64, 3)
    report = check_folder(tmp_path)
    assert report.exit_code == 0 and report.clips[0].width == 128
    assert not any("sound" in warning for clip in report.clips for warning in clip.warnings)
