"""Train the contact detector on drawn events, on the fly: minutes on one core.

    python -m avdiff.train.evaluators.contacts --output avdiff/bundled/contact_detector [--steps
    2000]

Scenes of the seed's own stream, degraded as a codec or a generator would: blur, noise, contrast,
and the flicker of codecs that code pictures in pairs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from avdiff.corpus.events.drawing import render_event
from avdiff.corpus.events.scene import sample_event
from avdiff.models.evaluators.contact_detector import FPS, SIDE, ContactDetector, bumps, peaks
from avdiff.train.loop.config import help_text, load_options

SECONDS = 2.0  # of a training clip
WITHIN = 0.5 / FPS  # half a picture


def draw(
    rng: np.random.Generator, seconds: float, kind: str | None = None
) -> tuple[Tensor, list[float]]:
    """Pictures (F, 3, 64, 64) in [-1, 1] of a scene, and its contacts in seconds."""
    event = sample_event(rng, seconds, kind)
    frames = [render_event(event, (i + 0.5) / FPS, SIDE) for i in range(round(seconds * FPS))]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 127.5 - 1, list(
        event.contacts
    )


def blurred(pictures: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of pictures (F, 3, H, W), sigma in pixels."""
    taps = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma) ** 2)
    kernel = (taps[:, None] * taps)[None, None] / taps.sum() ** 2
    x = F.conv2d(F.pad(pictures.flatten(0, 1)[:, None], (2, 2, 2, 2), mode="replicate"), kernel)
    return x[:, 0].view_as(pictures)


def degraded(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """A clip (F, 3, H, W) as a codec or a generator would spoil it; one in four stays as it is."""
    if rng.random() < 0.25:
        return pictures
    x = blurred(pictures, rng.uniform(0.05, 1.0)) * rng.uniform(0.8, 1.15) + rng.uniform(-0.1, 0.1)
    if (
        rng.random() < 0.5
    ):  # the first picture alone, then pairs: each leaks into the other, and one is less sharp
        x = x.clone()
        share = rng.uniform(0, 0.5)
        first = x[1:-1:2]
        second = x[2::2]
        x[1:-1:2], x[2::2] = torch.lerp(first, second, share), torch.lerp(second, first, share)
        odd = int(rng.integers(2))
        x[odd::2] = blurred(x[odd::2], rng.uniform(0.05, 1.2))
        x[odd::2] += rng.normal(0, 0.03)
    grain = rng.normal(0, rng.uniform(0, 0.06), (*x.shape[:2], SIDE // 2, SIDE // 2))
    noise = torch.from_numpy(grain.astype(np.float32))
    return (x + F.interpolate(noise, scale_factor=2)).clamp(-1, 1)


@torch.no_grad()
def measure(
    detector: ContactDetector, count: int = 120, seed: int = 7, spoil: bool = False
) -> dict[str, float]:
    """Held-out scenes of 3 s: share of contacts found within half a picture and one, false ones,
    clips counted right.
    """
    found = near = total = extra = counted = 0
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        pictures, contacts = draw(rng, 3.0)
        pictures = degraded(pictures, rng) if spoil else pictures
        seen = np.array(peaks(detector(pictures[None])[0].sigmoid()))
        away = np.abs(np.array(contacts)[:, None] - seen[None]).min(1, initial=np.inf)
        total += len(contacts)
        found += int((away <= WITHIN).sum())
        near += int((away <= 2 * WITHIN).sum())
        extra += max(0, len(seen) - len(contacts))
        counted += len(seen) == len(contacts)
    return {
        "within_half_picture": found / total,
        "within_a_picture": near / total,
        "extra": extra / total,
        "counted_right": counted / count,
    }


@dataclass(frozen=True)
class ContactOptions:
    """How the contact detector is trained."""

    output: str
    """Folder for the weights."""
    steps: int = 2000
    """Optimizer steps."""
    batch: int = 8
    """Clips of 2 s a step."""
    learning_rate: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of scenes and weights."""
    scenes: int = 120
    """Held-out scenes that it is measured on."""


def train(options: ContactOptions) -> ContactDetector:
    """A detector trained on scenes drawn on the fly, in eval mode."""
    torch.manual_seed(options.seed)
    detector = ContactDetector()
    optimizer = torch.optim.AdamW(detector.parameters(), options.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, options.learning_rate, max(20, options.steps), pct_start=0.1
    )
    for step in range(options.steps):
        rng = np.random.default_rng([options.seed, 1, step])
        rows = [draw(rng, SECONDS) for _ in range(options.batch)]
        pictures = torch.stack([degraded(x, rng) for x, _ in rows])
        target = torch.stack([bumps(contacts, pictures.shape[1]) for _, contacts in rows])
        loss = F.binary_cross_entropy_with_logits(detector(pictures), target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:
            print(f"step {step + 1}/{options.steps} loss {loss.item():.4f}", flush=True)
    return detector.eval()


def main(argv: Sequence[str] | None = None) -> dict[str, float] | None:
    """Command line: --output DIR [--option value]... | --help: train, measure, save."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"{main.__doc__}\n\n{help_text(ContactOptions)}")
        return None
    options = load_options(ContactOptions, None, words)
    detector = train(options)
    metrics = measure(detector, options.scenes)
    spoilt = measure(detector, options.scenes, spoil=True)
    metrics |= {f"spoilt_{name}": value for name, value in spoilt.items()}
    detector.save_pretrained(options.output)
    print(json.dumps(metrics))
    return metrics


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
