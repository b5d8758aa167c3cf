"""Training speed of the presenter: share of the bf16 matrix rate, and share of the time spent
waiting for data.

    python samples/bench/training.py [--quick]

The real loop runs on cached latents of random content: forward, backward, clipping, update and
average, bf16 as the recipe has it. A step and a plain bf16 product take turns, so that a busy
machine slows both. The step's work is counted by torch's FLOP counter: matrix and attention
products, forward and backward, nothing for the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import save_file
from timing import spread
from torch.utils.flop_counter import FlopCounterMode

from avdiff.clip import ClipSpec
from avdiff.data.cache import FORMAT, SHARD
from avdiff.phonetics.phone import inventory
from avdiff.train.finetune import setup
from avdiff.train.loop.accelerator import Stop
from avdiff.train.loop.config import load_options
from avdiff.train.loop.fit import Run
from avdiff.train.recipe import Recipe

CLIP = ClipSpec(51, Fraction(25), 128, 128)
SIDE = 1024  # of the square matrices whose product sets the rate
AIM_RATE, AIM_WAIT = 0.35, 0.05


def write_cache(folder: Path, count: int) -> None:
    """Random latents with phones, in the format of `avdiff data cache`."""
    folder.mkdir()
    symbols, draw = inventory()[0][1:], torch.Generator().manual_seed(0)
    for first in range(0, count, SHARD):
        tensors, records = {}, []
        for i in range(min(SHARD, count - first)):
            tensors[f"{first + i}/video"] = torch.randn(
                CLIP.video_tokens, 64, generator=draw
            ).half()
            tensors[f"{first + i}/audio"] = torch.randn(
                CLIP.audio_tokens, 48, generator=draw
            ).half()
            phones = [[symbols[(i + k) % len(symbols)], k / 10, (k + 1) / 10, 1] for k in range(20)]
            records.append(
                {
                    "index": first + i,
                    "caption": "A woman with red hair says something",
                    "phones": phones,
                    "modalities": ["video", "audio"],
                    "sample_rate": 24000,
                    "fps": str(CLIP.fps),
                    "num_frames": CLIP.num_frames,
                    "height": CLIP.height,
                    "width": CLIP.width,
                }
            )
        save_file(tensors, folder / f"shard-{first // SHARD:05d}.safetensors")
        (folder / f"shard-{first // SHARD:05d}.json").write_text(json.dumps(records))
    (folder / "cache.json").write_text(
        json.dumps({"format": FORMAT, "count": count, "vae": "v", "audio_vae": "a"})
    )


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of the bench; `quick` takes 4 clips a step and 3 rounds in place of 32 and 9."""
    clips, rounds = (4, 3) if quick else (32, 9)
    with tempfile.TemporaryDirectory() as place:
        write_cache(Path(place) / "cache", 128)
        words = {
            "train_data": f"{place}/cache",
            "output_dir": f"{place}/run",
            "preset": "presenter",
            "vocab_size": 300,
            "mixed_precision": "bf16",
            "ema_decay": 0.995,
            "train_batch_size": clips,
            "max_train_steps": 10**6,
            "checkpointing_steps": 0,
        }
        recipe = load_options(Recipe, None, [f"--{k}={v}" for k, v in words.items()])
        loop = Run(setup(recipe), recipe.training)
        loop.start()
        try:
            return measure(loop, clips, rounds)
        finally:
            loop.loader.close()


def measure(loop: Run, clips: int, rounds: int) -> list[dict[str, Any]]:
    """Steps, waits and products by turns."""
    stop = Stop()
    batches = loop.next_batches(stop)
    assert batches is not None
    loop.train_step(batches, 0.0)  # warm
    with FlopCounterMode(display=False) as counter:
        loop.train_step(batches, 0.0)
    work = counter.get_total_flops()
    a, b = (torch.randn(SIDE, SIDE).bfloat16() for _ in range(2))
    products = max(1, round(work / (2 * SIDE**3) / 4))  # a quarter of a step's work
    for _ in range(products):
        a @ b
    rates, waits, steps = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        batches = loop.next_batches(stop)
        assert batches is not None
        fetched = time.perf_counter()
        loop.train_step(batches, 0.0)
        stepped = time.perf_counter()
        for _ in range(products):
            a @ b
        multiplied = time.perf_counter() - stepped
        full = 2 * SIDE**3 * products / multiplied
        steps.append(stepped - start)
        rates.append(work / (stepped - start) / full)
        waits.append((fetched - start) / (stepped - start))
    each = 1e3 * statistics.median(steps) / clips
    note = f"{work / clips / 1e9:.1f} GFLOP and {each:.0f} ms a clip of 2 s, {clips} a step"
    return [
        {
            "name": "presenter training, share of the bf16 GEMM rate",
            "value": statistics.median(rates),
            "unit": "",
            "spread": spread(rates),
            "aim": AIM_RATE,
            "aim_is": "least",
            "note": note,
        },
        {
            "name": "presenter training, share of waiting for data",
            "value": statistics.median(waits),
            "unit": "",
            "spread": spread(waits),
            "aim": AIM_WAIT,
            "note": "no loader processes",
        },
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small batches and fewer rounds")
    for row in run(parser.parse_args().quick):
        print(json.dumps(row))
