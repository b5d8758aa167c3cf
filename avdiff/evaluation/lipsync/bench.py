"""How good the lip-sync measurement is: on held-out presenters, whose truth is exact, or on a
folder of real clips.

    python -m avdiff.evaluation.lipsync.bench --clips 100 --bank BANK [--faces mesh|reader] [--json
    metrics.json] python -m avdiff.evaluation.lipsync.bench --folder CLIPS

Presenters of the test split are drawn, encoded as mp4 and read back like any file; then the sound
is shifted. They are in sync by construction, so absolute recovery holds there; of real clips only
the relative one is certain.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import Any

from avdiff.corpus.dataset import PresenterCorpus
from avdiff.evaluation.lipsync.measure import LipSync, Measured
from avdiff.evaluation.lipsync.self_checks import recovery, shift_clip, swap_auc
from avdiff.evaluation.report.report import Estimate, write_text
from avdiff.media.write import write_clip

MEDIA = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".m4v")


def write_presenters(
    folder: Path, count: int, bank: str | None = None, seconds: float = 3.0, fps: float | str = 25
) -> list[Path]:
    """Held-out presenters who speak, as mp4 files."""
    corpus = PresenterCorpus(
        bank, "test", length=count, seconds=seconds, fps=fps, event_share=0.0, augment_share=0.0
    )
    paths = []
    for index in range(count):
        clip = corpus[index]
        paths.append(folder / f"{index:04}.mp4")
        write_clip(
            paths[-1], clip["video"].numpy(), clip["fps"], clip["audio"], clip["sample_rate"]
        )
    return paths


def measure(evaluator: LipSync, paths: Sequence[Path], jobs: int = 1) -> dict[str, Any]:
    """Statuses, recovery of planted shifts, true against swapped sound, and speed (decoding and
    landmarks included).
    """
    evaluator.measure(paths[0])  # networks are loaded by the first clip
    began = time.perf_counter()
    clips = evaluator.rows(paths, jobs)
    wall = time.perf_counter() - began
    good: list[Measured] = [clip for clip in clips if clip.audio is not None]
    metrics: dict[str, Any] = {
        "clips": len(clips),
        "status": dict(Counter(clip.row["status"] for clip in clips)),
        "jobs": jobs,
        "times_real_time": sum(clip.row.get("seconds", 0.0) for clip in clips) / wall,
        "landmarks": dict(Counter(clip.row.get("landmarks", "-") for clip in clips)),
    }
    if good:
        metrics |= recovery([shift_clip(clip, evaluator.backend) for clip in good])
    if len(good) > 1:
        metrics |= swap_auc(good, evaluator.backend)
    return metrics


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the JSON if asked."""
    parser = argparse.ArgumentParser(
        "lipsync_bench", description="Measure the lip-sync measurement."
    )
    parser.add_argument("--clips", type=int, default=100, help="presenters to draw")
    parser.add_argument("--bank", help="speech bank; default $AVDIFF_BANK, else the mini-bank")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--fps", default="25")
    parser.add_argument("--folder", type=Path, help="measure on these clips instead")
    parser.add_argument("--faces", default="auto", help="auto, mesh or reader")
    parser.add_argument("--landmarker", help="face_landmarker.task")
    parser.add_argument(
        "--evaluators", help="folder with lip_network and face_reader; default: those bundled"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(None if arguments is None else list(arguments))
    evaluator = LipSync(options.landmarker, options.faces, evaluators=options.evaluators)
    with tempfile.TemporaryDirectory() as place:
        paths = (
            sorted(p for p in options.folder.iterdir() if p.suffix.lower() in MEDIA)
            if options.folder
            else write_presenters(
                Path(place), options.clips, options.bank, options.seconds, options.fps
            )
        )
        if not paths:
            raise ValueError(f"folder={options.folder}: holds no clip")
        metrics = {**evaluator.header(), **measure(evaluator, paths, options.jobs)}
    for key, value in metrics.items():
        text = f"{value} (n = {value.n})" if isinstance(value, Estimate) else value
        print(f"{key}: {text}")
    if options.json:
        plain = {k: vars(v) if isinstance(v, Estimate) else v for k, v in metrics.items()}
        write_text(options.json, dumps(plain, indent=1) + "\n")
    return metrics


if __name__ == "__main__":
    main()
