"""SyncNet's protocol with random weights: MFCCs, windows, planted lags, LSE values by the formulas,
and files.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_clips import RATE, presenter
from PIL import Image
from safetensors.torch import save_file
from torchaudio.functional import resample

from avdiff.evaluation.lipsync import syncnet
from avdiff.evaluation.lipsync.backends import SyncNetBackend, on_clock
from avdiff.evaluation.lipsync.face_tracks import WholeSource
from avdiff.evaluation.lipsync.measure import LipSync
from avdiff.evaluation.lipsync.self_checks import shifted
from avdiff.media.write import Clip


@cache
def network() -> syncnet.SyncNet:
    torch.manual_seed(3)
    return syncnet.SyncNet().eval().requires_grad_(False)


def sound(seconds: float = 2.0) -> np.ndarray:
    """Noise whose loudness and colour change all the time, at 16 kHz."""
    rng = np.random.default_rng(1)
    count = round(seconds * syncnet.RATE)
    wave = rng.normal(size=count) * np.interp(
        np.arange(count), np.arange(0, count, 700), rng.random(-(-count // 700))
    )
    return np.clip(0.1 * np.convolve(wave, rng.normal(size=9), "same"), -0.9, 0.9).astype(
        np.float32
    )


def slow_mfcc(wave: np.ndarray) -> np.ndarray:
    """By the formulas, a frame and a filter at a time (Davis & Mermelstein 1980, as in
    python_speech_features).
    """
    x = np.rint(wave.astype(np.float64) * 32768)
    x = np.array([x[0], *(x[i] - 0.97 * x[i - 1] for i in range(1, len(x)))])
    rows = []
    edges = [
        700 * (10 ** (m / 2595) - 1) for m in np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 28)
    ]
    bins = [int(513 * f / 16000) for f in edges]
    for start in range(0, max(1, len(x) - 400 + 160), 160):
        frame = x[start : start + 400]
        power = np.abs(np.fft.rfft(np.pad(frame, (0, 512 - len(frame))))) ** 2 / 512
        logs = []
        for m in range(26):
            low, middle, high = bins[m : m + 3]
            total = sum(power[k] * (k - low) / (middle - low) for k in range(low, middle))
            total += sum(power[k] * (high - k) / (high - middle) for k in range(middle, high))
            logs.append(np.log(total))
        cepstra = [
            np.sqrt((1 if n == 0 else 2) / 26)
            * sum(v * np.cos(np.pi * n * (2 * m + 1) / 52) for m, v in enumerate(logs))
            for n in range(13)
        ]
        lifted = [c * (1 + 11 * np.sin(np.pi * n / 22)) for n, c in enumerate(cepstra)]
        rows.append([np.log(power.sum()), *lifted[1:]])
    return np.array(rows)


def test_mfcc_by_the_formulas() -> None:
    wave = sound(0.3)[:4723]
    found = syncnet.mfcc(wave)
    np.testing.assert_allclose(found, slow_mfcc(wave), rtol=1e-9, atol=1e-9)
    assert np.isfinite(syncnet.mfcc(np.zeros(900))).all() and syncnet.mfcc(np.zeros(100)).shape == (
        1,
        13,
    )


def slow_distances(
    seen: torch.Tensor, heard: torch.Tensor, reach: int, padded: bool
) -> list[float]:
    """D(l) pair by pair."""
    found = []
    for lag in range(-reach, reach + 1):
        pairs = []
        for i in range(len(seen)):
            if 0 <= i + lag < len(heard):
                pairs.append(
                    float(
                        torch.nn.functional.pairwise_distance(seen[i : i + 1], heard[i + lag][None])
                    )
                )
            elif padded:
                pairs.append(
                    float(
                        torch.nn.functional.pairwise_distance(seen[i : i + 1], 0 * seen[i : i + 1])
                    )
                )
        found.append(float(np.mean(pairs)))
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_distances_pair_by_pair(padded: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    seen, heard = (torch.randn(20, 7, generator=generator) for _ in range(2))
    found = syncnet.distances(seen, heard, 6, padded)
    np.testing.assert_allclose(found, slow_distances(seen, heard, 6, padded), rtol=1e-5)
    more = torch.cat([heard, torch.randn(3, 7, generator=generator)])
    np.testing.assert_allclose(
        syncnet.distances(seen, more, 6, padded),
        slow_distances(seen, heard if padded else more, 6, padded),
        rtol=1e-5,
    )
    assert np.isnan(syncnet.distances(seen[:3], heard[:3], 6)[[0, -1]]).all()


@pytest.mark.parametrize("late", [-9, -1, 0, 4, 12])
def test_planted_lag_through_the_sound_tower(late: int) -> None:
    heard = syncnet.hear_sound(network(), sound())
    after = syncnet.hear_sound(network(), shifted(sound(), syncnet.RATE, late * 40.0))
    assert heard.shape == (45, 1024)
    found = syncnet.distances(heard, after)  # what is seen at i is heard at i + late
    assert int(np.argmin(found)) - syncnet.VSHIFT == late and found.min() < 0.05 * np.median(found)


def test_windows_come_out_of_one_pass_in_any_batch() -> None:
    film = np.random.default_rng(0).integers(0, 256, (11, 224, 224, 3), np.uint8)
    whole, parts = (
        syncnet.see_pictures(network(), film, 20),
        syncnet.see_pictures(network(), film, 3),
    )
    assert whole.shape == (7, 1024)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    window = torch.from_numpy(film[2:7, ..., ::-1].copy()).permute(3, 0, 1, 2)[None].float()
    one = network().netfclip(network().netcnnlip(window).flatten(1))  # as the port runs it
    torch.testing.assert_close(whole[2:3], one, rtol=1e-4, atol=1e-5)
    assert syncnet.see_pictures(network(), film[:4]).shape == (0, 1024)


def test_crops_are_the_port_s() -> None:
    boxes = np.tile(np.array((100.0, 80.0, 180.0, 200.0)), (30, 1))
    boxes[11] += 40  # one bad detection is smoothed away
    centres, halves = syncnet.crop_boxes(boxes)
    s, c = 60.0, 0.4
    np.testing.assert_allclose(halves, s * (1 + c))
    top, bottom = 140 - s, 140 + s * (1 + 2 * c)
    np.testing.assert_allclose(centres, np.tile((140.0, (top + bottom) / 2), (30, 1)))


def test_pictures_on_the_clock() -> None:
    film = [((i + 0.5) / 30, np.full(1, i)) for i in range(30)]
    clock = (np.arange(25) + 0.5) / 25
    taken = list(on_clock(iter(film), clock))
    assert [place for place, _ in taken] == list(range(25))
    times = np.array([film[int(picture[0])][0] for _, picture in taken])
    assert np.abs(times - clock).max() <= 0.5 / 30 + 1e-9


def test_whole_protocol_on_a_cropped_clip(tmp_path: Path) -> None:
    save_file(network().state_dict(), tmp_path / "w.safetensors")
    backend = SyncNetBackend(tmp_path / "w.safetensors", cropped=True, reach=0.2)
    clip = presenter(seconds=1.4)
    frames, audio = clip["frames"][:33], clip["audio"][0]
    evaluator = LipSync(backend=backend)
    assert isinstance(evaluator.faces, WholeSource)
    assert evaluator.header()["weights"] == syncnet.file_hash(tmp_path / "w.safetensors")
    row = evaluator.measure(Clip(frames, audio[None], Fraction(25), RATE)).row
    assert row["status"] == "ok", row["error"]
    crops = [np.asarray(square_of(frame)) for frame in frames]
    seen = syncnet.see_pictures(network(), crops)
    heard = syncnet.hear_sound(network(), at_16k(audio[: round(33 / 25 * RATE)]))
    slow = slow_distances(seen, heard, 5, padded=False)
    assert row["lse_d"] == pytest.approx(min(slow), rel=1e-4) and row[
        "distance_at_zero"
    ] == pytest.approx(slow[5], rel=1e-4)
    assert row["lse_c"] == pytest.approx(np.median(slow) - min(slow), rel=1e-3, abs=1e-6)
    lag = int(np.argmin(slow)) - 5
    assert abs(row["offset_frames"] - lag) <= 0.5
    odd = SyncNetBackend(tmp_path / "w.safetensors", quirks=True, cropped=True, reach=0.2)
    track = (
        WholeSource().follow(((i + 0.5) / 25, frame) for i, frame in enumerate(frames)).tracks[0]
    )
    look = odd.look(lambda: iter(((i + 0.5) / 25, frame) for i, frame in enumerate(frames)), track)
    curve = odd.curves(look, audio, RATE).whole
    ported = slow_distances(seen[: len(heard)], heard, 5, padded=True)
    np.testing.assert_allclose(-curve.scores, ported, rtol=1e-4)
    assert odd.numbers(curve)["port_offset_frames"] == 5 - int(
        np.argmin(ported)
    )  # the port: vshift - argmin
    with pytest.raises(ValueError, match="needs at least 15"):
        odd.curves(look, audio[: RATE // 2], RATE)


def square_of(frame: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(frame).resize((224, 224), Image.Resampling.BILINEAR))


def at_16k(audio: np.ndarray) -> np.ndarray:
    return resample(torch.from_numpy(audio.copy()), RATE, 16000).numpy()


def test_weights_are_read_as_tensors_alone(tmp_path: Path) -> None:
    torch.save(network().state_dict(), tmp_path / "syncnet_v2.model")
    loaded = syncnet.load_syncnet(tmp_path / "syncnet_v2.model")
    for name, value in network().state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value)
    names = {"netcnnaud.0.weight", "netcnnaud.18.weight", "netcnnlip.18.weight", "netfcaud.3.bias"}
    assert names <= set(loaded.state_dict())
    torch.save(
        network(), tmp_path / "pickled.model"
    )  # a whole module would run code when it is read
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("pickled.model", "other.safetensors"):
        with pytest.raises(ValueError, match="no weights of SyncNet"):
            syncnet.load_syncnet(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        syncnet.load_syncnet(tmp_path / "nothing")
