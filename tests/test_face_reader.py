"""The face reader: its truth, its augmentation, and reading after a little training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from avdiff.corpus.face.presenter import lip_points, pose_track, render_face, sample_identity
from avdiff.evaluators import load as evaluators
from avdiff.models.evaluators.face_reader import FaceReader, crop_squares, expectation, to_pictures
from avdiff.phonetics.visemes import TARGETS, VISEMES
from avdiff.train.evaluators.faces import (
    ATTRIBUTES,
    MIRROR,
    FaceReaderTask,
    FaceStore,
    box_iou,
    degraded,
    draw_face,
    mirrored,
    moved,
    nearest_viseme,
)


def test_the_truth_about_faces_fits_the_drawing() -> None:
    rng = np.random.default_rng(4)
    for _ in range(12):
        row = draw_face(rng, None, sample_identity(rng))
        x, y, side = row["square"]
        inside = np.abs(row["points"] - (x, y)).max() / side
        left, top, right, bottom = row["box"]
        assert (
            inside < 0.5
            and left < x < right
            and top < y < bottom
            and row["picture"].shape == (128, 128, 3)
        )
    assert [VISEMES[nearest_viseme(np.array(TARGETS[name]))] for name in VISEMES] == list(VISEMES)
    assert all(set(values) for values in ATTRIBUTES.values())


def test_crops_and_expectations_are_what_they_say() -> None:
    picture = torch.rand(1, 3, 128, 128)
    square = torch.tensor([[(40 + 24) / 128, (60 + 24) / 128, 48 / 128]])
    torch.testing.assert_close(
        crop_squares(picture, square)[0], picture[0, :, 60:108, 40:88], atol=1e-5, rtol=1e-5
    )
    maps = torch.full((1, 1, 8, 8), -50.0)
    maps[0, 0, 2, 5] = 50.0
    torch.testing.assert_close(expectation(maps)[0, 0], torch.tensor([5.5 / 8, 2.5 / 8]))


def test_augmentation_moves_truth_with_the_picture() -> None:
    place = torch.tensor([0.4, 0.7])
    picture = torch.full((1, 3, 128, 128), -1.0)
    picture[
        :,
        :,
        round(0.7 * 128) - 3 : round(0.7 * 128) + 3,
        round(0.4 * 128) - 3 : round(0.4 * 128) + 3,
    ] = 1.0
    box = torch.cat([place, place])[None]
    square = torch.tensor([[0.4, 0.7, 0.3]])
    batch = {"picture": picture, "points": place.expand(1, 20, 2), "box": box, "square": square}

    def centroid(x: torch.Tensor) -> torch.Tensor:
        return expectation((x[:, :1] + 1).clamp_min(1e-9).log())[0, 0]

    start = centroid(picture)
    for changed in (
        moved(batch, torch.tensor([0.8]), torch.tensor([[0.06, -0.04]])),
        mirrored(batch, torch.tensor([True])),
    ):
        shift = changed["points"][0, 0] - place
        scale = (
            torch.tensor([-1.0, 1.0])
            if changed["points"][0, 0, 0] == 1 - place[0]
            else torch.tensor([0.8, 0.8])
        )
        expected = centroid(changed["picture"])
        torch.testing.assert_close(
            expected, place + shift + (start - place) * scale, atol=4e-3, rtol=0
        )
        torch.testing.assert_close(changed["box"][0, :2], changed["points"][0, 0])
        torch.testing.assert_close(changed["square"][0, :2], changed["points"][0, 0])
    back = mirrored(mirrored(batch, torch.tensor([True])), torch.tensor([True]))
    torch.testing.assert_close(back["points"], batch["points"])


def test_mirrored_lips_keep_their_names() -> None:
    rng = np.random.default_rng(0)
    identity, pose = sample_identity(rng), pose_track(rng, np.zeros(1))[0]
    points = lip_points(identity, np.array(TARGETS["aa"]), pose._replace(yaw=0.0, tilt=0.0, dx=0.0))
    turned = points[MIRROR.numpy()] * (-1, 1) + (1, 0)
    np.testing.assert_allclose(
        turned, points, atol=1e-5
    )  # a symmetric mouth is its own mirror image


def test_face_reader_learns_and_is_read(tmp_path: Path) -> None:
    FaceStore.build(tmp_path / "store", 24, "train", None, 0, event_share=0.1)
    store = FaceStore(tmp_path / "store")
    reader = FaceReader(ATTRIBUTES, VISEMES, (8, 16, 16), (8, 8, 16))
    task = FaceReaderTask(reader, store, store)
    batch = torch.utils.data.default_collate([store[k] for k in range(24)])
    optimizer, losses = torch.optim.AdamW(reader.parameters(), 4e-3), []
    for step in range(24):
        loss = task.loss(batch, "main", torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    assert np.mean(losses[-4:]) < 0.75 * np.mean(losses[:4])
    reader.eval()
    report = task.validate()
    assert {"clean_jaw_r", "degraded_attributes", "clean_box_iou"} <= set(report)
    reading = evaluators.read_faces(np.array(store.pictures[:6]), reader)
    assert (
        reading.points.shape == (6, 20, 2)
        and reading.mouth.shape == (6, 3)
        and len(reading.viseme) == 6
    )
    seen = reading.face > 0.5
    assert np.isfinite(reading.points[seen]).all() and np.isnan(reading.points[~seen]).all()
    wide = evaluators.read_faces(np.zeros((2, 90, 160, 3), np.uint8), reader)
    assert wide.box.shape == (2, 4)
    with pytest.raises(ValueError, match=r"needs uint8 \(F, H, W, 3\)"):
        evaluators.read_faces(np.zeros((2, 3, 8, 8), np.uint8), reader)
    with pytest.raises(ValueError, match=r"needs \(batch, 3, 128, 128\)"):
        reader.find(torch.zeros(1, 3, 64, 64))


def test_degradation_without_strength_changes_nothing() -> None:
    x = torch.rand(4, 3, 128, 128) * 2 - 1
    torch.testing.assert_close(degraded(x, torch.Generator().manual_seed(0), 0.0), x)
    assert (degraded(x, torch.Generator().manual_seed(0)) - x).abs().mean() > 0.01
    boxes = np.array([[0, 0, 1, 1], [0, 0, 0.5, 1]])
    np.testing.assert_allclose(box_iou(boxes, np.array([[0, 0, 1, 1], [0.5, 0, 1, 1]])), [1, 0])


def test_reader_marks_of_a_rendered_clip_need_no_truth() -> None:
    rng = np.random.default_rng(7)
    identity = sample_identity(rng)
    poses = pose_track(rng, np.arange(3) / 25)
    frames = np.stack([render_face(identity, np.array(TARGETS["aa"]), pose, 96) for pose in poses])
    reader = FaceReader(ATTRIBUTES, VISEMES, (8, 16, 16), (8, 8, 16)).eval()
    with torch.no_grad():
        reader.is_face.bias.fill_(20.0)
        place, mouth = reader(to_pictures(torch.from_numpy(frames)))
    assert place.box.shape == (3, 4) and mouth.viseme.shape == (3, len(VISEMES))
    reading = evaluators.read_faces(frames, reader, batch=2)
    assert set(reading.attributes) == set(ATTRIBUTES) and all(
        0 < c <= 1 for c in reading.certainty.values()
    )
    np.testing.assert_allclose(reading.box, place.box.numpy(), atol=1e-5)


def test_answers_keep_their_names_through_a_file(tmp_path: Path) -> None:
    """A config file sorts its keys: the order in which attributes were named must not matter."""
    model = FaceReader(
        {"zeal": ("a", "b"), "age": ("old", "young", "new"), "mood": ("good", "bad")}
    ).eval()
    model.save_pretrained(tmp_path)
    pictures = torch.rand(2, 3, 128, 128) * 2 - 1
    with torch.no_grad():
        before = model.find(pictures).attributes
        after = FaceReader.from_pretrained(tmp_path).eval().find(pictures).attributes
    assert {name: len(logits[0]) for name, logits in before.items()} == {
        "zeal": 2,
        "age": 3,
        "mood": 2,
    }
    assert set(after) == set(before) and all(
        torch.equal(after[name], before[name]) for name in before
    )
