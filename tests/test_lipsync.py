"""Lip-sync of files and clips: times, tracks, the sign of the offset, statuses, recovery, and the
reward.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from bad_clips import mux, pictures, tone
from mixed_clips import NTSC, RATE, make_mixed, music, presenter

from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluation.lipsync import landmarker
from avdiff.evaluation.lipsync.backends import LipNetworkBackend, find_backend
from avdiff.evaluation.lipsync.bench import main as bench
from avdiff.evaluation.lipsync.face_tracks import (
    Face,
    Followed,
    MeshSource,
    Pictures,
    Track,
    Tracker,
    distinct,
    find_sources,
    overlap,
    square,
)
from avdiff.evaluation.lipsync.measure import (
    STATUSES,
    LipSync,
    face_rows,
    margin,
    mouth_curve,
    score,
)
from avdiff.evaluation.lipsync.self_checks import SHIFTS, recovery, shift_clip, shifted, swap_auc
from avdiff.evaluation.metrics import speech_share
from avdiff.evaluators.load import SyncCurve
from avdiff.media.frames import read_sound, walk_pictures
from avdiff.media.write import Clip, MediaError, read_clip, write_clip
from avdiff.train.evaluators.lips import HeldOut, held_out_clips


@cache
def evaluator() -> LipSync:
    """The bundled evaluators, faces by the drawn-face reader."""
    return LipSync(faces="reader")


@cache
def spoken() -> tuple[HeldOut, ...]:
    """Sound with the drawing's own lips: one long passage and three short ones."""
    bank = SpeechCorpus(REPO_BANK, languages=["en", "it"])
    return (
        *held_out_clips(bank, "train", 1, seconds=27.0),
        *held_out_clips(bank, "train", 3, seconds=3.0, seed=1),
    )


def as_track(clip: HeldOut) -> Track:
    return Track(
        clip.times, clip.points, np.tile(np.array((0.0, 0.0, 60.0, 80.0)), (len(clip.times), 1))
    )


class Known:
    """A source of faces that are known, for sound and lips without pictures."""

    name = "known"

    def __init__(self, *tracks: Track) -> None:
        self.tracks = list(tracks)

    def header(self) -> dict[str, str]:
        return {"landmarks": "known"}

    def follow(self, pictures: Pictures) -> Followed:
        times = [time for time, _ in pictures]
        return Followed(self.tracks, len(times), times[-1], self.name)


def blank(clip: HeldOut) -> Clip:
    """The sound of a held-out clip with empty pictures."""
    return Clip(
        np.zeros((len(clip.times), 8, 8, 3), np.uint8), clip.sound[None], Fraction(25), RATE
    )


# -------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize(("fps", "step"), [(24, 1), (NTSC, 1), (30, 1), (50, 2), (60, 2)])
def test_pictures_keep_their_times(tmp_path: Path, fps: Fraction | int, step: int) -> None:
    write_clip(tmp_path / "a.mp4", pictures(1.0, float(fps)), fps, tone(1.0), RATE)
    walked = list(walk_pictures(tmp_path / "a.mp4"))
    whole = read_clip(tmp_path / "a.mp4").frames
    assert whole is not None
    np.testing.assert_allclose(
        [time for time, _ in walked],
        [(i + 0.5) / float(fps) for i in range(0, len(whole), step)],
        atol=1e-5,
    )
    np.testing.assert_array_equal(np.stack([picture for _, picture in walked]), whole[::step])


def test_uneven_times_and_late_sound_come_through(tmp_path: Path) -> None:
    times = [Fraction(int(t), 25) for t in np.cumsum([0, 1, 2, 1, 1, 4, 1, 3, 2, 1])]
    sound = tone(0.8)
    mux(tmp_path / "a.mkv", pictures()[: len(times)], times, sound, late=0.3, codec="pcm_f32le")
    found = [time for time, _ in walk_pictures(tmp_path / "a.mkv")]
    np.testing.assert_allclose(np.diff(found), np.diff([float(time) for time in times]), atol=2e-3)
    assert 0 < found[0] < 0.05
    heard = read_sound(tmp_path / "a.mkv")
    assert heard is not None and heard[1] == RATE
    assert not heard[0][: round(0.29 * RATE)].any()
    np.testing.assert_allclose(heard[0][round(0.3 * RATE) :][:9000], sound[0, :9000], atol=1e-4)


