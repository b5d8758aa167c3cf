"""Distances of sets of clips against their formulas."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.corpus.speech.read import REPO_BANK, SpeechCorpus
from avdiff.evaluation import fidelity as fid
from avdiff.evaluation.suite import Evaluators
from avdiff.media.write import Clip
from avdiff.models.evaluators.contact_detector import ContactDetector
from avdiff.models.evaluators.face_reader import FaceReader
from avdiff.models.evaluators.lip_network import LipNetwork
from avdiff.models.evaluators.phone_recognizer import PhoneRecognizer
from avdiff.phonetics.phone import inventory


def test_frechet_of_shifted_and_stretched_normals() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(60000, 3))
    assert fid.frechet(one, one) == pytest.approx(0, abs=1e-9)
    assert fid.frechet(one, one + np.array([1.0, 2.0, 0.0])) == pytest.approx(5, abs=1e-6)
    # independent axes: sum of (s1 - s2)^2
    wide = rng.normal(size=(60000, 3)) * np.array([2.0, 1.0, 3.0])
    assert fid.frechet(one, wide) == pytest.approx(1 + 0 + 4, rel=0.05)


def test_frechet_is_that_of_the_matrix_root() -> None:
    from scipy.linalg import sqrtm

    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(200, 5)) @ rng.normal(size=(5, 5)), rng.normal(size=(150, 5)) + 0.3
    a, b = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    gap = one.mean(0) - two.mean(0)
    assert fid.frechet(one, two) == pytest.approx(
        gap @ gap + np.trace(a + b - 2 * sqrtm(a @ b).real)
    )


def test_kernel_distance_is_the_unbiased_estimate() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(5, 4)) + 0.5

    def k(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 4 + 1) ** 3)

    own = np.mean([k(a, b) for a, b in permutations(x, 2)])
    other = np.mean([k(a, b) for a, b in permutations(y, 2)])
    cross = np.mean([k(a, b) for a in x for b in y])
    assert fid.kernel(x, y) == pytest.approx(own + other - 2 * cross)
    halves = [fid.kernel(*np.split(rng.normal(size=(40, 4)), 2)) for _ in range(300)]
    assert abs(np.mean(halves)) < 3 * np.std(halves) / np.sqrt(
        300
    )  # no bias on sets of the same source


def test_interval_covers_what_the_next_sample_gives() -> None:
    rng = np.random.default_rng(3)
    truth = np.mean(
        [fid.kernel(rng.normal(size=(80, 8)), rng.normal(size=(80, 8)) + 0.3) for _ in range(200)]
    )
    covered = 0
    for _ in range(60):
        found = fid.measured("kernel", rng.normal(size=(80, 8)), rng.normal(size=(80, 8)) + 0.3)
        covered += found.low <= truth <= found.high
    assert covered >= 51  # 95 % of 60 is 57; the jackknife is a little short


def test_real_beside_made_and_too_few_are_refused() -> None:
    rng = np.random.default_rng(4)
    real, like, far = (
        rng.normal(size=(200, 50)),
        rng.normal(size=(100, 50)),
        rng.normal(size=(100, 50)) + 1.0,
    )
    same, other = (fid.fidelity({"mel": real}, {"mel": made}) for made in (like, far))
    for near, away in zip(same, other, strict=True):
        assert near.made is not None and away.made is not None and near.real is not None
        assert near.made.n == near.real.n == 100
        assert near.made.low <= near.real.high and near.real.low <= near.made.high
        assert away.made.low > near.real.high
    few = fid.fidelity({"mel": real[:20]}, {"mel": like[:10]})
    assert all(row.made is None and "needs" in row.refused for row in few)
    fid.print_fidelity([*same, *few])
    with pytest.raises(ValueError, match="at least 64"):
        fid.measured("frechet", real[:63], real)


def test_features_of_real_clips_by_real_judges() -> None:
    torch.manual_seed(0)
    by = Evaluators(
        PhoneRecognizer(inventory()[0], width=32, expansion=2, kernel=5, layers=1).eval(),
        FaceReader().eval(),
        LipNetwork(width=16, layers=1, embedding=8).eval(),
        ContactDetector((8, 8, 8), 16, 1).eval(),
    )
    torch.nn.init.constant_(
        by.face_reader.is_face.bias, 5.0
    )  # this untrained reader sees a face everywhere
    corpus = PresenterCorpus(
        SpeechCorpus(REPO_BANK, languages=["en"]), length=3, seed=1, event_share=0, size=64
    )
    clips = [
        Clip(i["video"].numpy(), i["audio"].numpy(), i["fps"], i["sample_rate"]) for i in corpus
    ]
    found = fid.features([*clips, Clip(None, clips[0].audio, None, 24000)], by)
    assert {name: rows.shape for name, rows in found.items()} == {
        "looks": (3, 96),
        "motion": (3, 16),
        "speech": (4, 64),
        "mel": (4, 200),
    }
    assert all(np.isfinite(rows).all() and rows.std(0).max() > 0 for rows in found.values())
    assert len(by.recognizer.fine_out._forward_hooks) == 0  # the evaluator is left as it was


def test_projection_keeps_small_spaces_and_is_fixed() -> None:
    rng = np.random.default_rng(5)
    real = rng.normal(size=(100, 200)) * 7 + 3
    first, second = project = fid.project(real, real + 1)
    assert [p.shape for p in project] == [(100, fid.DIM)] * 2
    assert np.array_equal(first, fid.project(real)[0]) and not np.allclose(first, second)
    assert fid.project(rng.normal(size=(50, 8)))[0].shape == (50, 8)
