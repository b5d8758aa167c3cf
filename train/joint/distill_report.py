"""How much distillation buys at tiny size.

    python -m avdiff.train.joint.distill_report --train_data DIR --validation_data DIR

For each seed one teacher, and students of equal steps:
- size: half the teacher's blocks, once from scratch on data, once distilled into the same fresh
  weights, once into weights taken over from the teacher; gap closed = (L_scratch - L) / (L_scratch
  - L_teacher) of the held-out loss;
- guidance and steps: gap closed between the teacher run like the student (no guidance, the
  student's steps) and its guided samples, by squared distance from the same noise.
It says which of them closes at least 0.3 of its gap in every seed. On toy latents a fresh small
student gains nothing over plain training at equal steps; one that inherits its teacher's weights
does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from avdiff.train.finetune import setup
from avdiff.train.loop.config import help_text, load_options
from avdiff.train.loop.fit import fit
from avdiff.train.recipe import Recipe

ENOUGH = 0.3


@dataclass(frozen=True)
class ReportOptions:
    """What is measured."""

    train_data: tuple[str, ...]
    """Cache folders for training."""
    validation_data: tuple[str, ...]
    """Cache folders to measure on."""
    output_dir: str = "runs/distill_report"
    """Folder for the runs and report.json."""
    codecs: str = "avdiff/bundled"
    """Folder with the codecs that made the caches: the teacher is exported as a pipeline."""
    preset: str = "tiny"
    """Size of the teacher."""
    student_layers: int = 1
    """Blocks of the smaller student."""
    teacher_steps: int = 300
    """Training steps of the teacher."""
    steps: int = 150
    """Training steps of every student."""
    batch_size: int = 8
    """Clips in a step."""
    learning_rate: float = 6e-3
    """Of all runs from scratch; distillation from the teacher's own weights takes a third."""
    seeds: int = 3
    """Repetitions."""


def measure(options: ReportOptions, seed: int) -> dict[str, float]:
    """Gap closed by each kind of distillation, for one seed."""
    root = Path(options.output_dir) / str(seed)
    teacher = _run(
        options, root / "teacher", seed, options.teacher_steps, {"codecs": options.codecs}
    )
    best = _loss(teacher)
    final = str(root / "teacher" / "final")
    small = {"preset_changes": {"num_layers": options.student_layers}}
    scratch = _loss(_run(options, root / "scratch", seed, options.steps, small))
    size = small | {"teacher": final, "distill": "size", "feature_weight": 0.1}
    fresh = _loss(
        _run(options, root / "fresh", seed, options.steps, size | {"start_from_teacher": False})
    )
    heir = _loss(_run(options, root / "heir", seed, options.steps, size))
    closed = {
        "size": (scratch - fresh) / (scratch - best),
        "size, inherited": (scratch - heir) / (scratch - best),
    }
    same = {
        "pretrained_model_name_or_path": final,
        "teacher": final,
        "learning_rate": options.learning_rate / 3,
        "student_steps": 4,
        "own_steps": 1,
    }
    for kind in ("guidance", "steps"):
        metrics = _run(options, root / kind, seed, options.steps, same | {"distill": kind})
        closed |= {
            f"{kind}, {m}": metrics[f"closed/{m}"]
            for m in ("video", "audio")
            if f"closed/{m}" in metrics
        }
    return closed


def _run(
    options: ReportOptions, folder: Path, seed: int, steps: int, extra: dict[str, Any]
) -> dict[str, float]:
    """Metrics of one run with averaged weights."""
    flags = {
        "train_data": list(options.train_data),
        "validation_data": list(options.validation_data),
        "output_dir": str(folder),
        "preset": options.preset,
        "vocab_size": 300,
        "max_train_steps": steps,
        "train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "ema_decay": 0.9,
        "checkpointing_steps": 0,
        "validation_steps": steps,
        "log_every": max(1, steps // 4),
        "seed": seed,
    } | extra
    words = [f"--{name}={_word(value)}" for name, value in flags.items()]
    recipe = load_options(Recipe, None, words)
    return fit(setup(recipe), recipe.training).metrics


def _word(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    if isinstance(value, dict):
        return ",".join(f"{k}={v}" for k, v in value.items())
    return str(value).lower() if isinstance(value, bool) else str(value)


def _loss(metrics: dict[str, float]) -> float:
    return metrics["video"] + metrics["audio"]


def report(options: ReportOptions) -> dict[str, dict[str, Any]]:
    """Kind -> gap closed in each seed, their mean, and whether every one is at least 0.3; printed
    and written.
    """
    by_seed = [measure(options, seed) for seed in range(options.seeds)]
    table: dict[str, dict[str, Any]] = {}
    for kind in by_seed[0]:
        closed = [row[kind] for row in by_seed]
        table[kind] = {
            "closed": closed,
            "mean": mean(closed),
            "enough": all(c >= ENOUGH for c in closed),
        }
    for kind, entry in table.items():
        seeds = " ".join(f"{value:6.2f}" for value in entry["closed"])
        verdict = "at least" if entry["enough"] else "does not reach"
        print(
            f"{kind:18} closes {entry['mean']:5.2f} of its gap ({seeds}): {verdict} {ENOUGH} in "
            "every seed"
        )
    (Path(options.output_dir) / "report.json").write_text(json.dumps(table, indent=1))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: --option value..."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(f"{__doc__}\n{help_text(ReportOptions)}")
        return
    report(load_options(ReportOptions, None, words))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