def test_large_pictures_shrink_and_broken_files_are_named(tmp_path: Path) -> None:
    write_clip(tmp_path / "wide.mp4", pictures(0.2, size=(180, 320)), 25, None)
    assert next(walk_pictures(tmp_path / "wide.mp4", longest_side=64))[1].shape == (36, 64, 3)
    assert read_sound(tmp_path / "wide.mp4") is None
    (tmp_path / "none.mp4").write_bytes(b"")
    for read in (lambda p: list(walk_pictures(p)), read_sound):
        with pytest.raises(MediaError, match="cannot be read as media"):
            read(tmp_path / "none.mp4")


# ------------------------------------------------------------------------------------------- tracks
def face(left: float, top: float, size: float = 40) -> Face:
    return Face(np.full((20, 2), left), np.array((left, top, left + size, top + size)))


def test_tracker_joins_what_overlaps() -> None:
    assert overlap(face(0, 0).box, face(20, 0).box) == pytest.approx(1 / 3)
    assert overlap(face(0, 0).box, face(50, 0).box) == 0
    tracker = Tracker()
    for i in range(50):
        faces = [face(200 - i, 5), face(i, 0)] if i % 2 else [face(i, 0), face(200 - i, 5)]
        tracker.add(i / 25, faces[: 1 if i == 30 else 2])
    for i in range(3):
        tracker.add(4.0 + i / 25, [face(49, 0)])  # back after two seconds: another track
    lengths = [len(track.times) for track in tracker.tracks()]
    assert lengths == [50, 49, 3]
    first = tracker.tracks()[0]
    np.testing.assert_allclose(first.boxes[:, 0], np.arange(50))
    assert first.face_width == 40
    assert len(distinct([face(0, 0), face(4, 2), face(100, 0)])) == 2


class SquareFinder:
    """In place of MediaPipe: white squares, which it misses if they fill less than a third of a
    picture's height.
    """

    version, weight_hash = "1", "0"

    def detect(self, picture: np.ndarray) -> np.ndarray:
        rows, columns = np.nonzero(picture[..., 0] > 200)
        if not len(rows) or np.ptp(rows) + 1 < picture.shape[0] / 3:
            return np.zeros((0, 478, 2), np.float32)
        corners = np.array(
            [(columns.min(), rows.min()), (columns.max() + 1, rows.max() + 1)], np.float32
        )
        return np.linspace(corners[0], corners[1], 478, dtype=np.float32)[None]


