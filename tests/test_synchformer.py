"""DeSync with random weights: what comes in, segments and windows, planted offsets, statuses, and
files.
"""

from __future__ import annotations

import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mixed_clips import RATE
from safetensors.torch import save_file
from test_synchformer_network import TINY, expected, network
from torch.nn import functional as F

from avdiff.cli import main as cli
from avdiff.evaluation.lipsync import backends as lip_backends
from avdiff.evaluation.lipsync import synchformer
from avdiff.evaluation.lipsync.backends import SynchformerBackend, find_backend
from avdiff.evaluation.lipsync.face_tracks import WholeSource
from avdiff.evaluation.lipsync.measure import LipSync
from avdiff.evaluation.lipsync.synchformer_network import Size, Synchformer
from avdiff.evaluation.lipsync.syncnet import file_hash
from avdiff.media.write import Clip, write_clip


def planted(*likely: int) -> Synchformer:
    """A network whose classes have these logits whatever comes in: 5 for the first named, 4 for the
    second...
    """
    made = Synchformer(TINY).eval().requires_grad_(False)
    made.transformer.off_head.weight.zero_()
    made.transformer.off_head.bias.zero_()
    for rank, place in enumerate(likely):
        made.transformer.off_head.bias[place] = 5 - rank
    return made


def film(seconds: float, fps: int = 25, size: tuple[int, int] = (36, 48)) -> np.ndarray:
    """Pictures that all differ: (F, H, W, 3)."""
    return np.random.default_rng(2).integers(0, 256, (round(seconds * fps), *size, 3), np.uint8)


def noise(seconds: float, rate: int = 16_000) -> np.ndarray:
    return (0.1 * np.random.default_rng(3).normal(size=round(seconds * rate))).astype(np.float32)


