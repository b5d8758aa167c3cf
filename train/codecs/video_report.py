"""What the codecs keep: round trips of held-out clips as a table and a picture.

    python -m avdiff.train.codecs.video_report --video_vae avdiff/bundled/vae --output_dir
    runs/codec_report

Originals are the ceiling; the control keeps as many numbers a frame pair as the latents hold, by
shrinking the picture.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from avdiff.corpus.face.presenter import (
    lip_points,
    mouth_opening,
    pose_track,
    render_face,
    sample_identity,
)
from avdiff.corpus.speech.read import SpeechCorpus
from avdiff.evaluation.metrics.video import (
    OpeningProbe,
    best_lag,
    correlation,
    gradient_energy,
    mouth_boxes,
    psnr,
)
from avdiff.models.codecs.video_vae import AVVideoVAE
from avdiff.phonetics.visemes import viseme_track
from avdiff.pixels import to_model, to_uint8

NOISES = (0.0, 0.1, 0.15, 0.2, 0.3)  # s.d. added to normalized latents
FPS = 25


@dataclass(frozen=True)
class Sample:
    """A clip: frames uint8 (F, S, S, 3), lip points (F, K, 2), true opening (F,) as a share of the
    side.
    """

    frames: np.ndarray
    points: np.ndarray
    opening: np.ndarray


def samples(
    bank: SpeechCorpus, split: str, count: int, num_frames: int = 49, size: int = 128
) -> Iterator[Sample]:
    """Presenters of a split speaking its sentences; a function of the split and the number."""
    for index in range(count):
        rng = np.random.default_rng([index, sum(split.encode())])
        utterance = bank[int(rng.integers(len(bank)))]
        identity = sample_identity(rng, utterance.gender, split)
        start = float(rng.uniform(0, max(utterance.duration - num_frames / FPS, 0.01)))
        times = start + np.arange(num_frames) / FPS
        mouths = viseme_track(utterance.phones, times)
        poses = pose_track(rng, times, utterance.phones)
        pairs = list(zip(mouths, poses, strict=True))
        yield Sample(
            np.stack([render_face(identity, m, p, size) for m, p in pairs]),
            np.stack([lip_points(identity, m, p) for m, p in pairs]),
            np.asarray(mouth_opening(identity, mouths)),
        )


def to_tensor(frames: np.ndarray) -> Tensor:
    """uint8 (F, H, W, 3) -> (1, 3, F, H, W) in [-1, 1]."""
    return rearrange(to_model(frames), "f h w c -> 1 c f h w")


def to_frames(video: Tensor) -> np.ndarray:
    """(1, 3, F, H, W) -> uint8 (F, H, W, 3)."""
    return rearrange(to_uint8(video), "1 c f h w -> f h w c").numpy()


def shrunk(frames: np.ndarray, values: int) -> np.ndarray:
    """The control: the mean of each frame pair, bicubically shrunk to at most `values` numbers and
    enlarged again.
    """
    video = torch.cat([to_tensor(frames)[:, :, :1], to_tensor(frames)], dim=2)
    pairs = rearrange(video, "1 c (t p) h w -> t p c h w", p=2).mean(1)
    side = int((values / 3) ** 0.5)
    small = F.interpolate(pairs, size=(side, side), mode="bicubic", antialias=True)
    large = F.interpolate(small, size=frames.shape[1:3], mode="bicubic")
    return to_frames(rearrange(large.repeat_interleave(2, dim=0)[1:], "f c h w -> 1 c f h w"))


@torch.no_grad()
def round_trips(
    vae: AVVideoVAE, frames: np.ndarray, noises: Sequence[float], seed: int
) -> list[np.ndarray]:
    """The clip encoded once and decoded with each s.d. of noise on its normalized latents."""
    z = vae.encode(to_tensor(frames)).latent_dist.mode()
    noise = torch.randn(
        z.shape, generator=torch.Generator().manual_seed(seed)
    ) * vae.latents_std.view(1, -1, 1, 1, 1)
    return [to_frames(vae.decode(z + level * noise).sample) for level in noises]


def measures(sample: Sample, other: np.ndarray, probe: OpeningProbe) -> dict[str, float]:
    """All numbers of one version of a clip against its original."""
    boxes = mouth_boxes(sample.points)
    seen = probe.measure(other, sample.points)
    truth = probe.measure(sample.frames, sample.points)
    return {
        "psnr": psnr(sample.frames, other),
        "mouth_psnr": psnr(sample.frames, other, boxes),
        "gradient": gradient_energy(other) / gradient_energy(sample.frames),
        "mouth_gradient": gradient_energy(other, boxes) / gradient_energy(sample.frames, boxes),
        "opening_vs_original": correlation(truth, seen),
        "opening_vs_truth": correlation(sample.opening, seen),
        "lag_not_0": float(best_lag(truth, seen) != 0),
    }


def video_table(
    vae: AVVideoVAE, held_out: Iterator[Sample], probe: OpeningProbe
) -> dict[str, dict[str, float]]:
    """Mean of each measure for: the original, the control, and the round trip at each noise."""
    rows: dict[str, list[dict[str, float]]] = {}
    for index, sample in enumerate(held_out):
        values = (
            vae.config.latent_channels
            * (sample.frames.shape[1] // vae.spatial_compression_ratio) ** 2
        )
        versions = {
            "original": sample.frames,
            f"shrunk to {values} values": shrunk(sample.frames, values),
        }
        for level, frames in zip(
            NOISES, round_trips(vae, sample.frames, NOISES, index), strict=True
        ):
            versions[f"round trip, noise {level:g}"] = frames
        for name, frames in versions.items():
            rows.setdefault(name, []).append(measures(sample, frames, probe))
    return {
        name: {key: float(np.nanmean([row[key] for row in part])) for key in part[0]}
        for name, part in rows.items()
    }


@torch.no_grad()
def cost(vae: AVVideoVAE, size: int = 128, seconds: int = 4) -> dict[str, float]:
    """Parameters, GFLOP a frame (2 per multiply-add) and seconds for a round trip of `seconds` s at
    25 fps.
    """
    video = torch.zeros(1, 3, FPS * seconds + 1, size, size)
    with FlopCounterMode(display=False) as encoding:
        z = vae.encode(video).latent_dist.mode()
    with FlopCounterMode(display=False) as decoding:
        vae.decode(z)
    took = []
    for _ in range(5):
        began = time.perf_counter()
        vae.decode(vae.encode(video).latent_dist.mode())
        took.append(time.perf_counter() - began)
    frames = 2 * z.shape[2]  # the lone first frame costs a pair
    return {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "encoder_gflop": encoding.get_total_flops() / frames / 1e9,
        "decoder_gflop": decoding.get_total_flops() / frames / 1e9,
        f"seconds_for_{seconds}s": min(took),
        "threads": torch.get_num_threads(),
    }


def picture(vae: AVVideoVAE, clips: Sequence[Sample], frame: int = 7, gain: int = 4) -> Image.Image:
    """Rows: original, round trip, difference times `gain`; one column a clip."""
    columns = []
    for index, sample in enumerate(clips):
        other = round_trips(vae, sample.frames[: frame + 1 + frame % 2], (0.0,), index)[0][frame]
        difference = np.abs(other.astype(int) - sample.frames[frame].astype(int)) * gain
        columns.append(
            np.concatenate([sample.frames[frame], other, difference.clip(0, 255).astype(np.uint8)])
        )
    return Image.fromarray(np.concatenate(columns, axis=1))


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table as Markdown."""
    names = list(next(iter(table.values())))
    lines = ["| version | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [
        f"| {label} | " + " | ".join(f"{row[name]:.3f}" for name in names) + " |"
        for label, row in table.items()
    ]
    return "\n".join(lines) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename."""
    temporary_path = path.with_name(f".{path.name}.{os.getpid()}")
    temporary_path.write_text(text)
    os.replace(temporary_path, path)


def video_report(
    vae: AVVideoVAE, bank: str | None, output_dir: Path, clips: int, num_frames: int
) -> str:
    """Write video.md, video.json and video.png; returns the Markdown."""
    output_dir.mkdir(parents=True, exist_ok=True)
    probe = OpeningProbe.fit(
        (s.frames, s.points, s.opening)
        for s in samples(SpeechCorpus(bank, "train"), "train", 150, 25)
    )
    test = SpeechCorpus(bank, "test")
    table = video_table(vae, samples(test, "test", clips, num_frames), probe)
    price = cost(vae)
    text = (
        markdown(table)
        + "\n"
        + "\n".join(f"- {name}: {value:.4g}" for name, value in price.items())
        + "\n"
    )
    write_text(
        output_dir / "video.json",
        json.dumps({"clips": clips, "table": table, "cost": price}, indent=1),
    )
    write_text(
        output_dir / "video.md",
        f"Held-out presenters and sentences, {clips} clips of {num_frames} frames\n\n{text}",
    )
    temporary_path = output_dir / f".video.{os.getpid()}.png"
    picture(vae, list(samples(test, "test", 8, 9))).save(temporary_path)
    os.replace(temporary_path, output_dir / "video.png")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Round trips of the codecs on held-out clips.")
    parser.add_argument("--video_vae", required=True, help="folder of a saved AVVideoVAE")
    parser.add_argument(
        "--bank",
        default=None,
        help="folder of the speech bank; default $AVDIFF_BANK or the mini-bank",
    )
    parser.add_argument("--output_dir", default="runs/codec_report")
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--num_frames", type=int, default=49)
    options = parser.parse_args(arguments)
    vae = AVVideoVAE.from_pretrained(options.video_vae).eval()
    print(
        video_report(vae, options.bank, Path(options.output_dir), options.clips, options.num_frames)
    )


if __name__ == "__main__":
    main()
