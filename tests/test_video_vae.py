"""The video autoencoder: shapes, causality, slices and tiles that equal the whole, cost, saving,
and that it learns.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.evaluation.metrics.video import (
    OpeningProbe,
    best_lag,
    correlation,
    gradient_energy,
    mouth_boxes,
    psnr,
)
from avdiff.models.codecs.video_vae import AVVideoVAE, TimeBlock
from avdiff.train.codecs.video_report import markdown, picture, samples, video_table
from avdiff.train.codecs.video_task import FrameStore, VideoVAETask, event_clip, round_trip_metrics

TINY = {
    "encoder_channels": (16, 16, 32),
    "encoder_layers": (1, 1, 1),
    "decoder_channels": (32, 16, 16, 16),
    "decoder_layers": (2, 1, 1, 1),
}


def tiny(seed: int = 0) -> AVVideoVAE:
    """A small model whose residual branches are not the zeros they start from, so that every path
    counts.
    """
    torch.manual_seed(seed)
    model = AVVideoVAE(**TINY).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def movie(frames: int, size: int = 64, batch: int = 1) -> torch.Tensor:
    return (
        torch.rand(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(frames))
        * 2
        - 1
    )


@torch.no_grad()
def test_first_frame_alone_then_pairs() -> None:
    model = tiny()
    for frames, latents in ((1, 1), (3, 2), (9, 5)):
        z = model.encode(movie(frames)).latent_dist.mode()
        assert z.shape == (1, 16, latents, 2, 2)
        assert model.decode(z).sample.shape == (1, 3, frames, 64, 64)
    wide = torch.zeros(1, 3, 3, 64, 128)
    assert model(wide).sample.shape == wide.shape


@torch.no_grad()
def test_a_latent_sees_its_pair_and_the_past_only() -> None:
    model, x = tiny(), movie(9)
    before = model.encode(x).latent_dist.mode()
    x[:, :, 5:] = -x[:, :, 5:]  # frames 5.. are pairs 3 and 4
    after = model.encode(x).latent_dist.mode()
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])
    frames = model.decode(before).sample
    changed = before.clone()
    changed[:, :, 3:] += 1
    again = model.decode(changed).sample
    assert torch.equal(frames[:, :, :5], again[:, :, :5])
    assert not torch.allclose(frames[:, :, 5:], again[:, :, 5:])


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 2, 3])
def test_slices_equal_the_whole(step: int) -> None:
    whole, sliced = tiny(), tiny()
    whole.slice_latent_frames, sliced.slice_latent_frames = 100, step
    x = movie(15, batch=2)
    z = whole.encode(x).latent_dist.parameters
    torch.testing.assert_close(sliced.encode(x).latent_dist.parameters, z, rtol=1e-5, atol=1e-6)
    video = whole.decode(z[:, :16]).sample
    torch.testing.assert_close(sliced.decode(z[:, :16]).sample, video, rtol=1e-5, atol=1e-5)
    streamed = torch.cat(list(sliced.iter_decode(z[:, :16])), dim=2)
    torch.testing.assert_close(streamed, video, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_time_block_equals_a_loop_over_taps() -> None:
    torch.manual_seed(0)
    block = TimeBlock(8, taps=3, slot=0)
    torch.nn.init.normal_(block.out.weight)
    x = torch.randn(2 * 5, 8, 2, 2)
    fast = block(x, 2, {}).view(2, 5, 8, 2, 2)
    normed = block.norm(x).view(2, 5, 8, 2, 2)
    for t in range(5):
        taps = torch.cat([normed[:, max(t - 2 + k, 0)] for k in range(3)], dim=1)
        slow = x.view(2, 5, 8, 2, 2)[:, t] + block.out(torch.nn.functional.silu(block.mix(taps)))
        torch.testing.assert_close(fast[:, t], slow, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_tiles_agree_with_the_whole_away_from_the_seams_and_cover_everything() -> None:
    model = tiny()
    z = torch.randn(1, 16, 2, 4, 10, generator=torch.Generator().manual_seed(1))
    whole = model.decode(z).sample
    model.enable_tiling(tile_size=256, tile_stride=64)
    tiled = model.decode(z).sample
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    torch.testing.assert_close(
        tiled[..., :8], whole[..., :8], rtol=1e-4, atol=1e-4
    )  # the first tile alone
    assert (tiled - whole).square().mean() < 0.05 * whole.var()
    x = whole.clamp(-1, 1)
    encoded = model.encode(x).latent_dist.mode()
    model.disable_tiling()
    plain = model.encode(x).latent_dist.mode()
    assert (encoded - plain).square().mean() < 0.05 * plain.var()


@torch.no_grad()
def test_batch_slicing_changes_nothing() -> None:
    model, x = tiny(), movie(3, batch=3)
    whole = model(x).sample
    model.enable_slicing()
    torch.testing.assert_close(model(x).sample, whole, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_default_model_keeps_its_budget() -> None:
    model, x = AVVideoVAE(), movie(1, 128)  # a single frame costs a pair
    with FlopCounterMode(display=False) as encoder:
        z = model.encode(x).latent_dist.mode()
    with FlopCounterMode(display=False) as decoder:
        model.decode(z)
    assert encoder.get_total_flops() / 2 <= 0.10e9
    assert decoder.get_total_flops() / 2 <= 0.251e9
    assert sum(p.numel() for p in model.parameters()) < 4e6


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny()
    model.latents_std.mul_(2)
    model.save_pretrained(tmp_path)
    again = AVVideoVAE.from_pretrained(tmp_path)
    assert torch.equal(again.latents_std, torch.full((16,), 2.0))
    with torch.no_grad():
        torch.testing.assert_close(again(movie(3)).sample, model(movie(3)).sample)


@pytest.mark.parametrize(
    ("shape", "word"),
    [
        ((1, 3, 4, 64, 64), "num_frames=4"),
        ((1, 3, 3, 60, 64), "height=60"),
        ((1, 1, 3, 64, 64), "x has shape"),
        ((3, 3, 64, 64), "x has shape"),
    ],
)
def test_bad_videos_are_refused_in_words(shape: tuple[int, ...], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        tiny().encode(torch.zeros(shape))


def test_bad_settings_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match="tile_size=100"):
        tiny().enable_tiling(tile_size=100)
    with pytest.raises(ValueError, match="stem_patch=4"):
        AVVideoVAE(stem_patch=4)
    with pytest.raises(ValueError, match="z has shape"):
        tiny().decode(torch.zeros(1, 8, 1, 2, 2))


def test_task_learns_and_noise_costs(tmp_path: Path) -> None:
    FrameStore.build(tmp_path / "clips", (event_clip(seed, 3, 64) for seed in range(100)), count=4)
    store = FrameStore(tmp_path / "clips")
    torch.manual_seed(0)
    task = VideoVAETask(AVVideoVAE(**TINY), store, store)
    batch = {name: torch.stack([store[i][name] for i in range(4)]) for name in ("video", "boxes")}
    optimizer = torch.optim.AdamW(task.parameters("main"), lr=3e-3)
    losses = []
    for step in range(100):  # before, noise moves the picture by thousandths of a dB
        loss = task.loss(batch, "main", torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.grad is not None for p in task.model.parameters())
    numbers = task.validate()
    assert numbers["noisy_psnr"] > 5
    # as much noise as latent: a seventh of it costs under 0.01 dB either way in so small a model
    drowned = round_trip_metrics(task.model, store, 4, noise=1.0)
    assert drowned["psnr"] == numbers["psnr"]
    assert drowned["psnr"] - drowned["noisy_psnr"] > 0.3  # measured 0.53


def test_metrics_know_blur_boxes_and_lags() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    shifted = np.clip(frames.astype(int) + 10, 0, 255).astype(np.uint8)
    flat = np.full_like(frames, 100)
    assert psnr(flat, flat + 10) == pytest.approx(20 * np.log10(25.5))
    assert psnr(frames, frames) > 100 > psnr(frames, shifted)
    points = np.tile(np.array([[0.25, 0.25], [0.75, 0.75]], np.float32), (4, 1, 1))
    boxes = mouth_boxes(points, margin=0.0)
    np.testing.assert_allclose(boxes, [[0.25, 0.25, 0.75, 0.75]] * 4)
    damaged = frames.copy()
    damaged[:, :8] = 0
    assert psnr(frames, damaged, boxes) > 100 > psnr(frames, damaged)
    blurred = ((frames.astype(int) + np.roll(frames, 1, 2)) // 2).astype(np.uint8)
    assert gradient_energy(blurred) < 0.8 * gradient_energy(frames)
    wave = np.sin(np.arange(40) / 3)
    assert correlation(wave, 2 * wave + 1) == pytest.approx(1)
    assert best_lag(wave, np.roll(wave, 2)) == 2
    assert np.isnan(correlation(wave, np.ones(40)))


def test_opening_probe_reads_an_opening_it_has_not_seen() -> None:
    rng = np.random.default_rng(0)

    def clip() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A dark bar of changing height on bright skin; one landmark box."""
        opening, skin = rng.uniform(2, 14, 30), rng.uniform(120, 220)
        y = np.abs(np.arange(48) - 24)[None, :, None, None]
        frames = np.broadcast_to(
            np.where(y < opening[:, None, None, None] / 2, 30, skin), (30, 48, 48, 3)
        )
        points = np.tile(np.array([[0.3, 0.4], [0.7, 0.6]], np.float32), (30, 1, 1))
        return frames.astype(np.uint8), points, opening

    probe = OpeningProbe.fit(clip() for _ in range(20))
    frames, points, opening = clip()
    assert correlation(probe.measure(frames, points), opening) > 0.97


def test_report_makes_table_and_picture() -> None:
    made = list(samples(SpeechCorpus(), "test", 2, num_frames=9, size=64))
    probe = OpeningProbe.fit((s.frames, s.points, s.opening) for s in made)
    table = video_table(tiny(), iter(made), probe)
    assert table["original"]["psnr"] > 100 and table["original"]["mouth_gradient"] == pytest.approx(
        1
    )
    assert table["round trip, noise 0"]["psnr"] < table["original"]["psnr"]
    assert "shrunk to 64 values" in markdown(table)
    assert picture(tiny(), made).size == (
        128,
        192,
    )  # two clips wide; original, round trip, difference
