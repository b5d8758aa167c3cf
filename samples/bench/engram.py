"""Engram off RAM: a denoising run of the presenter's transformer with a memory of 8 GiB that stays
on disk.

    python samples/bench/engram.py [--quick] [--folder /somewhere/with/10/GiB]

The table is random bytes without holes, in a file that is removed afterwards. Warm: its rows are in
the page cache.
Cold: the kernel was told to drop the file's pages. Batch 1, 8 steps, a prompt of 60 phonemes, one
    thread.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import reset_peak, resident
from timing import spread

from avdiff.clip import ClipSpec
from avdiff.core.engram import Engram, NgramHash
from avdiff.models import presets
from avdiff.models.conditions import Positions
from avdiff.models.transformer import AVTransformer
from avdiff.phonetics.track import PhonemeTrack

CHANNELS, ORDERS, HEADS, STEPS, PHONEMES = 64, 3, 8, 8, 60
BLOCK = 2**26  # bytes written at a time


def write_table(path: Path, rows: int) -> None:
    """A safetensors file with `rows` of 64 bf16 values: random bytes, but for the bit that would
    make NaN of some.
    """
    rng, left = np.random.default_rng(0), rows * CHANNELS * 2
    header = json.dumps(
        {"rows": {"dtype": "BF16", "shape": [rows, CHANNELS], "data_offsets": [0, left]}}
    )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header.encode())
        while left:
            block = rng.integers(0, 256, min(BLOCK, left), dtype=np.uint8)
            block[1::2] &= 0xBF  # exponent below 128: magnitudes below 2
            file.write(block.tobytes())
            left -= len(block)
        file.flush()
        os.fsync(file.fileno())  # the kernel cannot drop pages that are not yet on the disk


def build(file: Path, hashing: NgramHash) -> AVTransformer:
    """The presenter's transformer whose block 1 reads the file."""
    torch.manual_seed(0)
    sizes = dict(memory_orders=ORDERS, memory_heads=HEADS, memory_head_dim=CHANNELS, memory_rows=64)
    model = AVTransformer(**{**presets.presenter(), **sizes})
    model.transformer_blocks[1].memory = Engram(
        model.config.audio_dim, hashing, CHANNELS, table_file=file
    )
    return model.eval()


def prompt(clip: ClipSpec, seed: int) -> PhonemeTrack:
    """60 random phonemes, evenly over the clip."""
    draw = torch.Generator().manual_seed(seed)
    frames = torch.arange(clip.mel_frames) * PHONEMES // clip.mel_frames
    ids = torch.randint(1, 100, (1, PHONEMES), generator=draw)
    return PhonemeTrack(ids, torch.zeros_like(ids), frames[None], torch.ones(1, dtype=torch.bool))


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(file: Path, hashing: NgramHash, rounds: int) -> list[dict[str, Any]]:
    """All rows of the bench."""
    before = resident()
    reset_peak()
    model = build(file, hashing)
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    memory: Any = model.transformer_blocks[1].memory
    clip = ClipSpec(num_frames=101)
    positions = Positions.of(clip)
    text, mask = torch.randn(1, 16, model.config.text_dim), torch.ones(1, 16, dtype=torch.bool)
    video, audio = torch.randn(1, clip.video_tokens, 64), torch.randn(1, clip.audio_tokens, 48)
    level = torch.full((1,), 0.5)
    conditions = model.prepare(text, mask, positions, prompt(clip, 0))
    cold, naive, warm, forward = [], [], [], []
    for i in range(rounds + 1):
        ids = prompt(clip, i).phonemes
        rows = hashing(ids).numpy()
        memory.table.mapped.release()
        fault = seconds(lambda rows=rows: memory.table.mapped._rows[rows])
        memory.table.mapped.release()
        first = seconds(lambda ids=ids: memory.lookup(ids))
        again = [seconds(lambda ids=ids: memory.lookup(ids)) for _ in range(4)][-1]
        steps = [
            seconds(lambda: model(video, audio, level, level, conditions=conditions))
            for _ in range(STEPS)
        ]
        if i:  # the first round warms up everything else
            naive.append(fault)
            cold.append(first)
            warm.append(again)
            forward.append(sum(steps) / STEPS)
    taken, table = resident(peak=True) - before, file.stat().st_size
    one = statistics.median(forward)
    size = f"{table / 2**30:.2f} GiB"
    share = [100 * w / (w + STEPS * f) for w, f in zip(warm, forward, strict=True)]
    calls = [c / f for c, f in zip(cold, forward, strict=True)]
    faults = [n / f for n, f in zip(naive, forward, strict=True)]
    weights = f"{taken / 2**20:.0f} MiB in all, of which weights {parameters / 2**20:.0f}"

    def row(
        name: str, values: list[float], unit: str, aim: float | None, note: str
    ) -> dict[str, Any]:
        return {
            "name": name,
            "value": statistics.median(values),
            "unit": unit,
            "spread": spread(values),
            "aim": aim,
            "note": note,
        }

    return [
        row(
            f"Engram {size}, warm look-up in a run of {STEPS} steps",
            share,
            "%",
            1.0,
            f"{1e3 * statistics.median(warm):.2f} ms; a step {1e3 * one:.1f} ms",
        ),
        row(
            f"Engram {size}, cold first look-up",
            calls,
            "forwards",
            1.5,
            f"{1e3 * statistics.median(cold):.1f} ms for {rows.size} rows",
        ),
        row(
            "the same rows by page faults",
            faults,
            "forwards",
            None,
            "what a plain memory map would cost",
        ),
        row(
            f"Engram {size}, peak memory beyond the weights",
            [100 * (taken - parameters) / table],
            "%",
            5.0 if table > 2**32 else None,
            weights,
        ),  # a small table is less than what a forward takes anyhow
    ]


def run(quick: bool = False, folder: Path | None = None) -> list[dict[str, Any]]:
    """Write the table, measure, remove it; `quick` takes 256 MiB in place of 8 GiB."""
    table_size = (2**28 if quick else 2**33) // (CHANNELS * 2 * (ORDERS - 1) * HEADS)
    hashing = NgramHash(128 * 8, table_size, ORDERS, HEADS, 1, (1,))
    need, place = hashing.num_rows * CHANNELS * 2, folder or Path(tempfile.gettempdir())
    if not place.is_dir():
        raise ValueError(f"folder={place}: is no folder")
    if shutil.disk_usage(place).free < 1.2 * need:
        raise ValueError(
            f"folder={place}: needs {1.2 * need / 2**30:.1f} GiB of free disk; name another with "
            "--folder"
        )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory(dir=place) as inside:
            file = Path(inside) / "table.safetensors"
            write_table(file, hashing.num_rows)
            return measure(file, hashing, 3 if quick else 9)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="256 MiB and fewer rounds")
    parser.add_argument("--folder", type=Path, default=None, help="where the table lies meanwhile")
    given = parser.parse_args()
    for row in run(given.quick, given.folder):
        print(f"{row['name']}: {row['value']:.3g} {row['unit']} (aim {row['aim']}); {row['note']}")
