"""Features of onset tracks: how long since and until an onset, and where in a flight."""

import numpy as np
import pytest
import torch

from avdiff.corpus.events.scene import ball_height, sample_event
from avdiff.phonetics.onsets import FEATURES, onset_features


def column(features, name):
    return features[0, :, FEATURES.index(name)]


def test_features_peak_at_onsets_and_are_nothing_without():
    times = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 1.5])
    features = onset_features([[0.5, 1.0], []], times)
    assert features.shape == (2, 6, len(FEATURES))
    assert not features[1].any()
    assert column(features, "since").tolist()[:2] == [0.0, 0.0]  # none before
    assert column(features, "since")[2] == 1.0
    assert column(features, "until")[5] == 0.0  # none after
    torch.testing.assert_close(column(features, "until")[1], torch.exp(torch.tensor(-1.0)))
    assert column(features, "phase_cos")[3] == pytest.approx(-1.0)  # half-way
    assert column(features, "flight")[3] == 0.5
    assert column(features, "sounding").tolist() == [0, 0, 1, 0, 1, 0]
    with pytest.raises(ValueError, match="needs ascending seconds"):
        onset_features([[1.0, 0.5]], times)


def test_a_ball_s_height_between_onsets_follows_from_them():
    drawn = (sample_event(np.random.default_rng(seed), 4.0, "ball") for seed in range(50))
    event = next(e for e in drawn if len(e.contacts) > 3)
    times = np.linspace(event.contacts[0], event.contacts[-1] - 0.01, 200)
    features = onset_features([event.contacts], torch.from_numpy(times))
    heights = torch.tensor([ball_height(event, float(t)) for t in times])
    angle = torch.atan2(column(features, "phase_sin"), column(features, "phase_cos"))
    part = (angle / (2 * torch.pi)) % 1.0
    raised = column(features, "flight") ** 2 * part * (1 - part)  # free flight is a parabola
    assert torch.corrcoef(torch.stack([raised, heights]))[0, 1] > 0.999
