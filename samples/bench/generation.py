"""How long the presenter takes and how much memory, by the length of the clip; and a 3 s clip, warm
and cold.

    python samples/bench/generation.py [--quick]

Growth: the exponent p of seconds ~ length^p, fitted on a log scale; 1 is linear. By extension: a
    clip made piece
after piece and written as it comes, whose memory must not grow with its length. Cold is the whole
command in a new process, imports and loading included. Peak memory is of the whole process, with
the weights.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from memory import reset_peak, resident
from timing import spread

from avdiff import PRESENTER
from avdiff.pipelines.pipeline_av import AVDiffPipeline

PROMPT = 'A woman with red hair and glasses says "good morning"'
LENGTHS = (2, 4, 8, 20, 60)


def generate(pipe: AVDiffPipeline, seconds: float) -> float:
    """Wall seconds of one clip, decoded."""
    start = time.perf_counter()
    pipe(PROMPT, seconds=seconds, output_type="np", generator=torch.Generator().manual_seed(0))
    return time.perf_counter() - start


def extend(pipe: AVDiffPipeline, seconds: float) -> float:
    """Wall seconds of a clip made by extension and written to a file as it comes."""
    from avdiff import write_clip
    from avdiff.pipelines.streaming import streams

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        frames, sound = streams(
            pipe.stream(PROMPT, seconds=seconds, generator=torch.Generator().manual_seed(0))
        )
        write_clip(Path(folder) / "long.mp4", frames, 25, sound, pipe.vocoder.config.sampling_rate)
        return time.perf_counter() - start


def grow(
    pipe: AVDiffPipeline, lengths: tuple[int, ...], make: Any, how: str
) -> list[dict[str, Any]]:
    """Time and peak memory at each length, and the law of growth."""
    rows, times, peaks = [], [], []
    for length in lengths:
        reset_peak()
        times.append(make(pipe, length))
        peaks.append(resident(peak=True) / 2**20)
        rows.append(
            {
                "name": f"{length} s clip, {how}",
                "value": times[-1],
                "unit": "s",
                "spread": None,
                "aim": None,
                "note": f"peak memory {peaks[-1]:.0f} MiB",
                "peak_mib": peaks[-1],
            }
        )
    if len(lengths) > 1:
        for what, values in (("time", times), ("peak memory", peaks)):
            power = float(np.polyfit(np.log(lengths), np.log(values), 1)[0])
            rows.append(
                {
                    "name": f"growth of {what}, {how}",
                    "value": power,
                    "unit": "power",
                    "spread": None,
                    "aim": None,
                    "note": f"{what} ~ length^{power:.2f} from {lengths[0]} to {lengths[-1]} s",
                }
            )
    return rows


def speed(pipe: AVDiffPipeline, rounds: int) -> list[dict[str, Any]]:
    """A 3 s clip: again in a running process, and by the command in a new one."""
    generate(pipe, 3)
    warm = [generate(pipe, 3) for _ in range(rounds)]
    cold = []
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "avdiff",
            "generate",
            PROMPT,
            "--seconds",
            "3",
            "-o",
            f"{folder}/x.mp4",
        ]
        for _ in range(max(1, rounds // 2)):
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            cold.append(time.perf_counter() - start)
    return [
        {
            "name": "3 s clip, warm",
            "value": statistics.median(warm),
            "unit": "s",
            "spread": spread(warm),
            "aim": None,
            "note": f"{pipe.num_timesteps} steps with guidance {pipe.guidance_scale}",
        },
        {
            "name": "3 s clip, cold: the whole command",
            "value": statistics.median(cold),
            "unit": "s",
            "spread": spread(cold),
            "aim": None,
            "note": "imports, loading, writing",
        },
    ]


def run(quick: bool = False) -> list[dict[str, Any]]:
    """All rows; `quick` stops at 8 s."""
    pipe = AVDiffPipeline.from_pretrained(PRESENTER)
    pipe.set_progress_bar_config(disable=True)
    lengths = LENGTHS[:3] if quick else LENGTHS
    rows = speed(pipe, 2 if quick else 5) + grow(pipe, lengths, generate, "in one call")
    return rows + grow(pipe, lengths[-2:] if quick else LENGTHS[-2:], extend, "by extension")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="clips of up to 8 s")
    for row in run(parser.parse_args().quick):
        print(f"{row['name']}: {row['value']:.3g} {row['unit']}; {row['note']}")
