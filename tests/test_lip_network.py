"""Lips against sound: geometry, lags and their sign, and planted offsets found after a little
training.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from avdiff.corpus.face.mouth import CANVAS, MOUTH, head_matrix
from avdiff.corpus.face.presenter import lip_points, pose_track, sample_identity
from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluators import load as evaluators
from avdiff.models.evaluators.lip_network import (
    FACE_MESH_LIPS,
    LipNetwork,
    lag_scores,
    lips_of_mesh,
    lips_on_clock,
    normalise_lips,
)
from avdiff.train.evaluators.lips import (
    LipNetworkTask,
    LipPairs,
    held_out_clips,
    lip_tracks,
    measure_lip_network,
    rank_auc,
)

RATE = 24000


@cache
def bank() -> SpeechCorpus:
    return SpeechCorpus(REPO_BANK, languages=["en", "it"])


def tiny_network() -> LipNetwork:
    return LipNetwork(width=32, kernel=7, layers=2, embedding=24, dropout=0.0)


def test_lip_tracks_are_the_drawing_s_lip_points() -> None:
    rng = np.random.default_rng(1)
    identity, mouths = sample_identity(rng), rng.random((7, 6)).astype(np.float32)
    pose = pose_track(rng, np.zeros(1), liveliness=0.0)[0]._replace(yaw=0.0, pitch=0.0)
    matrix = head_matrix(identity, pose)
    placed = (((lip_tracks(identity, mouths) + MOUTH) @ matrix[:, :2].T) + matrix[:, 2]) / CANVAS
    slow = np.stack([lip_points(identity, mouth, pose) for mouth in mouths])
    np.testing.assert_allclose(placed, slow, atol=2e-6)


def test_normalised_lips_forget_place_size_and_tilt() -> None:
    rng = np.random.default_rng(2)
    points = lip_tracks(sample_identity(rng), rng.random((30, 6)))
    angle = 0.3
    turn = np.array(((np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))))
    moved_points = points @ turn.T * 3.7 + rng.normal(0, 5, (30, 1, 2))
    plain = normalise_lips(points)
    np.testing.assert_allclose(normalise_lips(moved_points), plain, atol=1e-4)
    points[3] = np.nan
    assert (
        np.isnan(normalise_lips(points)[3]).all() and np.isfinite(normalise_lips(points)[4]).all()
    )
    assert len(FACE_MESH_LIPS) == len({i for ids in FACE_MESH_LIPS for i in ids[:1]}) == 20
    assert lips_of_mesh(np.zeros((2, 478, 3))).shape == (2, 20, 2)


def test_lips_on_the_clock_at_any_frame_rate() -> None:
    identity = sample_identity(np.random.default_rng(3))

    def track(times: np.ndarray) -> np.ndarray:
        mouths = np.full((len(times), 6), 0.3)
        mouths[:, 0] = 0.5 + 0.4 * np.sin(2 * np.pi * 1.5 * times)
        return lip_tracks(identity, mouths)

    rows = []
    for fps in (23.976, 30.0, 60.0):
        times = (np.arange(int(2 * fps)) + 0.5) / fps
        features, seen = lips_on_clock(track(times), times, 2.0)
        assert features.shape == (100, 40) and seen[2:-3].all()
        rows.append(
            features[3:-4] - features[3:-4].mean(axis=0)
        )  # the median shape depends on the pictures a little
    assert (
        max(np.abs(rows[0] - rows[2]).max(), np.abs(rows[1] - rows[2]).max())
        < 0.15 * np.abs(rows[2]).max()
    )
    times = np.arange(50) / 25
    points = track(times)
    points[10:25] = np.nan  # 0.6 s without a face
    _, seen = lips_on_clock(points, times, 2.0)
    assert not seen[20:47].any() and seen[:17].all() and seen[52:-1].all()
    with pytest.raises(ValueError, match="ascending"):
        lips_on_clock(points, times[::-1], 2.0)
    with pytest.raises(ValueError, match=r"needs \(F, 20, 2\)"):
        lips_on_clock(points[:, :4], times, 2.0)


def test_lag_scores_and_curve_are_the_plain_loops() -> None:
    rng = np.random.default_rng(5)
    seen, heard = rng.normal(size=(2, 9, 4)), rng.normal(size=(2, 15, 4))
    product, power = lag_scores(torch.from_numpy(seen), torch.from_numpy(heard), 3)
    for b, t, lag in np.ndindex(2, 9, 7):
        assert float(product[b, t, lag]) == pytest.approx(seen[b, t] @ heard[b, t + lag])
        assert float(power[b, t, lag]) == pytest.approx(heard[b, t + lag] @ heard[b, t + lag])
    mask = rng.random(12) < 0.8
    lips, sound = rng.normal(size=(12, 4)), rng.normal(size=(12, 4))
    curve = evaluators.lag_curve(lips, mask, sound, 4)
    for lag in range(-4, 5):
        pairs = [(t, t + lag) for t in range(12) if 0 <= t + lag < 12 and mask[t]]
        top = sum(lips[a] @ sound[b] for a, b in pairs)
        below = sum(lips[a] @ lips[a] for a, _ in pairs) * sum(
            sound[b] @ sound[b] for _, b in pairs
        )
        assert curve[lag + 4] == pytest.approx(top / np.sqrt(below), abs=1e-6)


@given(st.integers(-20, 20))
def test_late_audio_has_a_positive_offset(late: int) -> None:
    vectors = np.random.default_rng(6).normal(size=(120, 8))
    sound = np.roll(vectors, late, axis=0)  # what the lips say at t is heard at t + late
    curve = evaluators.SyncCurve(
        np.arange(-30, 31) / 50, evaluators.lag_curve(vectors, np.ones(120, bool), sound, 30), 2.4
    )
    assert curve.offset == pytest.approx(late / 50, abs=0.004)
    assert (
        curve.score > 0.9
        and curve.confidence > 0.5
        and (late == 0) == (curve.score_at_zero == curve.score)
    )


def test_lip_network_finds_planted_offsets_after_a_little_training() -> None:
    pairs = LipPairs(bank(), frames=80, reach=20)
    clips = held_out_clips(bank(), "train", 6, seconds=3.0)
    task = LipNetworkTask(tiny_network(), pairs, clips, windows=(50, 80))
    optimizer, losses = torch.optim.AdamW(task.network.parameters(), 4e-3), []
    for step in range(20):
        batch = task.collate([pairs.sample(k, seed=8 * step + k) for k in range(8)])
        loss = task.loss(batch, "main", torch.Generator().manual_seed(step)).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    task.network.eval()
    assert np.mean(losses[-4:]) < 0.85 * losses[0]
    found = []
    for clip in clips:
        for frames in (-5, 3):
            samples = frames * 960
            late = np.roll(clip.sound, samples)
            late[:samples] = 0.0 if samples > 0 else late[:samples]
            curve = evaluators.sync_curve(clip.points, clip.times, late, RATE, network=task.network)
            found.append(abs(curve.offset * 25 - frames) <= 1)
    assert np.mean(found) >= 0.75
    report = measure_lip_network(task.network, clips, shifts=(0, 4), reach=20)
    assert report["within_frame"] >= 0.75 and report["auc"] > 0.8


def test_sync_refuses_what_it_cannot_see() -> None:
    network, times = tiny_network().eval(), np.arange(50) / 25
    with pytest.raises(ValueError, match=r"lips are seen for 0.00 s of 2.00 s"):
        evaluators.sync_curve(
            np.full((50, 20, 2), np.nan), times, np.zeros(48000, np.float32), RATE, network=network
        )
    with pytest.raises(ValueError, match=r"needs \(samples,\)"):
        evaluators.sync_curve(
            np.zeros((50, 20, 2)), times, np.zeros((1, 1, 8)), RATE, network=network
        )
    with pytest.raises(ValueError, match="100 mel frames a second"):
        LipNetwork(mel_hop_length=256)
    assert rank_auc(np.array([1.0, 2.0]), np.array([0.0, 2.0])) == pytest.approx(0.625)