# ------------------------------------------------------------------------------------ what comes in
def test_spectrogram_by_the_formula() -> None:
    wave = torch.from_numpy(noise(0.64))
    found = synchformer.spectrogram(wave[None])[0].numpy()
    x = np.pad(wave.numpy().astype(np.float64), 512, mode="reflect")
    window = np.pad(0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400), 312)
    power = (
        np.abs(np.fft.rfft([x[i : i + 1024] * window for i in range(0, len(x) - 1023, 160)])) ** 2
    )
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 130) / 2595) - 1)
    bins = np.linspace(0, 8000, 513)
    filters = [
        np.clip(np.minimum((bins - a) / (b - a), (c - bins) / (c - b)), 0, None)
        for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    slow = (np.log(power @ np.array(filters).T + 1e-6).T + 4.2677393) / (2 * 4.5689974)
    assert found.shape == (128, 66) and slow.shape == (128, 65)
    np.testing.assert_allclose(found[:, :65], slow, atol=2e-3)
    np.testing.assert_allclose(
        found[:, 65], 4.2677393 / (2 * 4.5689974), rtol=1e-5
    )  # zero log-mel, then normalized


@pytest.mark.parametrize("shape", [(36, 48), (80, 40), (32, 32)])
def test_pictures_are_resized_and_cut_at_the_centre(shape: tuple[int, int]) -> None:
    picture = film(0.04, size=shape)[0]
    found = (synchformer.prepare_picture(picture, 32) + 1) * 127.5
    height, width = (32 * length // min(shape) for length in shape)
    rows = torch.from_numpy(picture).permute(2, 0, 1)[
        None
    ]  # bytes, as torchvision has torch resize them
    sized = F.interpolate(rows, (height, width), mode="bicubic", antialias=True)[0]
    top, left = round((height - 32) / 2), round((width - 32) / 2)
    wanted = sized[:, top : top + 32, left : left + 32]
    assert found.shape == (3, 32, 32)
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=1.01)


def test_segments_are_those_of_the_papers() -> None:
    for pictures in (0, 15, 16, 23, 24, 119, 120, 200):
        sliding = len([i for i in range(0, pictures, 8) if i + 16 <= pictures])
        assert max(0, synchformer.segment_count(pictures, 10**6)) == sliding
        assert max(0, synchformer.segment_count(10**6, pictures * 640)) == sliding
    assert (
        synchformer.segment_count(120, 76_800) == 14
        and synchformer.segment_count(120, 76_799) == 13
    )
    assert (
        synchformer.WINDOW == 4.8 and synchformer.segment_count(200, 128_000) == 24
    )  # 8 s, as MMAudio's clips
    assert synchformer.window_starts(24) == [0, 10] and synchformer.window_starts(14) == [0]

    clip, wave = film(1.6, size=(32, 32)), noise(1.6)
    found = synchformer.see_segments(network(), enumerate(clip), {0, 3})
    heard = synchformer.hear_segments(network(), torch.from_numpy(wave), {0, 3})
    assert set(found) == set(heard) == {0, 3}
    cut = torch.from_numpy(clip[24:40]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    torch.testing.assert_close(found[3], network().see(cut)[0], rtol=1e-4, atol=1e-5)
    mel = synchformer.spectrogram(torch.from_numpy(wave[None, 15_360:25_600]))
    torch.testing.assert_close(heard[3], network().hear(mel)[0], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------ offsets
def test_desync_of_planted_classes() -> None:
    logits = torch.zeros(2, 21)
    logits[0, 18], logits[1, 9] = 5.0, 4.0  # upstream: sound 1.6 s early, and 0.2 s late
    whole, first = synchformer.offset_curve(logits), synchformer.offset_curve(logits[:1])
    assert first.offset == pytest.approx(-1.6) and first.desync == pytest.approx(1.6)
    assert synchformer.offset_curve(logits[1:]).offset == pytest.approx(0.2)
    assert whole.desync == pytest.approx((1.6 + 0.2) / 2) and whole.offset == pytest.approx(-1.6)
    assert whole.scores.sum() == pytest.approx(1) and whole.overlap == pytest.approx(9.6)
    np.testing.assert_allclose(first.scores[2], np.exp(5) / (np.exp(5) + 20))
    assert whole.lags[10] == 0 and synchformer.offset_curve(torch.eye(21)[10:11]).desync == 0


def saved(made: Synchformer, path: Path) -> Path:
    save_file({name: value.contiguous() for name, value in made.state_dict().items()}, path)
    return path


@pytest.mark.parametrize(("place", "late"), [(10, 0.0), (0, 2000.0), (13, -600.0)])
def test_planted_offset_of_a_clip(tmp_path: Path, place: int, late: float) -> None:
    backend = SynchformerBackend(saved(planted(place, 10), tmp_path / "w.safetensors"), TINY)
    evaluator = LipSync(backend=backend)
    row = evaluator.measure(Clip(film(5.6), noise(5.6)[None], Fraction(25), 16_000)).row
    assert row["status"] == "ok", row["error"]
    assert row["offset_ms"] == pytest.approx(late) and row["offset_frames"] == pytest.approx(
        late / 40
    )
    assert row["desync"] == pytest.approx(abs(late) / 1000)
    assert row["window_starts"] == [0, 0.64] and row["windows"] == 2 and len(row["curve"]) == 21
    assert row["score"] >= row["score_at_zero"] > 0 and row["tracks"][0]["desync"] == row["desync"]


def test_whole_protocol_against_its_parts(tmp_path: Path) -> None:
    backend = SynchformerBackend(saved(network(), tmp_path / "w.safetensors"), TINY)
    evaluator = LipSync(backend=backend)
    header = evaluator.header()
    assert isinstance(evaluator.faces, WholeSource) and header["weights"] == file_hash(
        tmp_path / "w.safetensors"
    )
    assert (
        header["backend"] == "synchformer"
        and header["version"]
        and "audio late" in header["offset"]
    )
    frames, audio = film(6.2), noise(6.2)
    measured = evaluator.measure(Clip(frames, audio[None], Fraction(25), 16_000))
    pictures = torch.stack(
        [synchformer.prepare_picture(frame, 32) for frame in frames], dim=1
    )  # (3, F, 32, 32)
    logits = []
    for start in (0, 4):  # 155 pictures: 18 segments
        segments = range(start, start + 14)
        seen = torch.stack(
            [network().see(pictures[None, :, 8 * i : 8 * i + 16])[0] for i in segments]
        )
        waves = torch.from_numpy(np.stack([audio[5120 * i : 5120 * i + 10_240] for i in segments]))
        logits.append(
            network().compare(seen[None], network().hear(synchformer.spectrogram(waves))[None])[0]
        )
    chance = torch.stack(logits).softmax(dim=1)
    np.testing.assert_allclose(measured.row["curve"], chance.mean(dim=0).flip(0).numpy(), atol=2e-5)
    grid = np.linspace(-2, 2, 21)
    assert measured.row["desync"] == pytest.approx(
        np.mean([abs(grid[int(one.argmax())]) for one in chance])
    )
    assert set(measured.seen.features) == set(range(18))
    shorter = backend.curves(measured.seen, audio[: 5 * 16_000], 16_000)  # 14 segments: one window
    assert shorter.starts == [0] and len(shorter.parts) == 1


def test_a_clip_at_another_rate_is_seen_at_25_fps(tmp_path: Path) -> None:
    backend = SynchformerBackend(saved(network(), tmp_path / "w.safetensors"), TINY)
    frames = film(4.8, 50)
    track = (
        WholeSource().follow(((i + 0.5) / 50, frame) for i, frame in enumerate(frames)).tracks[0]
    )
    seen = backend.look(
        lambda: iter(((i + 0.5) / 50, frame) for i, frame in enumerate(frames)), track
    )
    assert seen.pictures == 120
    assert len(backend.curves(seen, noise(4.8, 24_000), 24_000).parts) == 1


@pytest.mark.parametrize(
    ("seconds", "loudness", "status", "words"),
    [
        (4.76, 1.0, "too_short", "for 4.76 s: Synchformer needs at least 4.8 s"),
        (5.0, 0.0, "no_speech", "silent"),
        (1.0, 1.0, "too_short", "at least 1.3 s"),
        (5.0, None, "no_speech", "has no sound track"),
    ],
)
def test_clips_that_cannot_be_measured_have_a_status(
    tmp_path: Path, seconds: float, loudness: float | None, status: str, words: str
) -> None:
    evaluator = LipSync(
        backend=SynchformerBackend(saved(planted(10), tmp_path / "w.safetensors"), TINY)
    )
    audio = None if loudness is None else loudness * noise(seconds)[None]
    row = evaluator.measure(Clip(film(seconds), audio, Fraction(25), 16_000)).row
    assert row["status"] == status and words in row["error"]


def test_command_writes_rows_and_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lip_backends, "SynchformerBackend", partial(SynchformerBackend, size=TINY))
    weights = saved(planted(13), tmp_path / "w.safetensors")
    (tmp_path / "clips").mkdir()
    write_clip(
        tmp_path / "clips" / "a.mp4", film(5.0, size=(64, 64)), 25, noise(5.0, RATE)[None], RATE
    )
    write_clip(
        tmp_path / "clips" / "b.mp4", film(2.0, size=(64, 64)), 25, noise(2.0, RATE)[None], RATE
    )
    files = [
        str(item)
        for kind in ("json", "csv", "html")
        for item in (f"--{kind}", tmp_path / f"r.{kind}")
    ]
    words = [
        "eval",
        "lipsync",
        str(tmp_path / "clips"),
        "--backend",
        "synchformer",
        "--weights",
        str(weights),
        *files,
    ]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert (
        "DeSync" in said.out
        and "1 ok, 1 too_short" in said.out
        and "reader of drawn" not in said.err
    )
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["header"]["backend"] == "synchformer" and report["header"][
        "weights"
    ] == file_hash(weights)
    assert report["summary"]["numbers"]["desync"]["mean"] == pytest.approx(0.6)


# -------------------------------------------------------------------------------------------- files
def test_weights_are_read_as_tensors_alone(tmp_path: Path) -> None:
    state = network().state_dict() | {
        name: torch.zeros(shape)
        for name, shape in expected(TINY).items()
        if name.startswith("vfeat_extractor.patch_embed.")
    }
    assert set(state) == set(expected(TINY))
    torch.save(state, tmp_path / "synchformer_state_dict.pth")
    save_file({name: value.half() for name, value in state.items()}, tmp_path / "half.safetensors")
    for name, near in (("synchformer_state_dict.pth", 0.0), ("half.safetensors", 1e-3)):
        loaded = synchformer.load_synchformer(tmp_path / name, TINY)
        assert not loaded.training
        for key, value in network().state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=near, atol=near)

    torch.save(
        {"model": state, "args": Fraction(1)}, tmp_path / "upstream.pt"
    )  # options are no tensors
    torch.save({"model": state}, tmp_path / "nested.pt")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    for name in ("upstream.pt", "nested.pt", "other.safetensors"):
        with pytest.raises(ValueError, match=r"no weights of Synchformer.*must be converted first"):
            synchformer.load_synchformer(tmp_path / name, TINY)
    with pytest.raises(ValueError, match="no such file"):
        synchformer.load_synchformer(tmp_path / "nothing", TINY)
    with pytest.raises(
        ValueError, match=r"no weights of Synchformer.*size mismatch for vfeat_extractor.cls_token"
    ):
        synchformer.load_synchformer(
            tmp_path / "half.safetensors", Size(side=32, width=48, depth=2, sync_depth=1)
        )
    for options in ({}, {"weights": "w", "quirks": True}, {"weights": "w", "cropped": True}):
        with pytest.raises(ValueError, match="needs --weights PATH"):
            find_backend("synchformer", **options)