def test_small_faces_are_found_by_tiles_and_then_followed() -> None:
    source = MeshSource.__new__(MeshSource)
    source.landmarker = SquareFinder()  # type: ignore[assignment]

    def film() -> Pictures:
        for i in range(40):
            picture = np.zeros((200, 320, 3), np.uint8)
            if i >= 4:
                picture[30 + i // 4 : 62 + i // 4, 200 + i : 232 + i] = 255
            yield (i + 0.5) / 25, picture

    followed = source.follow(film())
    assert (
        followed.pictures == 40
        and followed.seconds == pytest.approx(39.5 / 25)
        and len(followed.tracks) == 1
    )
    track = followed.tracks[0]
    assert len(track.times) >= 40 - 2 * 12 and track.times[-1] == pytest.approx(39.5 / 25)
    np.testing.assert_allclose(track.boxes[-1], (239, 39, 271, 71), atol=1)


def test_square_is_cut_and_filled() -> None:
    picture = np.arange(60, dtype=np.uint8).reshape(1, 60, 1).repeat(40, 0).repeat(3, 2)
    np.testing.assert_array_equal(
        square(picture, np.array((30.0, 20.0)), 5, 10)[0, :, 0], np.arange(25, 35)
    )
    edge = square(picture, np.array((0.0, 0.0)), 4, 8)
    assert (
        (edge[:4] == 110).all()
        and (edge[:, :4] == 110).all()
        and (edge[4:, 4:, 0] == np.arange(4)).all()
    )


# ------------------------------------------------------------------------------ weights of the mesh
def test_landmarker_is_found_or_fetched_by_its_hash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(landmarker.VARIABLE, raising=False)
    assert landmarker.find_landmarker() is None
    with pytest.raises(ValueError, match=r"needs a face_landmarker\.task: --landmarker PATH"):
        find_sources(wanted="mesh")
    weights = tmp_path / "source.task"
    weights.write_bytes(b"weights")
    right = hashlib.sha256(b"weights").hexdigest()
    target = landmarker.cached_file()
    with pytest.raises(ValueError, match="has SHA-256"):
        landmarker.fetch(weights.as_uri(), "0" * 64, target)
    with pytest.raises(ValueError, match="cannot be fetched"):
        landmarker.fetch((tmp_path / "nothing").as_uri(), right, target)
    assert not target.exists()
    assert (
        landmarker.fetch(weights.as_uri(), right, target) == target == landmarker.find_landmarker()
    )
    assert landmarker.find_landmarker("download") == target  # it is here: nothing is fetched
    monkeypatch.setenv(landmarker.VARIABLE, str(weights))
    assert landmarker.find_landmarker() == weights and landmarker.find_landmarker(target) == target
    with pytest.raises(ValueError, match=r"landmarker=nowhere\.task: no such file"):
        landmarker.find_landmarker("nowhere.task")
    with pytest.raises(ValueError, match="is no face landmarker"):
        MeshSource(weights)
    with pytest.raises(ValueError, match="needs auto, mesh or reader"):
        find_sources(wanted="eyes")


# ------------------------------------------------------------------------------------------- speech
def test_speech_is_told_from_other_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    speech = spoken()[1].sound
    assert speech_share.speech_mask(speech, RATE).mean() > 0.4
    assert speech_share.speech_mask(music(3.0), RATE).mean() < 0.1
    assert not speech_share.speech_mask(np.zeros(RATE, np.float32), RATE).any()
    assert speech_share.detector().startswith("silero-vad")
    monkeypatch.setattr(speech_share, "_installed", lambda: False)
    assert speech_share.detector().startswith("loudness alone")
    assert speech_share.speech_mask(speech, RATE).mean() > 0.4
    assert not speech_share.speech_mask(np.zeros(RATE, np.float32), RATE).any()


# ---------------------------------------------------------------------------------- the measurement
@pytest.mark.parametrize("late", [-6, 4])
def test_offset_is_positive_when_the_audio_is_late(tmp_path: Path, late: int) -> None:
    clip = presenter(seconds=3.0)
    sound = shifted(clip["audio"][0], RATE, late * 40.0)
    write_clip(tmp_path / "a.mp4", clip["frames"], 25, sound, RATE)
    row = evaluator().measure(tmp_path / "a.mp4").row
    assert row["status"] == "ok" and row["offset_frames"] == pytest.approx(late, abs=1.0)
    assert row["offset_ms"] == pytest.approx(40 * row["offset_frames"])
    assert row["score"] > row["score_at_zero"] and len(row["curve"]) == len(row["lags_ms"]) == 61
    assert (
        row["curve"][30] == pytest.approx(row["score_at_zero"], abs=1e-4)
        and row["lags_ms"][30] == 0
    )
    assert (
        row["face_coverage"] == 1 and row["speech_coverage"] > 0.3 and len(row["mouth_curve"]) == 75
    )
    memory = evaluator().measure(Clip(clip["frames"], sound[None], Fraction(25), RATE), "mine").row
    assert memory["file"] == "mine" and memory["offset_ms"] == pytest.approx(
        row["offset_ms"], abs=15
    )


def test_score_falls_with_delay_and_has_a_value_without_a_face() -> None:
    clip = presenter(seconds=3.0)

    def of(late_ms: float, frames: np.ndarray = clip["frames"]) -> float:
        return score(
            Clip(frames, shifted(clip["audio"][0], RATE, late_ms)[None], Fraction(25), RATE),
            evaluator(),
        )

    assert of(0) > 0.2 and of(0) > of(120) + 0.05 and of(0) > of(400) + 0.1
    assert score(Clip(None, clip["audio"], None, RATE), evaluator(), missing=-1.0) == -1.0
    assert score("nowhere.mp4", evaluator()) == 0.0


def test_the_speaker_is_chosen_among_faces() -> None:
    one, two = spoken()[1:3]
    faces = LipSync(faces=Known(as_track(two), as_track(one)), backend=evaluator().backend)
    row = faces.measure(blank(one)).row
    assert (
        row["status"] == "ok"
        and row["face"] == 2
        and row["faces"] == 2
        and abs(row["offset_frames"]) <= 1
    )
    assert [track["face"] for track in row["tracks"]] == [1, 2]
    spread = face_rows([row, {"file": "b.mp4", "status": "error", "error": "x"}])
    assert [line.get("id") for line in spread] == ["clip face 1", None, None]
    assert "curve" not in spread[0] and "curve" in spread[1] and "tracks" not in spread[1]


def test_long_films_are_judged_in_windows_and_drift_is_seen() -> None:
    clip = spoken()[0]
    windows = evaluator().backend.curves(as_track(clip), shifted(clip.sound, RATE, 120.0), RATE)
    assert windows.starts == [0.0, 10.0, 20.0] and windows.whole.offset == pytest.approx(
        0.12, abs=0.03
    )
    drifting = np.concatenate(
        [
            shifted(clip.sound, RATE, late)[round(a * RATE) : round(b * RATE)]
            for late, a, b in ((0.0, 0, 10), (120.0, 10, 20), (240.0, 20, 27))
        ]
    )
    offsets = [
        part.offset for part in evaluator().backend.curves(as_track(clip), drifting, RATE).parts
    ]
    np.testing.assert_allclose(offsets, (0.0, 0.12, 0.24), atol=0.04)
    track = as_track(clip)
    away = Track(
        track.times[:200], track.points[:200], track.boxes[:200]
    )  # in view for eight seconds of 27
    assert len(evaluator().backend.curves(away, clip.sound, RATE).parts) == 1


def test_margin_tells_where_two_offsets_fit() -> None:
    lags, scores = np.arange(-30, 31) / 50, np.zeros(61)
    scores[[28, 30, 45]] = 0.45, 0.5, 0.4
    assert margin(SyncCurve(lags, scores, 2.0)) == pytest.approx(0.1)


def test_statuses_say_why() -> None:
    clip = spoken()[1]
    track = as_track(clip)
    small = Track(track.times, track.points / 4, track.boxes / 4)
    early = Track(track.times[:15], track.points[:15], track.boxes[:15])
    quiet = np.concatenate([np.zeros(RATE, np.float32), clip.sound[RATE:]])
    for tracks, sound, status in (
        ((), clip.sound, "no_face"),
        ((small,), clip.sound, "small_face"),
        ((track,), 0 * clip.sound, "no_speech"),
        ((early,), quiet, "no_speech"),
        ((track,), clip.sound[:RATE], "too_short"),
        ((track,), clip.sound, "ok"),
    ):
        shown = blank(clip)
        film = Clip(shown.frames, sound[None], shown.fps, RATE)
        row = LipSync(faces=Known(*tracks), backend=evaluator().backend).measure(film).row
        assert row["status"] == status and (row["error"] == "") == (status == "ok"), row
    with pytest.raises(ValueError, match="jobs=0"):
        evaluator().rows([], jobs=0)


def test_mouth_curve_is_the_gap_of_the_inner_lips() -> None:
    track = as_track(spoken()[1])
    away = Track(track.times[:50], track.points[:50], track.boxes[:50])
    curve = mouth_curve(away, 3.0)
    assert len(curve) == 75 and curve[60:] == [None] * 15 and None not in curve[:50]
    gap = np.linalg.norm(track.points[7, 18] - track.points[7, 14]) / away.mouth_width
    assert curve[7] == pytest.approx(gap, abs=1e-3)


# --------------------------------------------------------------------------------------- the checks
def test_planted_shifts_are_recovered_and_swaps_told_apart() -> None:
    backend = evaluator().backend
    faces = [
        LipSync(faces=Known(as_track(clip)), backend=backend).measure(blank(clip))
        for clip in spoken()[1:]
    ]
    metrics = recovery([shift_clip(clip, backend) for clip in faces])
    assert (
        metrics["absolute_1"].mean == metrics["relative_1"].mean == 1.0
        and metrics["absolute_1"].n == 3
    )
    assert set(metrics["by_shift"]) == set(SHIFTS)
    assert swap_auc(faces, evaluator().backend)["auc_zero"].mean > 0.9
    with pytest.raises(ValueError, match="needs at least 2"):
        swap_auc(faces[:1], evaluator().backend)


def test_recovery_counts_by_hand() -> None:
    metrics = recovery(
        [[-2.0, 1.0, 4.2], [-3.0, 0.0, None]], shifts=(-3, 0, 3)
    )  # off by (1, 1, 1.2) and (0, 0, -)
    assert metrics["absolute_1"].mean == pytest.approx(4 / 6) and metrics[
        "absolute_2"
    ].mean == pytest.approx(5 / 6)
    assert metrics["relative_1"].mean == pytest.approx(3 / 4) and metrics["zero_1"].mean == 1
    assert metrics["by_shift"][3] == (0.0, 0.5)
    with pytest.raises(ValueError, match="needs 0 among them"):
        recovery([[1.0]], shifts=(1,))
    late = shifted(np.arange(1, 6, dtype=np.float32), 1000, 2.0)
    assert late.tolist() == [0, 0, 1, 2, 3] and shifted(late, 1000, -2.0).tolist() == [
        1,
        2,
        3,
        0,
        0,
    ]


def test_backends_are_named() -> None:
    assert isinstance(find_backend(), LipNetworkBackend)
    for words, name, quirks, reach in (
        ("needs lip_network or syncnet", "ears", False, 0.6),
        ("needs --weights PATH", "syncnet", False, 0.6),
        ("are for backend=syncnet", "lip_network", True, 0.6),
        ("needs 0.2 to 2 seconds", "lip_network", False, 9.0),
    ):
        with pytest.raises(ValueError, match=words):
            find_backend(name, quirks=quirks, reach=reach)
    header = evaluator().header()
    assert (
        header["backend"] == "lip_network"
        and len(header["weights"]) == 12
        and "audio late" in header["offset"]
    )


def test_bench_on_presenters(tmp_path: Path) -> None:
    metrics = bench(
        [
            "--clips",
            "2",
            "--faces",
            "reader",
            "--seconds",
            "2.4",
            "--json",
            str(tmp_path / "m.json"),
        ]
    )
    assert (
        metrics["status"] == {"ok": 2}
        and metrics["absolute_1"].mean >= 0.85
        and metrics["times_real_time"] > 0
    )
    assert (tmp_path / "m.json").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no clip"):
        bench(["--folder", str(tmp_path / "empty"), "--faces", "reader"])


def test_every_clip_of_a_mixed_folder_has_a_row_and_a_status(tmp_path: Path) -> None:
    expected = make_mixed(tmp_path / "clips")
    paths = [tmp_path / "clips" / name for name in expected]
    assert len(paths) >= 40
    rows = [clip.row for clip in evaluator().rows(paths, jobs=2)]
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    for row in rows:
        name = Path(row["file"]).name
        assert row["status"] == (expected[name] or row["status"]), (
            name,
            row["status"],
            row["error"],
        )
        assert row["status"] in STATUSES and (row["error"] == "") == (row["status"] == "ok")
        if expected[name] == "ok":
            assert abs(row["offset_frames"]) <= 1.5, (name, row["offset_frames"])
    counts = Counter(row["status"] for row in rows)
    assert {"ok", "no_face", "no_speech", "too_short", "error"} <= set(
        counts
    ) and counts.total() == len(paths)
